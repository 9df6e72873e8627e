"""Banks as folders of coded checkpoints: written from any bank, and opened like one.

See `lcsc.codec` for the files. Opening decodes the steps that are wanted into the system's temporary folder (`TMPDIR`),
where they lie as plain numbers until the bank is given up; every number is compared with its digest on the way. Tensors
of a training state are passed over.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lcsc.bank.content import chunk_sums, content_digest
from lcsc.bank.extents import Piece, Source, Table, read_source
from lcsc.bank.find import Checkpoint, Group, choose
from lcsc.bank.optimizer_file import Optimizer, optimizer_tensors
from lcsc.codec.arrays import STATES, Array, Tensors
from lcsc.codec.chain import Chain, ChainWriter, is_chain
from lcsc.codec.checkpoint import State, kinds_in
from lcsc.codec.container import damaged
from lcsc.codec.settings import CodecSettings
from lcsc.core.dtypes import ITEMSIZE
from lcsc.core.errors import BankError
from lcsc.core.files import drop_left, free_bytes, make_locked, new_directory, refuse_inside, writing

if TYPE_CHECKING:
    from lcsc.bank.bank import CheckpointBank
    from lcsc.bank.rows import Row
    from lcsc.bank.stream import Progress

_ALIGN = 64


class Picks(Protocol):
    """What chooses steps, such as `lcsc.bank.Selection`."""

    def pick(self, found: Sequence[Any]) -> list[Any]:
        """Those to keep, in step order."""
        ...


def is_coded(path: Path) -> bool:
    """Whether a path is a folder of coded checkpoints."""
    return path.is_dir() and is_chain(path)


# ------------------------------------------------------------------------------------------------------------- write


def tensors_of(row: Row, names: Sequence[str]) -> dict[str, Array]:
    """Tensors of a bank's row by name, as their files hold them."""
    return {name: Array(row.table[name].dtype, read_source(row.files, row.table[name], row.base)) for name in names}


def write_coded(
    bank: CheckpointBank,
    to: Path,
    settings: CodecSettings,
    progress: Progress | None = None,
    state_of: Callable[[int], Optimizer] | None = None,
) -> None:
    """Write a bank's checkpoints into the new folder `to`, coded; it appears when it is whole.

    Args:
        bank: any of one EMA rate at most; dtypes are kept.
        to: folder that does not exist yet.
        settings: how.
        progress: called with checkpoints done and all of them.
        state_of: the optimizer of a row, which is coded beside it.

    Raises:
        OutputExistsError: `to` exists.
        BankError: LoRA factors, several EMA rates, or moments to drop where their weights do not move, of which is not
            known whose they are.
        NonFiniteError: NaN or Inf in what is to be quantised.
    """
    if bank.kind == "lora":
        raise BankError(f"`{bank.path}` holds LoRA factors, whose settings lie beside them. Use them there.")
    if bank.rates:
        raise BankError(f"`{bank.path}` was opened with several EMA rates. Code one of them, with weights=ema:RATE.")
    refuse_inside(bank.path, to)
    names = [*(entry.name for entry in bank.layout.entries), *bank.constants_named]
    with writing(to), new_directory(to) as folder:
        writer = ChainWriter(folder, settings)
        for k, row in enumerate(bank.rows):
            parent = bank.parent(k)  # which compares the checksums of torch files
            about = {"arch": bank.arch, "kind": bank.kind, "rate": bank.rate, "ties": dict(bank.layout.ties)}
            state = state_of(k) if state_of else Optimizer({})
            if settings.mode == "lossy" and settings.joint and settings.tau and not state.named:
                raise BankError(
                    f"the optimizer of step {row.step} does not name its parameters, so that moments cannot be dropped "
                    f"with their weights. Use joint=false, or tau=0 in place of {settings.tau:g}."
                )
            tensors = tensors_of(row, names) | state.tensors
            writer.append(row.step, tensors, {**about, "parent": parent, **state.about})
            if progress:
                progress(k + 1, len(bank.rows))


# -------------------------------------------------------------------------------------------------------------- read


def coded_states(path: Path) -> Callable[[int], Optimizer]:
    """What gives the optimizer of a step of a coded bank; it raises BankError where none was coded."""
    chain = Chain(path)

    def of(step: int) -> Optimizer:
        about, tensors = chain.header(step)["about"], optimizer_tensors(chain.read(step))
        if not tensors:
            raise BankError(f"step {step} of `{path}` was coded without an optimizer. Leave `optimizer` out.")
        return Optimizer(tensors, {key: about[key] for key in ("optimizer", "plain") if key in about})

    return of


class Decoded:
    """A temporary folder of decoded checkpoints; it goes with the last that holds this, in the process that made it.

    What killed processes left is removed first.
    """

    def __init__(self) -> None:
        place = Path(tempfile.gettempdir())
        drop_left(place, f"lcsc-coded-{'[0-9a-f]' * 16}")
        self.path = place / f"lcsc-coded-{secrets.token_hex(8)}"
        with writing(self.path):
            lock = make_locked(self.path, 0o700)
        weakref.finalize(self, _remove, self.path, os.getpid(), lock)


def _remove(path: Path, pid: int, lock: int) -> None:
    if os.getpid() == pid:  # not in a forked worker, whose parent still reads
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def coded_group(path: Path, select: Picks, weights: str | None) -> tuple[Group, list[dict[str, Any]], Decoded]:
    """The checkpoints of a folder that are wanted, decoded: a group, the origin of each, and what holds the numbers.

    Raises:
        BankError: a damaged file, no such weights or steps, or no room to decode them.
    """
    chain = Chain(path)
    about = {step: _about(chain, step) for step in chain.steps}
    first = about[chain.steps[0]]
    items = [
        Checkpoint(step, file.path, (file.path,), {}, "coded", str(first.get("kind")), first.get("rate"))
        for step, file in chain.files.items()
    ]
    whole = Group(None, str(first.get("kind")), first.get("rate"), "coded bank", tuple(items))
    wanted = [item.step for item in select.pick(choose([whole], None, weights).checkpoints)]
    room, held = _room(chain, wanted), Decoded()
    if room > (free := free_bytes(held.path / "x")):
        raise BankError(
            f"`{path}` takes {room} bytes when it is decoded, and `{held.path.parent}` has {free} free. Set TMPDIR to "
            "a folder with more room, or choose fewer steps."
        )
    found, parents, tables = [], [], dict[tuple[Any, ...], Table]()
    for step, state in chain.walk(wanted):
        said = about[step]
        own = {name: array for name, array in state.tensors.items() if not name.startswith(STATES)}
        kinds = tuple((name, array.kind) for name, array in sorted(own.items()))
        file = held.path / f"{step}.numbers"
        table = tables.setdefault(kinds, _with_ties(_write(file, own), said))  # rows of one kind share a table
        found.append(
            Checkpoint(
                step, chain.files[step].path, (file,), table, "coded", whole.kind, whole.rate, arch=said.get("arch")
            )
        )
        parents.append(_parent(chain, step, state, own, said))
    note = f"coded bank: {len(found)} checkpoints decoded into {room} bytes of temporary files"
    lossy = any(chain.header(step).get("lossy") for step in wanted)
    notes = (note, *(("its numbers are near those of the training, not the same",) if lossy else ()))
    return Group(None, whole.kind, whole.rate, "coded bank", tuple(found), notes), parents, held


class _All:
    """Every step."""

    def pick(self, found: Sequence[Any]) -> list[Any]:
        return list(found)


def decoded_group(path: Path) -> tuple[list[Group], Decoded | None]:
    """All checkpoints of a coded bank as a list of one group, and what holds them; nothing of another path.

    Raises:
        BankError: a damaged file, or no room to decode them.
    """
    if not is_coded(path):
        return [], None
    group, _, held = coded_group(path, _All(), None)
    return [group], held


def _about(chain: Chain, step: int) -> dict[str, Any]:
    about = chain.header(step).get("about")
    if about.__class__ is not dict or not {"kind", "rate", "arch", "ties"} <= about.keys():
        raise BankError(
            f"`{chain.path}` holds coded checkpoints that do not say what they are of. Read them with "
            "`lcsc.codec.chain.Chain`, or pack a bank with `lcsc bank pack codec=lossless`."
        )
    kinds, ties, arch = kinds_in(chain.files[step]), about["ties"], about["arch"]
    described = arch is None or (arch.__class__ is dict and {"class", "config"} <= arch.keys())
    described &= about["kind"] in ("raw", "ema") and isinstance(about["rate"], str | None)
    if ties.__class__ is not dict or not kinds.keys() >= set(map(str, ties.values())) or not described:
        raise damaged(chain.files[step].path, "what it says of its network is not so")
    return about


def _room(chain: Chain, steps: Sequence[int]) -> int:
    """Bytes of the decoded numbers."""
    total = 0
    for step in steps:
        for dtype, shape in kinds_in(chain.files[step]).values():
            total += ITEMSIZE[dtype] * math.prod(shape) + _ALIGN
    return total


def _write(file: Path, tensors: Tensors) -> dict[str, Source]:
    """Tensors one behind the other in a file, and where they lie."""
    table: dict[str, Source] = {}
    with writing(file), open(file, "wb") as out:
        for name, array in sorted(tensors.items()):
            out.write(b"\0" * (-out.tell() % _ALIGN))
            table[name] = Source(array.dtype, array.bits.shape, (Piece(0, out.tell(), array.bits.shape),))
            out.write(array.bits.tobytes())
    return table


def _with_ties(table: dict[str, Source], said: Mapping[str, Any]) -> Table:
    return table | {str(name): table[str(twin)] for name, twin in said["ties"].items()}


def _parent(chain: Chain, step: int, state: State, own: Tensors, said: Mapping[str, Any]) -> dict[str, Any]:
    """Origin of a row, as `CheckpointBank.parent` gives it: of these contents, whatever they were coded from."""
    content = content_digest({name: (*array.kind, chunk_sums(array.bits)) for name, array in own.items()})
    file = chain.files[step]
    found = {"step": step, "files": {file.path.name: file.nbytes}, "content": content}
    before = said.get("parent")
    rounded = before.get("rounded") if isinstance(before, dict) else None
    return found if rounded is None else {**found, "rounded": rounded}

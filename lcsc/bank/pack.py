"""A bank in one file: rows that can be used where they lie, opened in milliseconds.

The file is a safetensors file with one tensor `rows` and a description in the metadata. A row holds a checkpoint's
combined tensors, then the bits of its other tensors, and is padded to whole pages; the data begins on a page boundary
too, so that the rows can be mapped into memory and shared by all processes of a machine.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc.bank.extents import ITEMSIZE, Table, read_source
from lcsc.bank.pack_read import PACKED, ROWS, VERSION
from lcsc.bank.rows import cut, origin
from lcsc.bank.safetensors_file import DTYPES, MAX_HEADER, PACK_KEY
from lcsc.core.digests import canonical_json
from lcsc.core.errors import BankError, ConfigError, NonFiniteError, OutputExistsError
from lcsc.core.files import fsync_dir, preallocate, refuse_inside, writing

if TYPE_CHECKING:
    from lcsc.bank.bank import CheckpointBank
    from lcsc.bank.stream import Progress

PAGE = 4096
#: largest number of float16
HALF_MAX = 65504
_CODES = {name: code for code, name in DTYPES.items() if name in PACKED}


def write_pack(
    bank: CheckpointBank,
    to: Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    note_rounding: bool = True,
) -> str:
    """Write a bank's rows into the new file `to`; it appears under its name only when it is whole.

    Args:
        bank: any bank; its finite check applies.
        to: file that does not exist yet, ending in `.safetensors`.
        dtype: float32, bfloat16 or float16; None keeps a dtype that all files share and uses float32 otherwise.
        progress: called with rows' columns done and all of them.
        note_rounding: whether rows that `dtype` rounds say so, and are other contents from then on. False for the rows
            that this very bank works with, in its own dtype: then the digest stays.

    Returns:
        The dtype of the rows.

    Raises:
        OutputExistsError: `to` exists.
        ConfigError: no such dtype, or another suffix.
        BankError: LoRA factors.
    """
    if bank.kind == "lora":
        raise BankError(
            f"`{bank.path}` holds LoRA factors, whose settings lie beside them. They are small; use them there."
        )
    found = set(bank.dtypes.values())
    dtype = dtype or (found.pop() if len(found) == 1 and found <= set(PACKED) else "float32")
    if dtype not in PACKED:
        raise ConfigError(f"`dtype` is `{dtype}`; it must be one of {', '.join(PACKED)}.")
    if to.suffix != ".safetensors":
        raise ConfigError(f"`to` is `{to}`; a packed bank is a file whose name ends in `.safetensors`.")
    if to.exists() or to.is_symlink():
        raise OutputExistsError(f"output `{to}` exists already. Nothing is overwritten; choose another path.")
    refuse_inside(bank.path, to)
    temp = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        file = open(temp, "xb")  # noqa: SIM115 - closed below, where errors of reading are not those of writing
    try:
        with file:
            _write(bank, _Target(to, file.fileno()), dtype, progress, note_rounding)
        if to.exists():
            raise OutputExistsError(f"output `{to}` appeared while it was being written; nothing is overwritten.")
        with writing(to):
            os.replace(temp, to)
            fsync_dir(to.parent)
    finally:
        temp.unlink(missing_ok=True)
    return dtype


class _Target:
    """The open file; the system's errors on writing it name it by its later path."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    def reserve(self, size: int) -> None:
        """Give the file its size, so that a full disk is noticed before the first row is read."""
        with writing(self.path):
            preallocate(self.fd, size)

    def put(self, data: bytes | memoryview, offset: int) -> None:
        """Write at an offset."""
        view = memoryview(data).cast("B")
        with writing(self.path):
            while view:
                done = os.pwrite(self.fd, view, offset)
                view, offset = view[done:], offset + done

    def sync(self) -> None:
        """Have all of it on the disk."""
        with writing(self.path):
            os.fsync(self.fd)


def _places(bank: CheckpointBank, size: int) -> tuple[list[list[Any]], int]:
    """`[name, dtype, shape, first byte in the row]` of every constant, and the bytes of a whole row."""
    at, places = bank.layout.num_parameters * size, []
    for name, (_, source) in bank.constant_sources().items():
        at += -at % 8
        places.append([name, source.dtype, list(source.shape), at])
        at += source.nbytes
    return places, at + -at % PAGE


def _write(bank: CheckpointBank, target: _Target, dtype: str, progress: Progress | None, note_rounding: bool) -> None:
    from lcsc.bank.storage import each_row, from_float32, tables_of

    K, P, size = bank.num_checkpoints, bank.layout.num_parameters, ITEMSIZE[dtype]
    places, width = _places(bank, size)
    tables = tables_of(bank.rows)
    exact = {id(table): _exact(dtype, table, bank) for table in tables}
    rounded = [() if exact[id(row.table)] or not note_rounding else (dtype,) for row in bank.rows]
    # the digests of the contents are known only after the pass, and have a fixed length
    drafts = bank.origins or [origin(bank.path, row, "0" * 64) for row in bank.rows]
    draft = _header(bank, dtype, places, width, _parents(drafts, rounded))
    if (start := len(draft)) - 8 > MAX_HEADER:
        raise BankError(
            f"the description of {K} checkpoints takes {start} bytes, more than the {MAX_HEADER} that are read. "
            "Pack fewer of them with `start`, `stop`, `every` or `last`."
        )
    target.reserve(start + K * width)
    for block, k, row_C in each_row(bank.rows, cut(bank.layout, tables), bank.checksums):
        data = from_float32(row_C, dtype)
        if dtype == "float16" and np.abs(row_C).max(initial=0) > HALF_MAX:
            raise NonFiniteError(
                f"step {bank.rows[k].step} holds numbers beyond {HALF_MAX}, the largest of float16, near "
                f"`{block.spans[0].name}`. Use dtype=bfloat16 or dtype=float32."
            )
        target.put(data.data, start + k * width + block.start * size)
        if progress and k == K - 1:
            progress(block.stop, P)
    for k, row in enumerate(bank.rows):
        for name, _, _, at in places:
            target.put(read_source(row.files, row.table[name], row.base).tobytes(), start + k * width + at)
    target.put(_header(bank, dtype, places, width, _parents(bank.parents, rounded)), 0)
    target.sync()


def _holds(wide: str, narrow: str) -> bool:
    """Whether every number of one dtype is a number of another; those of float64 are none of float32."""
    return narrow == wide or (wide == "float32" and narrow in ("bfloat16", "float16"))


def _exact(dtype: str, table: Table, bank: CheckpointBank) -> bool:
    return all(_holds(dtype, table[entry.name].dtype) for entry in bank.layout.entries)


def _parents(parents: Sequence[Mapping[str, Any]], rounded: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Parents with the dtypes that their numbers were rounded to on their way here, in that order."""
    found = []
    for parent, own in zip(parents, rounded, strict=True):
        before = (parent["rounded"],) if "rounded" in parent else ()
        found.append({**parent, **({"rounded": ", ".join((*before, *own))} if before or own else {})})
    return found


def _header(
    bank: CheckpointBank, dtype: str, places: list[list[Any]], width: int, parents: Sequence[Mapping[str, Any]]
) -> bytes:
    described = {
        "version": VERSION,
        "dtype": dtype,
        "tensors": [[entry.name, list(entry.shape)] for entry in bank.layout.entries],
        "ties": dict(bank.layout.ties),
        "constants": places,
        "arch": bank.arch,
        "kind": bank.kind,
        "rate": bank.rate,
        **({"rates": list(bank.rates)} if bank.rates else {}),
        "parents": parents,
    }
    K = bank.num_checkpoints
    rows = {"dtype": _CODES[dtype], "shape": [K, width // ITEMSIZE[dtype]], "data_offsets": [0, K * width]}
    metadata = {PACK_KEY: canonical_json(described)}
    text = json.dumps({"__metadata__": metadata, ROWS: rows}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text

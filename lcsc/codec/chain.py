"""A folder of coded checkpoints: anchors, and what is coded against the one before.

    step-000000000100.ckd   an anchor, readable alone
    step-000000000200.ckd   needs the file before it
    ...

A checkpoint is read from the anchor before it on; every link is held against the digest that the next file names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lcsc.codec.arrays import State, Tensors
from lcsc.codec.checkpoint import decode, encode, needed
from lcsc.codec.container import SUFFIX, Container, damaged
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import BankError, OutputExistsError
from lcsc.core.files import write_bytes, writing

_NAME = re.compile(r"step-(\d{1,18})" + re.escape(SUFFIX))


def file_name(step: int) -> str:
    """How the file of a step is called."""
    return f"step-{step:012d}{SUFFIX}"


def is_chain(path: Path) -> bool:
    """Whether a folder holds coded checkpoints, or a file is one."""
    if path.is_dir():
        return any(_NAME.fullmatch(file.name) for file in path.iterdir())
    return path.suffix == SUFFIX and path.is_file()


class Chain:
    """The checkpoints of a folder; opening reads headers alone.

    Args:
        path: the folder.

    Raises:
        BankError: none there, a damaged header, or a link that is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = {int(found[1]): file for file in sorted(path.iterdir()) if (found := _NAME.fullmatch(file.name))}
        if not files:
            raise BankError(f"`{path}` holds no coded checkpoints. Make them with `lcsc bank pack codec=lossless`.")
        self.files = {step: Container(files[step]) for step in sorted(files)}
        before: Container | None = None
        for step, file in self.files.items():
            said = file.header.get("reference")
            if file.header.get("step") != step:
                raise damaged(file.path, "its name says another step than its header")
            if not {"reference", "tensors", "parts"} <= file.header.keys():
                raise damaged(file.path, "its header does not describe a checkpoint")
            if said is not None and (
                before is None or said.__class__ is not dict or said.get("file") != before.path.name
            ):
                name = said.get("file") if said.__class__ is dict else said
                raise BankError(
                    f"`{file.path}` needs the checkpoint `{name}`, which does not lie before it. Restore it, or pack "
                    "the bank again."
                )
            before = file

    @property
    def steps(self) -> tuple[int, ...]:
        """Training step of each checkpoint, increasing."""
        return tuple(self.files)

    def header(self, step: int) -> Mapping[str, Any]:
        """What the file of a step says."""
        return self.files[step].header

    def walk(
        self, steps: Collection[int] | None = None, names: Collection[str] | None = None
    ) -> Iterator[tuple[int, State]]:
        """Checkpoints in order, each decoded once and compared with its digests.

        Args:
            steps: those that are wanted, None for all; those that they need are decoded too.
            names: tensors that are wanted, None for all; those that share a stretch with them come too.

        Raises:
            BankError: a damaged file, or one that was coded against another.
        """
        wanted = set(self.files if steps is None else steps)
        decoded, inside = self._plan(wanted, names)
        state: State | None = None
        for step, file in self.files.items():
            if step not in decoded:
                continue
            state = decode(file, None if file.header["reference"] is None else state, inside.get(step))
            if step in wanted:
                yield step, state

    def _plan(self, wanted: set[int], names: Collection[str] | None) -> tuple[set[int], dict[int, set[str] | None]]:
        """Steps to decode, and which of their tensors, from the last to the first."""
        decoded: set[int] = set()
        inside: dict[int, set[str] | None] = {}
        carried: set[str] = set()
        need = False
        for step in reversed(self.files):
            if not (need or step in wanted):
                continue
            decoded.add(step)
            if names is not None:
                own = set(names) if step in wanted else set()
                try:
                    inside[step] = needed(self.files[step], own | carried)
                except (KeyError, TypeError, IndexError):
                    raise damaged(self.files[step].path, "its header does not describe a checkpoint") from None
            need = self.files[step].header["reference"] is not None
            carried = set(inside.get(step) or ()) if need else set()
        return decoded, inside

    def read(self, step: int, names: Collection[str] | None = None) -> Tensors:
        """The tensors of a step by name; `names` alone where they are given.

        Raises:
            BankError: no such step, no such tensor, or a damaged file.
        """
        if step not in self.files:
            raise BankError(f"`{self.path}` has the steps {self.steps[0]} to {self.steps[-1]} and not {step}.")
        (_, state), *_ = self.walk([step], names)
        if names is None:
            return state.tensors
        if missing := set(names) - state.tensors.keys():
            raise BankError(f"step {step} of `{self.path}` has no tensor `{min(missing)}`.")
        return {name: state.tensors[name] for name in names}


class ChainWriter:
    """Adds checkpoints to a folder, each against the one before.

    Args:
        path: the folder; made where it is not there. One with checkpoints is continued, which decodes the last. What a
            killed process left half-written in it is removed.
        settings: how.
    """

    def __init__(self, path: Path, settings: CodecSettings | None = None) -> None:
        self.path, self.settings = path, settings or CodecSettings()
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            for left in path.glob(f".step-*{SUFFIX}.*.tmp"):
                left.unlink()
        self._open()

    def _open(self) -> None:
        """Stand behind the last checkpoint that is there."""
        self._state: State | None = None
        self._last, self._since = -1, 0
        if is_chain(self.path):
            chain = Chain(self.path)
            self._last = chain.steps[-1]
            ((_, self._state),) = chain.walk([self._last])
            behind = [chain.header(step)["reference"] is None for step in reversed(chain.steps)]
            self._since = behind.index(True) + 1

    def cut(self, step: int) -> None:
        """Remove the checkpoint of a step and all behind it, the last first, so that what is left is always whole."""
        if step > self._last:
            return
        for own, file in reversed(Chain(self.path).files.items()):
            if own >= step:
                with writing(file.path):
                    file.path.unlink()
        self._open()

    def append(self, step: int, tensors: Tensors, about: Mapping[str, Any] | None = None) -> Path:
        """Code a checkpoint behind the last; its file appears when it is whole.

        Args:
            step: above all that are there.
            tensors: all of it.
            about: plain values to keep in the header.

        Raises:
            OutputExistsError: a step that is not above the last.
            NonFiniteError: NaN or Inf in what is to be quantised.
        """
        if step <= self._last:
            raise OutputExistsError(
                f"step {step} cannot follow step {self._last} in `{self.path}`. Steps increase; write into another "
                "folder."
            )
        anchor = self._state is None or self._since >= self.settings.anchor_every
        file, before = self.path / file_name(step), None if anchor else self._state
        data, state = encode(tensors, before, self.settings, file=file.name, step=step, about=about or {})
        write_bytes(file, data)
        self._state, self._last, self._since = state, step, 1 if anchor else self._since + 1
        return file

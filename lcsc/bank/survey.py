"""What lies under a path, group by group: steps, gaps, duplicates, dtypes, sizes, and whether all numbers are finite.

Headers alone take milliseconds a file. With the numbers, every byte is read once in blocks of a few megabytes, so
that the memory needed does not depend on the checkpoints.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcsc.bank.coded import decoded_group
from lcsc.bank.content import CHUNK, chunk_sums, content_digest, same_bits
from lcsc.bank.extents import ITEMSIZE, Piece, Source, Table, pread_into, raw_dtype, read_source
from lcsc.bank.find import Checkpoint, Group, choose, find_groups
from lcsc.bank.layout import is_combined
from lcsc.bank.memory import Extent
from lcsc.bank.pack_read import open_pack, pack_groups
from lcsc.bank.shape import shape_of
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError, NonFiniteError

#: bytes read at a time
BLOCK = 4 << 20
#: bits that are all set in NaN and Inf, for dtypes that numpy has not or is slow with
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float8_e5m2": 0x7C, "float8_e4m3fn": 0x7F}

#: bytes read so far, bytes in all
Progress = Callable[[int, int], None]
#: rate and step of each row of a packed bank -> bytes to add to every offset
Bases = dict[tuple[str | None, int], int]


@dataclass(frozen=True, slots=True)
class FileRow:
    """One checkpoint.

    Args:
        step: its step.
        path: file or folder.
        format: `safetensors`, `torch` or `dcp`.
        nbytes: bytes of its tensors.
        digest: `content.content_digest`; None when the numbers were not read.
        bad: tensors with NaN or Inf and their counts; None when the numbers were not read.
    """

    step: int
    path: Path
    format: str
    nbytes: int
    digest: str | None = None
    bad: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True)
class GroupRow:
    """One group of checkpoints.

    Args:
        group: the checkpoints; see `find.Group`.
        files: one row a checkpoint, in step order.
        dtypes: dtype -> numbers of one checkpoint that have it, over all its tensors (of the last checkpoint).
        extent: what the bank's memory depends on; `num_parameters` are the numbers that a bank combines.
        duplicates: steps that hold the same bits, two or more each; empty when the numbers were not read.
    """

    group: Group
    files: tuple[FileRow, ...]
    dtypes: dict[str, int]
    extent: Extent
    duplicates: tuple[tuple[int, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of all checkpoints."""
        return sum(row.nbytes for row in self.files)

    @property
    def finite(self) -> bool | None:
        """Whether no number is NaN or Inf; None when the numbers were not read."""
        return None if any(row.bad is None for row in self.files) else not any(row.bad for row in self.files)

    @property
    def constant(self) -> bool:
        """Whether all checkpoints hold the same bits."""
        return len(self.files) > 1 and any(len(steps) == len(self.files) for steps in self.duplicates)


@dataclass(frozen=True)
class Survey:
    """What lies under a path, and what is wrong with it."""

    path: Path
    groups: tuple[GroupRow, ...]
    problems: tuple[BankError, ...]


def survey(
    path: str | Path,
    *,
    read: bool = True,
    progress: Progress | None = None,
    component: str | None = None,
    weights: str | None = None,
) -> Survey:
    """Look at all checkpoints under a path.

    Args:
        path: as for `find_groups`.
        read: read all numbers, for finiteness, duplicates and the checksums of torch files; False reads headers only.
        progress: called with bytes read and bytes in all.
        component: look at this network alone.
        weights: look at these weights alone: raw, ema, ema:<rate> or lora.

    Raises:
        BankError: nothing could be read at all; what is wrong with single files stands in `Survey.problems`.
    """
    problems: list[BankError] = []
    bases: Bases = {}
    try:
        coded, held = decoded_group(Path(path))  # its files lie there as long as `held`
        groups = coded or _packed(Path(path), bases) or find_groups(path, problems=problems)
    except BankError:
        if problems:  # nothing is left because all files are damaged: the damage is what to say
            raise problems[0] from None
        raise
    if component is not None or weights is not None:
        groups = [choose(groups, component, weights)]
    reader = _Reader(groups, progress, bases) if read else None
    rows = [_group_row(group, reader, problems) for group in groups]
    del held
    return Survey(Path(path), tuple(rows), tuple(problems))


def _packed(path: Path, bases: Bases) -> list[Group]:
    """The rows of a file that `lcsc bank pack` wrote, a group for each EMA rate; `bases` receives their offsets."""
    if (shape := open_pack(path)) is None:
        return []
    bases |= {(rate, row.step): row.base for rate, row in zip(shape.row_rates, shape.rows, strict=True)}
    return pack_groups(shape)


def _group_row(group: Group, reader: _Reader | None, problems: list[BankError]) -> GroupRow:
    extent = None
    try:
        shape = shape_of(group, group.checkpoints)
        extent, group = Extent.of(shape.rows, shape.layout), dataclasses.replace(group, notes=shape.said)
    except BankError as error:
        problems.append(error)
    sizes: dict[int, int] = {}
    rows = []
    for item in group.checkpoints:
        nbytes = sizes.setdefault(id(item.table), sum(source.nbytes for source in _once(item.table)))
        row = FileRow(item.step, item.path, item.format, nbytes)
        rows.append(reader.read(item, row, problems) if reader else row)
    last = group.checkpoints[-1].table
    dtypes = collections.Counter[str]()
    for source in _once(last):
        dtypes[source.dtype] += source.numel
    if extent is None:
        floats = {source for name, source in last.items() if is_combined(name, source.dtype)}
        extent = Extent(len(rows), sum(source.numel for source in floats))
    said = [(row.step, row.digest) for row in rows if row.digest is not None]
    return GroupRow(group, tuple(rows), dict(dtypes.most_common()), extent, same_bits(said))


def _once(table: Table) -> set[Source]:
    """The tensors of a table, tied ones once."""
    return set(table.values())


# -------------------------------------------------------------------------------------------------------- gaps


@dataclass(frozen=True)
class Gaps:
    """The distance between steps that at least half of the neighbours have (None: there is none), and the others."""

    usual: int | None
    broken: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        if self.usual is None:
            return "irregular" if self.broken else "-"
        if not self.broken:
            return f"every {self.usual}"
        few = ", ".join(f"{a}-{b}" for a, b in self.broken[:3])
        more = f" and {len(self.broken) - 3} more" if len(self.broken) > 3 else ""
        return f"every {self.usual}, not {few}{more}"


def gaps(steps: Sequence[int]) -> Gaps:
    """The usual distance between steps, and the neighbours that have another one."""
    pairs = list(itertools.pairwise(steps))
    if not pairs:
        return Gaps(None, ())
    counts = collections.Counter(b - a for a, b in pairs)
    usual, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    if 2 * count < len(pairs) or (len(pairs) > 1 and count == 1):
        return Gaps(None, tuple(pairs))
    return Gaps(usual, tuple((a, b) for a, b in pairs if b - a != usual))


# ----------------------------------------------------------------------------------------------------- numbers


class _Reader:
    """Reads the numbers of checkpoints, one after the other, in one buffer."""

    def __init__(self, groups: Sequence[Group], progress: Progress | None, bases: Bases) -> None:
        self.progress, self.done, self.bases = progress, 0, bases
        sizes: dict[int, int] = {}
        for group in groups:
            for item in group.checkpoints:
                sizes.setdefault(id(item.table), sum(source.nbytes for source in _once(item.table)))
        self.total = sum(sizes[id(item.table)] for group in groups for item in group.checkpoints)
        self.buffer = np.empty(max(BLOCK, CHUNK * max(ITEMSIZE.values())), np.uint8)
        self.checked: set[Path] = set()

    def read(self, item: Checkpoint, row: FileRow, problems: list[BankError]) -> FileRow:
        """The row with digest and bad tensors; what is wrong is added to `problems`."""
        try:
            self.check(item)
            sums = self.sums(item)
        except BankError as error:
            problems.append(error)
            return row
        tensors = {name: (source.dtype, source.shape, sums[source][0]) for name, source in item.table.items()}
        bad = tuple((name, sums[source][1]) for name, source in item.table.items() if sums[source][1])
        if bad:
            problems.append(nonfinite(item, bad))
        return FileRow(row.step, row.path, row.format, row.nbytes, content_digest(tensors), bad)

    def check(self, item: Checkpoint) -> None:
        """Compare the checksums of torch files; safetensors has none."""
        if item.format in ("safetensors", "coded") or item.files[0] in self.checked:
            return
        self.checked.add(item.files[0])
        if item.format == "dcp":
            from lcsc.bank.dcp_file import read_dcp

            read_dcp(item.path, crc=True)
            return
        from lcsc.bank.torch_file import read_torch

        for file in item.files:
            read_torch(file, crc=True)

    def sums(self, item: Checkpoint) -> dict[Source, tuple[list[str], int]]:
        """Chunk checksums and number of NaN and Inf of each tensor."""
        found: dict[Source, tuple[list[str], int]] = {}
        base = self.bases.get((item.rate, item.step), 0)
        fds = [os.open(file, os.O_RDONLY | os.O_NONBLOCK) for file in item.files]
        try:
            # in the order of the file, so that the disk reads on
            for source in sorted(_once(item.table), key=lambda s: (s.pieces[0].part, s.pieces[0].offset)):
                sums: list[str] = []
                count = 0
                for bits in blocks(item.files, fds, source, self.buffer, base):
                    count += count_nonfinite(bits, source.dtype)
                    sums += chunk_sums(bits)
                    self.done += bits.nbytes
                    if self.progress:
                        self.progress(self.done, self.total)
                found[source] = (sums, count)
        finally:
            for fd in fds:
                os.close(fd)
        return found


def blocks(
    files: Sequence[Path], fds: Sequence[int], source: Source, buffer: np.ndarray, base: int = 0
) -> Iterator[np.ndarray]:
    """A tensor's raw bits in C order, as flat arrays of whole content chunks (but the last); the buffer is used again.

    Args:
        files: the checkpoint's files, for the messages.
        fds: the same files, open.
        source: the tensor. One that lies in strides or in rectangles that are no runs of rows is read as a whole.
        buffer: bytes, for at least one chunk.
        base: added to every offset.
    """
    dtype = raw_dtype(source.dtype)
    runs = source.runs
    width = len(buffer) // dtype.itemsize // CHUNK * CHUNK
    whole = read_source(files, source, base).reshape(-1) if runs is None else None
    for at in range(0, source.numel, width):
        stop = min(at + width, source.numel)
        if whole is not None:
            yield whole[at:stop]
        else:
            bits = buffer[: (stop - at) * dtype.itemsize].view(dtype)
            _fill(files, fds, runs or [], bits, at, base)
            yield bits


def _fill(
    files: Sequence[Path], fds: Sequence[int], runs: Sequence[tuple[int, Piece]], bits: np.ndarray, at: int, base: int
) -> None:
    """Fill `bits` with the elements from `at` on."""
    for start, piece in runs:
        a, b = max(at, start), min(at + bits.size, start + math.prod(piece.shape))
        if a < b:
            offset = base + piece.offset + (a - start) * bits.itemsize
            pread_into(fds[piece.part], bits[a - at : b - at], offset, files[piece.part])


def count_nonfinite(bits: np.ndarray, dtype: str) -> int:
    """How many of some raw numbers are NaN or Inf; integers never are."""
    if mask := _EXPONENT.get(dtype):
        raw = bits.view(np.uint8 if ITEMSIZE[dtype] == 1 else np.uint16)
        return int(np.count_nonzero(np.bitwise_and(raw, mask) == mask))
    if not dtype.startswith(("float", "complex")):
        return 0
    return int(bits.size - np.count_nonzero(np.isfinite(bits)))


def nonfinite(item: Checkpoint, bad: Sequence[tuple[str, int]]) -> NonFiniteError:
    """The error for a checkpoint with NaN or Inf in the tensors `bad`."""
    name, count = bad[0]
    file = item.files[item.table[name].pieces[0].part]
    return NonFiniteError(
        f"`{shown(file)}` holds {count} NaN or Inf in `{shown(name)}`, {sum(n for _, n in bad)} in all its tensors. "
        "A bank holds finite numbers only; leave the step out with `bank.start`, `bank.stop` or `bank.every`."
    )

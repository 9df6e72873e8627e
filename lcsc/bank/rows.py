"""A bank's rows as byte ranges: which bytes of which file make up columns [start, stop) of row k."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.content import CHUNK, sum_text
from lcsc.bank.crc import Crcs, Stored
from lcsc.bank.extents import ITEMSIZE, Table, pread_into, raw_dtype, read_source
from lcsc.bank.layout import Layout

#: columns of one block: whole content chunks, and small enough that a block of eight rows stays in the cache
BLOCK = CHUNK


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint as the reader sees it: files, tensors, and a number of bytes to add to every offset.

    `base` lets all rows of a packed bank share one table. `stored` are the checksums that torch's archives have.
    """

    step: int
    path: Path
    files: tuple[Path, ...]
    table: Table
    base: int = 0
    stored: Stored | None = field(default=None, compare=False, repr=False)


def origin(bank: Path, row: Row, content: str) -> dict[str, Any]:
    """Where a row of the bank at `bank` comes from: step, files below it with their bytes, and its content's digest."""
    root = bank if bank.is_dir() else bank.parent
    files = {str(file.relative_to(root)): file.stat().st_size for file in row.files}
    return {"step": row.step, "files": files, "content": content}


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [a, b) of one tensor, in C order."""

    name: str
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class Block:
    """Columns [start, stop) of the bank: spans of tensors that lie next to each other in the layout."""

    start: int
    stop: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """`nbytes` bytes at `offset` of file `part`, to byte `at` of the row's buffer."""

    part: int
    offset: int
    nbytes: int
    at: int


def cut(layout: Layout, tables: Sequence[Table], columns: int = BLOCK, cuts: Collection[int] = ()) -> list[Block]:
    """The layout in blocks of at most `columns` columns; within a block no row changes its dtype.

    `cuts` are further positions at which a block must begin, each the first of a tensor.

    Blocks begin and end at whole content chunks, so that a chunk's checksum needs one block only. A block is longer
    than `columns` only where a tensor lies in strides or in rectangles that are no runs of it.
    """
    blocks: list[Block] = []
    spans: list[Span] = []
    start = size = 0
    kind: tuple[str, ...] = ()

    def close(position: int) -> None:
        nonlocal spans, start, size
        if spans:
            blocks.append(Block(start, position, tuple(spans)))
        spans, start, size = [], position, 0

    for entry in layout.entries:
        numel = entry.stop - entry.start
        dtypes = tuple(table[entry.name].dtype for table in tables)
        # a tensor that must be assembled is read once, as a whole
        width = max(numel, 1) if any(table[entry.name].runs is None for table in tables) else min(CHUNK, columns)
        for a in range(0, numel, width):
            b = min(a + width, numel)
            if size + b - a > columns or dtypes != kind or (a == 0 and entry.start in cuts):
                close(entry.start + a)
            kind = dtypes
            spans.append(Span(entry.name, a, b))
            size += b - a
    close(layout.num_parameters)
    return blocks


def long_blocks(layout: Layout, tables: Sequence[Table]) -> tuple[int, ...]:
    """The columns of those blocks of `cut(layout, tables)` that are longer than BLOCK, without cutting."""
    sizes = ((entry.name, entry.stop - entry.start) for entry in layout.entries)
    return tuple(numel for name, numel in sizes if numel > BLOCK and any(table[name].runs is None for table in tables))


def reads(block: Block, table: Table) -> list[Read] | None:
    """The reads that fill one row of a block, neighbours joined; None when a tensor needs assembling."""
    found: list[Read] = []
    at = 0
    for span in block.spans:
        source = table[span.name]
        if (runs := source.runs) is None:
            return None
        size = ITEMSIZE[source.dtype]
        for first, piece in runs:
            a, b = max(span.a, first), min(span.b, first + math.prod(piece.shape))
            if a >= b:
                continue
            offset, nbytes = piece.offset + (a - first) * size, (b - a) * size
            last = found[-1] if found else None
            if last and last.part == piece.part and last.offset + last.nbytes == offset:
                found[-1] = Read(last.part, last.offset, last.nbytes + nbytes, last.at)
            else:
                found.append(Read(piece.part, offset, nbytes, at))
            at += nbytes
    return found


class Files:
    """Open files by path. All stay open while the process may hold that many; otherwise each is opened for its read."""

    def __init__(self, rows: Sequence[Row]) -> None:
        paths = {path for row in rows for path in row.files}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        keep = len(paths) <= max(0, limit - 128) // 2
        self._open = {path: os.open(path, os.O_RDONLY) for path in paths} if keep else {}

    @contextlib.contextmanager
    def fd(self, path: Path) -> Iterator[int]:
        """A descriptor to read `path` with."""
        if self._open:
            yield self._open[path]
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close what is open."""
        for fd in self._open.values():
            os.close(fd)
        self._open = {}


def read_row(files: Files, row: Row, block: Block, plan: list[Read] | None, out_C: np.ndarray) -> None:
    """Fill `out_C`, raw bits, shape (stop - start,), with one row of a block.

    Raises:
        BankError: a file became shorter since it was scanned.
    """
    if plan is None:
        at = 0
        for span in block.spans:
            source = row.table[span.name]
            part_C = out_C[at : at + span.b - span.a]
            if part_C.size == source.numel:  # no second copy of a long tensor
                read_source(row.files, source, row.base, part_C.reshape(source.shape))
            else:
                part_C[...] = read_source(row.files, source, row.base).reshape(-1)[span.a : span.b]
            at += span.b - span.a
        return
    view = out_C.view(np.uint8)
    for read in plan:
        path = row.files[read.part]
        with files.fd(path) as fd:
            pread_into(fd, view[read.at : read.at + read.nbytes], read.offset + row.base, path)


def will_need(files: Files, row: Row, plan: list[Read] | None) -> None:
    """Ask the system to have these bytes in memory soon."""
    for read in plan or ():
        with files.fd(row.files[read.part]) as fd:
            os.posix_fadvise(fd, read.offset + row.base, read.nbytes, os.POSIX_FADV_WILLNEED)


class Checksums:
    """The sums of every content chunk of every row, collected in any order; see `lcsc.bank.content`.

    Those that torch's archives have are collected too, until a row was compared with them; see `lcsc.bank.crc`.
    """

    def __init__(self, layout: Layout, rows: Sequence[Row]) -> None:
        self._first: dict[str, int] = {}
        count = 0
        for entry in layout.entries:
            self._first[entry.name] = count
            count += -(-(entry.stop - entry.start) // CHUNK)
        self._stop = dict(zip(self._first, [*list(self._first.values())[1:], count], strict=True))
        self._sums = np.zeros((len(rows), count, 2), np.uint64)
        self._seen = np.zeros((len(rows), count), bool)
        self._crcs = Crcs(rows, self._first, count)

    @property
    def nbytes(self) -> int:
        """Bytes held, `memory.PER_CHUNK` for each chunk of each row."""
        return self._sums.nbytes + self._seen.nbytes

    def add(self, k: int, block: Block, out_C: np.ndarray) -> None:
        """Take the sums of one row of a block, raw bits; the block must hold whole chunks."""
        from lcsc.kernels.checksum import checksum

        at = 0
        for span in block.spans:
            for a in range(span.a, span.b, CHUNK):
                stop = at + min(CHUNK, span.b - a)
                where = k, self._first[span.name] + a // CHUNK
                if self._crcs.wanted[k]:
                    self._crcs.add(*where, out_C[at:stop])
                self._sums[where], self._seen[where] = checksum(out_C[at:stop]), True
                at = stop

    def compare(self, rows: Sequence[int], threads: int = 1) -> None:
        """Compare rows with the checksums in their files, each row once.

        Raises:
            BankError: a tensor's bytes are not those that were written; file and tensor are named.
        """
        self._crcs.compare(rows, self._seen, threads)

    def compare_some(self, k: int, names: Collection[str]) -> None:
        """As `compare`, of some tensors of row k alone, which no pass has read."""
        self._crcs.compare_some(k, names)

    def of(self, k: int) -> dict[str, list[str]] | None:
        """Sums of row k by tensor, None unless every chunk was seen."""
        if not self._seen[k].all():
            return None
        texts = [sum_text(a, b) for a, b in self._sums[k].tolist()]
        return {name: texts[first : self._stop[name]] for name, first in self._first.items()}


def to_float32(raw: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """Raw bits as float32; exact but for float64, which is rounded."""
    if dtype == "bfloat16":
        wide = raw.astype(np.uint32) << np.uint32(16)
        value = wide.view(np.float32)
    else:
        with np.errstate(over="ignore"):  # an overflow becomes Inf and is refused by the caller
            value = raw.astype(np.float32)
    if out is None:
        return value
    out[...] = value
    return out


def row_dtype(block: Block, table: Table) -> str:
    """The dtype of one row of a block."""
    return table[block.spans[0].name].dtype if block.spans else "float32"


def empty_rows(count: int, columns: int, dtype: str) -> np.ndarray:
    """A buffer of raw bits, shape (count, columns)."""
    return np.empty((count, columns), raw_dtype(dtype))

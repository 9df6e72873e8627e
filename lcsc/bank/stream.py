"""One pass over a bank that need not fit in memory: every byte is read once for all outputs.

Blocks of columns go through a small pool of workers; each reads its block of every checkpoint in groups of rows,
adds them up with the kernels' arithmetic (so that the bits equal those of a resident bank) and hands the result over.
"""

from __future__ import annotations

import bisect
import itertools
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lcsc.bank.extents import ITEMSIZE, raw_dtype, read_source
from lcsc.bank.layout import Layout
from lcsc.bank.rows import (
    BLOCK,
    Block,
    Checksums,
    Files,
    Read,
    Row,
    cut,
    empty_rows,
    read_row,
    reads,
    row_dtype,
    to_float32,
    will_need,
)
from lcsc.core.errors import EvaluationError, NonFiniteError

#: rows of a block that are read before they are added up
GROUP = 8
#: bytes that the system is asked to read ahead: enough to keep a disk busy while the kernels are loaded
AHEAD_BYTES = 2**28

#: bytes read so far, bytes in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pass:
    """What one pass over the files does.

    Args:
        rows: checkpoints in row order.
        layout: columns.
        coef_MGK: float64, already rounded (`kernels.round_coef`): for each output and layer group its coefficients.
        starts: first columns of the segments, each the first of a tensor, and, last, the number of columns.
        groups: layer group of each segment.
        checksums: collects the content sums of the rows that are read; None when nobody asks.
    """

    rows: Sequence[Row]
    layout: Layout
    coef_MGK: np.ndarray
    starts: Sequence[int] = (0,)
    groups: Sequence[int] = (0,)
    checksums: Checksums | None = None

    @property
    def used(self) -> list[int]:
        """Rows that some output needs; the others are not read."""
        return [int(k) for k in np.flatnonzero(np.any(self.coef_MGK != 0, axis=(0, 1)))]

    def coef_MK(self, block: Block) -> np.ndarray:
        """The coefficients of a block's layer group."""
        return self.coef_MGK[:, self.groups[bisect.bisect_right(self.starts, block.start) - 1]]

    @property
    def nbytes(self) -> int:
        """Bytes that will be read."""
        size = {
            id(table): sum((e.stop - e.start) * ITEMSIZE[table[e.name].dtype] for e in self.layout.entries)
            for table in {id(self.rows[k].table): self.rows[k].table for k in self.used}.values()
        }
        return sum(size[id(self.rows[k].table)] for k in self.used)


def default_threads() -> int:
    """Threads for reading and adding: the cores this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def run_pass(
    work: Pass, *, threads: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(start, out_MC)`: float32 columns [start, start + C) of all outputs, each column exactly once.

    The array belongs to the caller until the next step of the iteration. Blocks come in the order of the layout.

    Raises:
        BankError: a file changed while it was read.
        NonFiniteError: a checkpoint holds NaN or Inf; file and tensor are named.
        EvaluationError: the coefficients are too large for float32.
    """
    threads = threads or default_threads()
    used, files = work.used, Files([work.rows[k] for k in work.used])
    tables = list({id(work.rows[k].table): work.rows[k].table for k in used}.values())
    blocks = cut(work.layout, tables, cuts=set(work.starts))
    buffers: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
    for _ in range(threads + 1):
        buffers.put(_Buffers(len(work.coef_MGK)))
    total, done = work.nbytes, 0
    depth = max(1, AHEAD_BYTES * len(blocks) // max(total, 1))
    pending: list[tuple[Block, Future[_Buffers]]] = []
    ahead = iter(blocks)
    with ThreadPoolExecutor(threads + 1, thread_name_prefix="lcsc-stream") as pool:
        try:
            hints = [pool.submit(_hint, work, files, used, block) for block in itertools.islice(ahead, depth)]
            todo = iter(blocks)
            while True:
                while len(pending) < threads and (block := next(todo, None)) is not None:
                    pending.append((block, pool.submit(_block, work, files, used, block, buffers)))
                if not pending:
                    break
                block, future = pending.pop(0)
                buffer = future.result()
                if (coming := next(ahead, None)) is not None:
                    hints = [hint for hint in hints if not hint.done()]
                    hints.append(pool.submit(_hint, work, files, used, coming))
                yield block.start, buffer.out_MC[:, : block.stop - block.start]
                buffers.put(buffer)
                done += sum((block.stop - block.start) * ITEMSIZE[row_dtype(block, work.rows[k].table)] for k in used)
                if progress:
                    progress(done, total)
            if work.checksums:
                work.checksums.compare(used, threads)
        finally:
            for _, future in pending:
                future.cancel()
            pool.shutdown(wait=True, cancel_futures=True)
            files.close()


class _Buffers:
    """One worker's memory; grows to the longest block."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.acc_MC = np.empty((outputs, 0))
        self.out_MC = np.empty((outputs, 0), np.float32)
        self.raw = np.empty(0, np.uint8)

    def grow(self, columns: int) -> None:
        if self.acc_MC.shape[1] < columns:
            self.acc_MC = np.empty((self.outputs, columns))
            self.out_MC = np.empty((self.outputs, columns), np.float32)

    def rows(self, count: int, columns: int, dtype: str) -> np.ndarray:
        nbytes = count * columns * ITEMSIZE[dtype]
        if len(self.raw) < nbytes:
            self.raw = np.empty(nbytes, np.uint8)
        return self.raw[:nbytes].view(raw_dtype(dtype)).reshape(count, columns)


def _plans(work: Pass, rows: Sequence[int], block: Block) -> dict[int, list[Read] | None]:
    tables = {id(work.rows[k].table): work.rows[k].table for k in rows}
    return {key: reads(block, table) for key, table in tables.items()}


def _hint(work: Pass, files: Files, used: Sequence[int], block: Block) -> None:
    plans = _plans(work, used, block)
    for k in used:
        will_need(files, work.rows[k], plans[id(work.rows[k].table)])


def _groups(work: Pass, used: Sequence[int], block: Block) -> Iterator[tuple[str, list[int]]]:
    """Consecutive rows of one dtype, at most GROUP at a time, and fewer of a long block."""
    most = max(1, GROUP * BLOCK // max(block.stop - block.start, BLOCK))
    group: list[int] = []
    kind = ""
    for k in used:
        dtype = row_dtype(block, work.rows[k].table)
        if group and (dtype != kind or len(group) == most):
            yield kind, group
            group = []
        kind = dtype
        group.append(k)
    if group:
        yield kind, group


def _block(
    work: Pass, files: Files, used: Sequence[int], block: Block, buffers: queue.SimpleQueue[_Buffers]
) -> _Buffers:
    from lcsc.kernels._numba import accumulate, finish

    buffer, columns = buffers.get(), block.stop - block.start
    buffer.grow(columns)
    acc_MC, out_MC = buffer.acc_MC[:, :columns], buffer.out_MC[:, :columns]
    acc_MC[...] = -0.0  # as the kernels' definition starts
    plans, coef_MK = _plans(work, used, block), work.coef_MK(block)
    for dtype, group in _groups(work, used, block):
        raw_RC = buffer.rows(len(group), columns, dtype)
        for raw_C, k in zip(raw_RC, group, strict=True):
            row = work.rows[k]
            read_row(files, row, block, plans[id(row.table)], raw_C)
            if work.checksums:
                work.checksums.add(k, block, raw_C)
        if dtype == "float64":  # as resident rows are, so that the sums are theirs to the bit
            raw_RC, dtype = to_float32(raw_RC, dtype), "float32"
        accumulate(acc_MC, np.ascontiguousarray(coef_MK[:, group]), raw_RC, dtype)
    if not finish(acc_MC, out_MC):
        _raise(work, files, used, block, out_MC)
    return buffer


def _raise(work: Pass, files: Files, used: Sequence[int], block: Block, out_MC: np.ndarray) -> None:
    """Say which checkpoint holds NaN or Inf, or that the sum overflowed."""
    plans = _plans(work, used, block)
    for k in used:
        row, dtype = work.rows[k], row_dtype(block, work.rows[k].table)
        raw_C = empty_rows(1, block.stop - block.start, dtype)[0]
        read_row(files, row, block, plans[id(row.table)], raw_C)
        raise_nonfinite(row, block, to_float32(raw_C, dtype))
    m = int(np.flatnonzero(~np.isfinite(out_MC).all(axis=1))[0])
    raise EvaluationError(
        f"output {m} overflows float32 near `{block.spans[0].name}`: its coefficients reach "
        f"{np.abs(work.coef_MGK[m]).max():.3g}. Use smaller coefficients."
    )


def raise_nonfinite(row: Row, block: Block, value_C: np.ndarray) -> None:
    """Raise NonFiniteError naming file, tensor and count when a row of a block, float32, is not finite."""
    at = 0
    for span in block.spans:
        part = value_C[at : at + span.b - span.a]
        at += span.b - span.a
        if not np.isfinite(part).all():
            source = row.table[span.name]
            whole = to_float32(read_source(row.files, source, row.base), source.dtype)
            bad, file = int((~np.isfinite(whole)).sum()), row.files[source.pieces[0].part]
            raise NonFiniteError(
                f"`{file}` holds {bad} NaN or Inf in `{span.name}`. A bank holds finite numbers only; leave step "
                f"{row.step} out with `bank.start`, `bank.stop` or `bank.every`."
            )

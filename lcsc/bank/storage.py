"""Three ways to hold a bank's rows: all of them, one and the differences to it, or none (streamed from the files).

All three give candidates by the same arithmetic (`lcsc.kernels`); resident and streamed give the same bits.
K = checkpoints, P = columns, B = candidates, G = layer groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lcsc.bank.extents import Table
from lcsc.bank.layout import Layout
from lcsc.bank.rows import (
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
)
from lcsc.bank.stream import Pass, Progress, default_threads, raise_nonfinite, run_pass
from lcsc.core.errors import BankError, NonFiniteError
from lcsc.kernels import Groups, combine, project

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: columns that a resident bank hands out at a time in `blocks` and `stream`
COLUMNS = 2**18
#: on a GPU rows begin at multiples of this many numbers, so that loads take 128 bits
PADDING = 64


class Storage(Protocol):
    """What a bank asks of its storage."""

    def combine(self, coef: Tensor, groups: Groups | None, out: Tensor | None) -> Tensor:
        """Candidates, float32, shape (P,) or (B, P)."""
        ...

    def project(self, grad_P: Tensor, groups: Groups | None) -> Tensor:
        """Gradient with respect to the coefficients, float32, shape (K,) or (G, K)."""
        ...

    def blocks(self, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
        """`(columns, W_KC)` in order, float32."""
        ...

    def stream(self, coef_MK: np.ndarray, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
        """`(start, out_MC)`, float32, each column once."""
        ...


class Resident:
    """All rows in memory, shape (K, P), optionally as differences to one of them.

    Args:
        W_KP: rows, or differences to `anchor_P`; float32, bfloat16 or float16.
        anchor_P: float32, shape (P,); None when the rows are the checkpoints themselves.
    """

    def __init__(self, W_KP: Tensor, anchor_P: Tensor | None = None) -> None:
        self.W_KP, self.anchor_P = W_KP, anchor_P

    def combine(self, coef: Tensor, groups: Groups | None, out: Tensor | None) -> Tensor:
        """See `lcsc.kernels.combine`; a buffer on another device receives a copy."""
        if out is None or out.device == self.W_KP.device:
            return combine(coef, self.W_KP, groups=groups, anchor_P=self.anchor_P, out_BP=out)
        return out.copy_(combine(coef, self.W_KP, groups=groups, anchor_P=self.anchor_P))

    def project(self, grad_P: Tensor, groups: Groups | None) -> Tensor:
        """See `lcsc.kernels.project`."""
        return project(grad_P, self.W_KP, groups=groups, anchor_P=self.anchor_P)

    def blocks(self, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Columns of the rows themselves (an anchor is added back)."""
        for start in range(0, self.W_KP.shape[1], columns):
            part = slice(start, min(start + columns, self.W_KP.shape[1]))
            W_KC = self.W_KP[:, part].float()
            yield part, (W_KC if self.anchor_P is None else W_KC + self.anchor_P[part]).cpu().numpy()

    def stream(self, coef_MK: np.ndarray, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
        """Combine column by column from memory."""
        import torch

        coef, P = torch.from_numpy(coef_MK), self.W_KP.shape[1]
        out = torch.empty(len(coef_MK), min(COLUMNS, P), device=self.W_KP.device)
        for start in range(0, P, COLUMNS):
            stop = min(start + COLUMNS, P)
            anchor = None if self.anchor_P is None else self.anchor_P[start:stop]
            view = out[:, : stop - start] if len(coef_MK) > 1 else out[:1, : stop - start]
            combine(coef, self.W_KP[:, start:stop], anchor_P=anchor, out_BP=view)
            yield start, view.cpu().numpy()
            if progress:
                progress(stop * self.W_KP.shape[0] * self.W_KP.itemsize, self.W_KP.nbytes)


class OnCpu(Resident):
    """Rows on another device, combined on the CPU some columns at a time: the bits are those of a bank on the CPU."""

    def combine(self, coef: Tensor, groups: Groups | None, out: Tensor | None) -> Tensor:
        """See `lcsc.kernels.combine`; a buffer on another device receives a copy."""
        import torch

        P = self.W_KP.shape[1]
        starts, ids = ((0, P), (0,)) if groups is None else (groups.starts, groups.groups)
        home = torch.empty(*coef.shape[: coef.ndim - (1 if groups is None else 2)], P)
        for start, stop, group in zip(starts, starts[1:], ids, strict=False):
            own = coef if groups is None else coef[..., group, :]
            for a in range(start, stop, COLUMNS):
                part = slice(a, min(a + COLUMNS, stop))
                anchor = None if self.anchor_P is None else self.anchor_P[part].cpu()
                combine(own, self.W_KP[:, part].cpu(), anchor_P=anchor, out_BP=home[..., part])
        return home if out is None else out.copy_(home)


class Streamed:
    """No rows in memory; every use reads the files once, block by block."""

    def __init__(self, rows: Sequence[Row], layout: Layout, checksums: Checksums) -> None:
        self.rows, self.layout, self.checksums = rows, layout, checksums

    def combine(self, coef: Tensor, groups: Groups | None, out: Tensor | None) -> Tensor:
        """All candidates of a call share one pass over the files."""
        import torch

        from lcsc.kernels import round_coef

        lead = coef.shape[: coef.ndim - (1 if groups is None else 2)]
        num_groups = 1 if groups is None else groups.num_groups
        coef_MGK = coef.detach().double().cpu().numpy().reshape(-1, num_groups, len(self.rows))
        shape = (*lead, self.layout.num_parameters)
        home = torch.empty(shape) if out is None or out.device.type != "cpu" else out
        out_MP = home.view(-1, shape[-1]).numpy()
        starts, ids = ((0, self.layout.num_parameters), (0,)) if groups is None else (groups.starts, groups.groups)
        work = Pass(self.rows, self.layout, round_coef(coef_MGK), starts, ids, self.checksums)
        for start, block_MC in run_pass(work):
            out_MP[:, start : start + block_MC.shape[1]] = block_MC
        return home if out is None or out is home else out.copy_(home)

    def project(self, grad_P: Tensor, groups: Groups | None) -> Tensor:
        """Sums block by block in float64; one pass over the files."""
        import torch

        grad, K = grad_P.detach().double().cpu().numpy(), len(self.rows)
        starts, ids = ((0, self.layout.num_parameters), (0,)) if groups is None else (groups.starts, groups.groups)
        total_GK = np.zeros((1 if groups is None else groups.num_groups, K))
        blocks = cut(self.layout, tables_of(self.rows), cuts=set(starts))
        for block, k, row_C in each_row(self.rows, blocks, self.checksums):
            segment = int(np.searchsorted(starts, block.start, side="right")) - 1
            total_GK[ids[segment], k] += row_C.astype(np.float64) @ grad[block.start : block.stop]
        grad_GK = torch.from_numpy(total_GK.astype(np.float32))
        return grad_GK[0] if groups is None else grad_GK

    def blocks(self, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Columns in order; one pass over the files."""
        blocks = cut(self.layout, tables_of(self.rows), columns)
        W_KC = np.empty((len(self.rows), max(b.stop - b.start for b in blocks)), np.float32)
        for block, k, row_C in each_row(self.rows, blocks, None):
            W_KC[k, : row_C.size] = row_C
            if k == len(self.rows) - 1:
                yield slice(block.start, block.stop), W_KC[:, : row_C.size]

    def stream(self, coef_MK: np.ndarray, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
        """See `lcsc.bank.stream.run_pass`."""
        return run_pass(Pass(self.rows, self.layout, coef_MK[:, None], checksums=self.checksums), progress=progress)


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """The different tables of some rows; usually all rows share one."""
    return list({id(row.table): row.table for row in rows}.values())


def each_row(
    rows: Sequence[Row], blocks: Sequence[Block], checksums: Checksums | None
) -> Iterator[tuple[Block, int, np.ndarray]]:
    """Every row of every block in order, as `(block, k, row_C)`, float32 and finite; the array is used again."""
    files, out = Files(rows), np.empty(max((b.stop - b.start for b in blocks), default=0), np.float32)
    try:
        for block in blocks:
            plans = {id(table): reads(block, table) for table in tables_of(rows)}
            for k, row in enumerate(rows):
                row_C = out[: block.stop - block.start]
                _fill(files, row, block, plans[id(row.table)], row_C, checksums, k)
                yield block, k, row_C
        if checksums:
            checksums.compare(range(len(rows)), default_threads())
    finally:
        files.close()


def _fill(
    files: Files,
    row: Row,
    block: Block,
    plan: list[Read] | None,
    out_C: np.ndarray,
    checksums: Checksums | None,
    k: int,
) -> None:
    """Read one row of a block as float32, checked to be finite."""
    dtype = row_dtype(block, row.table)
    raw_C = out_C if dtype == "float32" else empty_rows(1, out_C.size, dtype)[0]
    read_row(files, row, block, plan, raw_C)
    if checksums:
        checksums.add(k, block, raw_C)
    if raw_C is not out_C:
        to_float32(raw_C, dtype, out_C)
    if not np.isfinite(out_C).all():
        raise_nonfinite(row, block, out_C)


def as_tensor(raw: np.ndarray, dtype: str) -> Tensor:
    """Raw bits as a tensor of a torch dtype; the numbers are not copied."""
    import torch

    if dtype.startswith(("bfloat16", "float8")):
        signed = torch.from_numpy(raw.view(np.int16 if raw.itemsize == 2 else np.int8))
        return signed.view(getattr(torch, dtype))
    return torch.from_numpy(np.ascontiguousarray(raw)).reshape(raw.shape)


def from_float32(value: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as raw bits of another float dtype, rounded to nearest even."""
    import torch

    if dtype == "float32":
        return value
    return torch.from_numpy(value).to(getattr(torch, dtype)).view(torch.int16).numpy()


def _room(
    num_rows: int, num_parameters: int, dtype: torch.dtype, device: str, with_anchor: bool
) -> tuple[Tensor, Tensor | None]:
    """Memory for rows, shape (K, P), and for an anchor; raises BankError where there is not enough."""
    import torch

    stride = num_parameters if device == "cpu" else -(-num_parameters // PADDING) * PADDING
    try:
        W_KP = torch.empty(num_rows, stride, dtype=dtype, device=device)[:, :num_parameters]
        return W_KP, torch.empty(num_parameters, device=device) if with_anchor else None
    except RuntimeError as error:  # torch's out of memory
        raise BankError(
            f"{num_rows} checkpoints of {num_parameters:,} parameters do not fit in the memory of `{device}` as "
            f"{dtype}. Use bank.storage=delta or bank.storage=streamed, or fewer checkpoints."
        ) from error


def load(
    rows: Sequence[Row],
    layout: Layout,
    checksums: Checksums,
    dtype: torch.dtype,
    anchor: int | None = None,
    device: str = "cpu",
) -> Resident:
    """Read all rows into memory.

    Args:
        rows: checkpoints.
        layout: columns.
        checksums: receives the content sums of every row.
        dtype: how the rows (or differences) are stored.
        anchor: row whose float32 numbers are kept; the others are stored as differences to it. None stores the rows.
        device: torch device of the rows; on a GPU they begin at multiples of `PADDING` numbers.

    Raises:
        BankError: a file changed while it was read, or there is not enough memory.
        NonFiniteError: a checkpoint holds NaN or Inf, or a number that `dtype` cannot hold.
    """
    import torch

    W_KP, anchor_P = _room(len(rows), layout.num_parameters, dtype, device, anchor is not None)
    files = Files(rows)

    def work(block: Block) -> None:
        part = slice(block.start, block.stop)
        plans = {id(table): reads(block, table) for table in tables_of(rows)}
        row_C, base_C = torch.empty(block.stop - block.start), None
        if anchor_P is not None and anchor is not None:
            row, base_C = rows[anchor], torch.empty_like(row_C)
            _fill(files, row, block, plans[id(row.table)], base_C.numpy(), None, anchor)
            anchor_P[part] = base_C
        for k, row in enumerate(rows):
            direct = dtype == torch.float32 and anchor_P is None and device == "cpu"
            into = W_KP[k, part] if direct else row_C
            _fill(files, row, block, plans[id(row.table)], into.numpy(), checksums, k)
            if not direct:
                W_KP[k, part] = row_C if base_C is None else row_C - base_C
                if dtype == torch.float16 and not torch.isfinite(W_KP[k, part]).all():
                    raise NonFiniteError(
                        f"`{row.path}` holds numbers beyond 65504, the largest of float16, near "
                        f"`{block.spans[0].name}`. Use bank.dtype=float32 or bank.dtype=bfloat16."
                    )

    try:
        with ThreadPoolExecutor(default_threads(), thread_name_prefix="lcsc-load") as pool:
            for _ in pool.map(work, cut(layout, tables_of(rows))):
                pass
        checksums.compare(range(len(rows)), default_threads())
    finally:
        files.close()
    return Resident(W_KP, anchor_P)

"""The kernels for CUDA devices. One pass over the bank serves up to 16 candidates; `_reference` is the definition.

Sums are taken in float64 where the device adds float64 at half the speed of float32 or more (P100, V100, A100, H100,
B200): there every product is exact, reading the bank takes longer than the sums, and the results are the bits of the
reference and of the CPU. Elsewhere they are taken in float32, in the same order, with coefficients rounded to float32.
The tolerance, with u = 2^-24, n the number of rows (one more with an anchor) and sums over the terms of the element:

    combine  float64   none: the bits of the reference
    combine  float32   |error| <= (n + 2) u sum_k |c_k w_kp| + (n + 2) 2^-149       while sum_k |c_k w_kp| < 2^127
    project  float64   |error| <= u |result| + (P + 2) 2^-53 sum_p |w_kp g_p| + 2^-149
    project  float32   |error| <= (DOT_TERMS + 2) u sum_p |w_kp g_p| + P 2^-149     and as above

A candidate with a coefficient that float32 cannot hold (below 2^-126 or above 2^127) always takes float64. Its bits do
not depend on the others of its call, nor on how segments cut the columns: each element is one sum in row order. A
one-hot row is a copy: 1 * w is exact, and so is adding it to the -0.0 that sums start from.

Columns are cut into blocks at multiples of the block length, so that the compiler knows how loads are aligned; the
pieces at the ends of segments run in a second launch with masks. For rows at 16-byte boundaries (a row stride that is
a multiple of 16 numbers) loads take 128 bits; otherwise they take one number per thread, side by side.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lcsc.core.errors import MissingExtraError
from lcsc.kernels._reference import round_coef, sum_coef

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtraError(
        "combining on a CUDA device needs the package `triton`, which is not installed; "
        "`pip install triton`, or keep the bank in CPU memory."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

    from lcsc.kernels.combine import Groups

BATCH = 16  #: candidates per pass: 4 float64 sums of each fit a thread's registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  #: compute capabilities with float64 at half speed
DOT_BLOCK, DOT_WARPS = 8192, 8
DOT_TERMS = DOT_BLOCK // (32 * DOT_WARPS) + 8  #: additions that an element of a block's dot product goes through


@triton.jit(do_not_specialize=["B", "N"])
def _combine_kernel(
    blocks: tl.tensor,  # int32 (num_blocks, 4): number of the block, first column in it, end column in it, group
    counts: tl.tensor,  # int32 (G,): rows in use
    rows: tl.tensor,  # int32 (G, N): which
    coefs: tl.tensor,  # ACC (G, N, BB); -0.0 behind the last row in use
    W: tl.tensor,
    stride: tl.tensor,
    anchor: tl.tensor,
    anchor_coefs: tl.tensor,  # ACC (G, BB)
    out: tl.tensor,
    out_stride: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    bad: tl.tensor,  # int32 (1,): set to 1 where a result is not finite
    BB: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    ANCHOR: tl.constexpr,
    ZEROS: tl.constexpr,  # some coefficient of a row in use is zero
    EDGE: tl.constexpr,  # pieces of blocks
) -> None:
    entry = blocks + tl.program_id(0).to(tl.int64) * 4
    within = tl.arange(0, BLOCK)[None, :]
    column = tl.load(entry).to(tl.int64) * BLOCK + within
    group = tl.load(entry + 3)
    candidate = tl.arange(0, BB)[:, None]
    inside = within >= 0
    if EDGE:
        inside = (within >= tl.load(entry + 1)) & (within < tl.load(entry + 2))
    count = tl.load(counts + group)
    rows += group * N
    coefs += group * N * BB
    acc = tl.full((BB, BLOCK), 0.0, ACC) * -1.0  # -0.0, which Triton before 3.9 takes for 0.0 in `full`
    if ANCHOR:
        share = tl.load(anchor_coefs + group * BB + candidate)
        base = tl.load(anchor + column, mask=inside, other=0.0)
        acc = tl.where(share != 0, acc + share * base.to(ACC), acc)
    for first in range(0, count, UNROLL):
        for u in tl.static_range(UNROLL):
            # behind the last row in use -0.0 * 0.0 is added, which changes nothing, and nothing is read
            row = tl.load(rows + first + u).to(tl.int64) * stride
            w = tl.load(
                W + row + column,
                mask=inside & (within * 0 + (first + u) < count),
                other=0.0,
                eviction_policy="evict_first",
            )
            coef = tl.load(coefs + (first + u) * BB + candidate)
            term = acc + coef * w.to(tl.float32).to(ACC)
            acc = tl.where(coef != 0, term, acc) if ZEROS else term
    result = acc.to(tl.float32)
    kept = (candidate < B) & inside
    tl.store(out + candidate.to(tl.int64) * out_stride + column, result, mask=kept)
    wrong = (tl.abs(result) < float("inf")) == 0  # true for NaN too
    tl.store(bad + (candidate + within) * 0, tl.full((BB, BLOCK), 1, tl.int32), mask=kept & wrong)


@triton.jit(do_not_specialize=["K", "P", "first_block"])
def _dot_kernel(
    W: tl.tensor,
    stride: tl.tensor,
    grad: tl.tensor,
    sums: tl.tensor,  # float64 (num_blocks, K)
    K: tl.tensor,
    P: tl.tensor,
    first_block: tl.tensor,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
) -> None:
    block = first_block + tl.program_id(0).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < P
    g = (tl.load(grad + column, mask=inside, other=0.0) if EDGE else tl.load(grad + column)).to(ACC)
    sums += block * K
    for k in range(K):
        where = W + tl.cast(k, tl.int64) * stride + column
        if EDGE:
            w = tl.load(where, mask=inside, other=0.0, eviction_policy="evict_first")
        else:
            w = tl.load(where, eviction_policy="evict_first")
        tl.store(sums + k, tl.sum(w.to(tl.float32).to(ACC) * g).to(tl.float64))


def plan(BB: int, itemsize: int) -> tuple[int, int, int]:
    """Columns per program, warps and rows in flight for a padded batch: 64 to 128 bytes in flight per thread."""
    columns = 1024 if BB <= 4 else 512
    return columns, 4, 4 if itemsize == 4 or BB > 4 else 8


@functools.lru_cache(maxsize=8)
def _table(
    starts: tuple[int, ...], groups: tuple[int, ...], block: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Whole blocks and pieces of blocks, int32 (num, 4) on the device: number, first and end column in it, group."""
    parts = []
    for start, stop, group in zip(starts, starts[1:], groups, strict=False):
        number = np.arange(start // block, -(-stop // block) if stop > start else start // block)
        lo, hi = np.maximum(start - number * block, 0), np.minimum(stop - number * block, block)
        parts.append(np.stack([number, lo, hi, np.full_like(number, group)], axis=1))
    table = np.concatenate(parts).astype(np.int32)
    whole = table[:, 2] - table[:, 1] == block

    def put(rows: np.ndarray) -> Tensor | None:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(device) if len(rows) else None

    return put(table[whole]), put(table[~whole])


def _used_rows(coef_BGK: np.ndarray, BB: int, unroll: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Rows that some candidate of the batch uses: counts (G,), rows (G, N), coefs (G, N, BB); whether zeros remain."""
    B, G = coef_BGK.shape[:2]
    used_GK = (coef_BGK != 0).any(axis=0)
    counts = used_GK.sum(axis=1).astype(np.int32)
    N = max(unroll, -(-int(counts.max(initial=0)) // unroll) * unroll)
    rows, coefs = np.zeros((G, N), np.int32), np.full((G, N, BB), -0.0)
    for g in range(G):
        rows[g, : counts[g]] = np.flatnonzero(used_GK[g])
        coefs[g, : counts[g], :B] = coef_BGK[:, g, used_GK[g]].T
    zeros = any((coefs[g, : counts[g], :B] == 0).any() for g in range(G))
    return counts, rows, coefs, zeros


def _float64(device: torch.device, coef: np.ndarray) -> bool:
    """Whether to add in float64: the device is fast at it, or float32 cannot hold the coefficients."""
    size = np.abs(coef[coef != 0])
    if not np.all((size >= 2.0**-126) & (size <= 2.0**127)):  # NaN too
        return True
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST_FLOAT64


def _batches(float64_B: list[bool]) -> list[slice]:
    """Neighbouring candidates of one kind of sums, at most `BATCH` together."""
    cuts = [0]
    for b in range(1, len(float64_B) + 1):
        if b == len(float64_B) or b - cuts[-1] == BATCH or float64_B[b] != float64_B[b - 1]:
            cuts.append(b)
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]


def _check(W_KP: Tensor, **others: Tensor | None) -> None:
    if W_KP.dtype not in DTYPES:
        raise ValueError(f"a bank on a GPU must be float32, bfloat16 or float16, got {W_KP.dtype}.")
    for name, tensor in {"W_KP": W_KP, **others}.items():
        if tensor is None:
            continue
        if tensor.device != W_KP.device:
            raise ValueError(
                f"`{name}` is on {tensor.device} and the bank on {W_KP.device}; both must be on one device."
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the rows of `{name}` must be contiguous; got strides {tuple(tensor.stride())}.")
        if name != "W_KP" and (tensor.dtype != torch.float32 or tensor.shape[-1] != W_KP.shape[1]):
            shape = tuple(tensor.shape)
            raise ValueError(f"`{name}` must be float32 with {W_KP.shape[1]} columns, got {tensor.dtype} {shape}.")


def _on(device: torch.device) -> Any:
    """Launches go to the current device: make it the tensors'. The interpreter, on CPU tensors, needs nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def combine_rows(
    coef: np.ndarray,
    W_KP: Tensor,
    out_BP: Tensor,
    groups: Groups | None,
    anchor_P: Tensor | None,
    *,
    float64: bool | None = None,
) -> bool:
    """`out = sum(coef) * anchor + coef @ W`, 16 candidates per pass over W; True when all results are finite.

    Args:
        coef: coefficients, shape (B, K), or (B, G, K) with groups; rounded here as by `round_coef`.
        W_KP: float32, bfloat16 or float16, shape (K, P); rows contiguous, any stride between them.
        out_BP: float32, shape (B, P), on the device of W_KP; rows contiguous.
        groups: columns and the coefficients they use.
        anchor_P: float32, shape (P,): what the rows are differences to. It is added first.
        float64: how to add; None means float64 where the device is fast at it.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit.
    """
    _check(W_KP, out_BP=out_BP, anchor_P=anchor_P)
    (K, P), B = W_KP.shape, len(out_BP)
    coef_BGK = round_coef(coef if coef.ndim == 3 else coef[:, None])
    starts, ids = ((0, P), (0,)) if groups is None else (groups.starts, groups.groups)
    G = 1 if groups is None else groups.num_groups
    if coef_BGK.shape != (B, G, K) or starts[-1] != P:
        raise ValueError(f"shapes do not fit: coef {coef.shape}, W {(K, P)}, out {(B, P)}, columns to {starts[-1]}.")
    if not out_BP.numel():
        return True
    anchor_BG = None if anchor_P is None else round_coef(sum_coef(coef_BGK))
    numbers = coef_BGK if anchor_BG is None else np.concatenate([coef_BGK, anchor_BG[..., None]], axis=2)
    float64_B = [_float64(W_KP.device, one) if float64 is None else float64 for one in numbers]
    bad = torch.zeros(1, dtype=torch.int32, device=W_KP.device)
    with _on(W_KP.device):
        for some in _batches(float64_B):
            base = None if anchor_BG is None or anchor_P is None else (anchor_P, anchor_BG[some])
            _launch(coef_BGK[some], W_KP, out_BP[some], (starts, ids), base, bad, float64_B[some.start])
    return not int(bad.item())


def _launch(
    coef_BGK: np.ndarray,
    W_KP: Tensor,
    out_BP: Tensor,
    segments: tuple[tuple[int, ...], tuple[int, ...]],
    base: tuple[Tensor, np.ndarray] | None,
    bad: Tensor,
    float64: bool,
) -> None:
    """One pass over the bank for at most `BATCH` candidates."""
    B, G, _ = coef_BGK.shape
    BB = triton.next_power_of_2(B)
    block, warps, unroll = plan(BB, W_KP.element_size())
    counts, rows, coefs, zeros = _used_rows(coef_BGK, BB, unroll)
    anchor, anchor_GB = out_BP, np.zeros((G, BB))  # not read unless there is an anchor
    if base is not None:
        anchor, anchor_GB[:, :B] = base[0], base[1].T
    kind = np.float64 if float64 else np.float32
    numbers = [torch.from_numpy(array).to(W_KP.device) for array in (counts, rows)]
    coefs_t, anchor_t = (torch.from_numpy(array.astype(kind)).to(W_KP.device) for array in (coefs, anchor_GB))
    for edge, table in enumerate(_table(*segments, block, W_KP.device)):
        if table is None:
            continue
        _combine_kernel[(len(table),)](
            table,
            *numbers,
            coefs_t,
            W_KP,
            W_KP.stride(0),
            anchor,
            anchor_t,
            out_BP,
            out_BP.stride(0) if B > 1 else 0,
            B,
            rows.shape[1],
            bad,
            BB=BB,
            BLOCK=block,
            UNROLL=unroll,
            ACC=tl.float64 if float64 else tl.float32,
            ANCHOR=base is not None,
            ZEROS=zeros,
            EDGE=bool(edge),
            num_warps=warps,
            enable_fp_fusion=True,  # all bounds hold with and without
        )


def project_rows(grad_P: Tensor, W_KP: Tensor, anchor_P: Tensor | None, *, float64: bool | None = None) -> Tensor:
    """`W @ grad`, with an anchor `(W + anchor) @ grad`: float32, shape (K,), on the device; the same bits every time.

    Args:
        grad_P: float32, shape (P,), on the device of W_KP.
        W_KP: float32, bfloat16 or float16, shape (K, P); rows contiguous, any stride between them.
        anchor_P: float32, shape (P,): what the rows are differences to.
        float64: how to add; None means float64 where the device is fast at it.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit.
    """
    _check(W_KP, grad_P=grad_P, anchor_P=anchor_P)
    float64 = _float64(W_KP.device, np.ones(1)) if float64 is None else float64
    with _on(W_KP.device):
        total_K = _dots(grad_P, W_KP, float64)
        if anchor_P is not None:
            total_K = total_K + _dots(grad_P, anchor_P[None], float64)
    return total_K.to(torch.float32)


def _dots(grad_P: Tensor, W_KP: Tensor, float64: bool) -> Tensor:
    """Dot products of the rows, float64: one sum per block of columns, then the sums over blocks in a fixed order."""
    (K, P), full = W_KP.shape, W_KP.shape[1] // DOT_BLOCK
    sums_NK = torch.zeros(-(-P // DOT_BLOCK), K, dtype=torch.float64, device=W_KP.device)
    for edge, first, number in ((False, 0, full), (True, full, len(sums_NK) - full)):
        if number:
            _dot_kernel[(number,)](
                W_KP,
                W_KP.stride(0),
                grad_P,
                sums_NK,
                K,
                P,
                first,
                BLOCK=DOT_BLOCK,
                ACC=tl.float64 if float64 else tl.float32,
                EDGE=edge,
                num_warps=DOT_WARPS,
                enable_fp_fusion=True,
            )
    return sums_NK.sum(dim=0)

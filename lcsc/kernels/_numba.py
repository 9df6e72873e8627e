"""The combiner on CPUs. Memory-bound: it reads each row once and keeps everything else in the caches.

The arithmetic is that of `lcsc.kernels._reference`, bit for bit: coefficients of 29 significant bits, so that
coefficient times weight is exact in float64 for float32, bfloat16 and float16 weights; float64 sums in row order; one
rounding to float32. Exact products make fused and separate multiply-add the same, and columns do not meet, so the bits
depend neither on the processor nor on blocks, threads, or who else is in the batch. (Products of float64 rows are
rounded; their last bits may differ between processors with and without fused multiply-add.)

What the speed needs: eight rows per step, so that the sums are loaded and stored once in eight (for several candidates
four rows and four candidates, whose sums stay in registers); long runs of columns, because hopping between rows costs;
fetching the next rows ahead where a row's run is short. Tensors are passed as addresses: any row stride, alignment and
read-only memory will do, and there is one compiled function for each dtype.

Shapes: K rows, P columns, B candidates, G layer groups, S segments, R rows that have a coefficient, C columns.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from lcsc.kernels._arrays import CHUNK, addresses, chunk_columns, default_threads, segments, spread, sums
from lcsc.kernels._llvm import advance, dot, fence, fetch, narrow, shift, size_of, step, tag_of, take
from lcsc.kernels._reference import round_coef, sum_coef

__all__ = ["accumulate", "combine_rows", "default_threads", "finish", "project_rows", "round_coef"]

#: first digits of the SHA-256 of `_llvm.py`
STEPS = "01754924e55f685f"

_F32 = np.float32(0)
_NOTHING = np.zeros(32)
_ZEROS = int(addresses("zeros", _NOTHING[None], 8)[0])
BLOCK = 2**16  #: columns whose products `project_rows` adds up before it adds the sums: part of its definition
BYPASS_BYTES = 2**23  #: longer results bypass the caches, which spares reading the memory they replace


@njit(nogil=True)
def _add_row(tag: Any, acc: int, row: int, coef: float, n: int) -> None:
    even, size = n - n % 32, size_of(tag)
    for i in range(0, even, 32):
        step(tag, acc + 8 * i, 0, (row + size * i,), (coef,), 32)
    for i in range(even, n):
        step(tag, acc + 8 * i, 0, (row + size * i,), (coef,), 1)


@njit(nogil=True)
def _dense(coef_BR: Any, b: int, r: int, stop: int) -> int:
    """How many candidates from b on, at most four, have a coefficient for each of rows r to stop - 1."""
    for m in range(b, min(b + 4, len(coef_BR))):
        for j in range(r, stop):
            if coef_BR[m, j] == 0:
                return m - b
    return min(4, len(coef_BR) - b)


@njit(nogil=True)
def _add_some(tag: Any, acc: int, coef_R: Any, table: Any, r: int, stop: int, start: int, n: int) -> None:
    """One by one those of rows r to stop - 1 that one candidate has a coefficient for; columns [start, n)."""
    for j in range(r, stop):
        if coef_R[j] != 0:
            _add_row(tag, acc + 8 * start, table[0, j] + size_of(tag) * start, coef_R[j], n - start)


@njit(nogil=True)
def _add_eight(tag: Any, acc: int, pitch: int, coef_BR: Any, table: Any, r: int, even: int) -> None:
    """Rows r to r + 7, one candidate after another."""
    size, N, first = size_of(tag), coef_BR.shape[1], r - r  # 0; a literal would have numba compile once more
    rows, ahead = take(table, r, 8), take(table, 2 * N + r, 8)
    for b in range(len(coef_BR)):
        if _dense(coef_BR, b, r, r + 8) > 0:
            c = take(coef_BR, b * N + r, 8)
            for i in range(0, even, 32):
                if size < 4:  # wider rows come fast enough by themselves
                    fetch(tag, ahead, size * i)
                step(tag, acc + pitch * b + 8 * i, pitch, shift(rows, size * i), c, 32)
        else:
            _add_some(tag, acc + pitch * b, coef_BR[b], table, r, r + 8, first, even)


@njit(nogil=True)
def _add_four(tag: Any, acc: int, pitch: int, coef_BR: Any, table: Any, r: int, stop: int, even: int) -> None:
    """Rows r to stop - 1, at most four, for four candidates at a time."""
    size, N, b, first = size_of(tag), coef_BR.shape[1], 0, r - r
    rows, live, ahead = take(table, r, 4), take(table, N + r, 4), take(table, 2 * N + r, 4)
    while b < len(coef_BR):
        here, dense, c = acc + pitch * b, _dense(coef_BR, b, r, stop), take(coef_BR, b * N + r, 4)
        if dense == 4:
            c2 = c + take(coef_BR, (b + 1) * N + r, 4)
            c4 = c2 + take(coef_BR, (b + 2) * N + r, 4) + take(coef_BR, (b + 3) * N + r, 4)
            for i in range(0, even, 32):
                fetch(tag, ahead, size * i)
                for j in range(i, i + 32, 8):
                    step(tag, here + 8 * j, pitch, advance(rows, live, size * j), c4, 8)
        elif dense > 0:
            for i in range(0, even, 32):
                if size < 4:
                    fetch(tag, ahead, size * i)
                step(tag, here + 8 * i, pitch, advance(rows, live, size * i), c, 32)
        else:
            _add_some(tag, here, coef_BR[b], table, r, stop, first, even)
        b, ahead = b + (4 if dense == 4 else 1), rows


@njit(nogil=True)
def _add_rows(tag: Any, acc: int, pitch: int, coef_BR: Any, table: Any, R: int, n: int) -> None:
    """acc_bc += sum_r coef_br row_rc for n columns, in row order; terms whose coefficient is zero are left out."""
    B, even = len(coef_BR), n - n % 32
    eights = R // 8 * 8 if B < 4 else R - R
    for r in range(0, eights, 8):
        _add_eight(tag, acc, pitch, coef_BR, table, r, even)
    for r in range(eights, R, 4):
        _add_four(tag, acc, pitch, coef_BR, table, r, min(r + 4, R), even)
    for b in range(B if even < n else 0):
        _add_some(tag, acc + pitch * b, coef_BR[b], table, R - R, R, even, n)


@njit(nogil=True)
def _select(coef_BGK: Any, g: int, coef_BR: Any, used_R: Any) -> int:
    """The rows that some candidate needs in group g, and their coefficients; returns how many."""
    R = 0
    for k in range(coef_BGK.shape[2]):
        needed = False
        for b in range(coef_BGK.shape[0]):
            coef_BR[b, R] = coef_BGK[b, g, k]
            needed |= coef_BGK[b, g, k] != 0
        if needed:
            used_R[R] = k
            R += 1
    for b in range(len(coef_BR)):
        for r in range(R, R + 3):
            coef_BR[b, r] = -0.0
    return R


@njit(nogil=True)
def _point(table: Any, rows_K: Any, used_R: Any, R: int, B: int, here: int, skip: int, zeros: int) -> None:
    """For each row: its address, -1 for bits that advance with the columns, what to fetch while it is added.

    Behind the last row stand rows of zeros that do not advance. Their coefficient is -0.0, and adding -0.0 changes
    nothing. `skip` is the way in bytes to the columns that come next.
    """
    for r in range(R):
        table[0, r] = rows_K[used_R[r]] + here
        table[1, r] = -1
    later = 8 if B < 4 else 4
    for r in range(R):
        table[2, r] = table[0, r + later] if r + later < R else table[0, (r + later) % R] + skip
    for r in range(R, R + 3):
        table[0, r], table[1, r], table[2, r] = zeros, 0, zeros


@njit(nogil=True)
def _round(acc: int, out: int, n: int, bypass: bool) -> bool:
    """out = float32(acc) for n columns; whether all are finite."""
    bad, i = 0, 0
    if bypass and out % 64 == 0:
        while i + 16 <= n:
            bad |= narrow(acc + 8 * i, out + 4 * i, 16, 1)
            i += 16
    while i + 16 <= n:
        bad |= narrow(acc + 8 * i, out + 4 * i, 16, 0)
        i += 16
    while i < n:
        bad |= narrow(acc + 8 * i, out + 4 * i, 1, 0)
        i += 1
    return bad == 0


class _Compiled:
    """A function compiled when first called, and kept on disk for the next process where that is possible."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._lock = function, threading.Lock()
        self._fast: Callable[..., Any] | None = None
        self._cached = True

    def __call__(self, *args: Any) -> Any:
        fast = None
        try:
            with self._lock:  # or threads that come together would all compile
                if self._fast is None:
                    self._fast = njit(nogil=True, cache=self._cached)(self._function)
                fast = self._fast
            return fast(*args)
        except (
            Exception
        ):  # no folder, a full disk, a damaged entry (pickle may raise anything); the loops raise nothing
            with self._lock:
                if self._fast is fast:
                    if not self._cached:
                        raise
                    self._cached, self._fast = False, None
        return self(*args)


@_Compiled
def _columns(tag: Any, coef_BGK: Any, rows_K: Any, base: Any, parts: Any, out_B: Any, span: Any, acc_BC: Any) -> bool:
    """Columns [start, stop) of the candidates. Rows, anchor, results: addresses of column 0. acc_BC is scratch."""
    (anchor, base_BG, zeros), (starts_S, groups_S), (start, stop, bypass) = base, parts, span
    B, _, K = coef_BGK.shape
    coef_BR, used_R, table = np.empty((B, K + 3)), np.empty(K, np.int64), np.empty((3, K + 3), np.int64)
    size, chunk, finite, s, R, known = size_of(tag), acc_BC.shape[1], True, 0, 0, -1
    for c in range(start, stop, chunk):
        end = min(c + chunk, stop)
        for b in range(B):
            for i in range(end - c):
                acc_BC[b, i] = -0.0
        at = c
        while at < end:
            while starts_S[s + 1] <= at:
                s += 1
            g, until = groups_S[s], min(end, starts_S[s + 1])
            if g != known:
                known, R = g, _select(coef_BGK, g, coef_BR, used_R)
            here, skip = acc_BC.ctypes.data + 8 * (at - c), size * (until - at) if until < stop else 0
            for b in range(B):
                if base_BG[b, g] != 0:
                    _add_row(_F32, here + 8 * chunk * b, anchor + 4 * at, base_BG[b, g], until - at)
            _point(table, rows_K, used_R, R, B, size * at, skip, zeros)
            _add_rows(tag, here, 8 * chunk, coef_BR, table, R, until - at)
            at = until
        for b in range(B):
            finite &= _round(acc_BC.ctypes.data + 8 * chunk * b, out_B[b] + 4 * c, end - c, bypass)
    fence()
    return finite


@_Compiled
def _add(tag: Any, coef_BGK: Any, rows_K: Any, zeros: int, acc: int, pitch: int, columns: int, chunk: int) -> None:
    """acc_bc += coef_bk row_kc for all columns; acc is an address, candidates lie `pitch` bytes apart."""
    B, _, K = coef_BGK.shape
    coef_BR, used_R, table = np.empty((B, K + 3)), np.empty(K, np.int64), np.empty((3, K + 3), np.int64)
    R, size = _select(coef_BGK, 0, coef_BR, used_R), size_of(tag)
    for c in range(0, columns, chunk):
        end = min(c + chunk, columns)
        _point(table, rows_K, used_R, R, B, size * c, size * (end - c) if end < columns else 0, zeros)
        _add_rows(tag, acc + 8 * c, pitch, coef_BR, table, R, end - c)


@_Compiled
def _round_all(acc: int, pitch: int, out_B: Any, columns: int) -> bool:
    finite = True
    for b in range(len(out_B)):
        finite &= _round(acc + pitch * b, out_B[b], columns, False)
    return finite


@_Compiled
def _dots(tag: Any, rows_K: Any, grad: int, columns: int, first: int, lanes_KS: Any, sums_NK: Any) -> None:
    """Sums of row_kc grad_c over blocks of BLOCK columns from block `first` on: 32 sums in turn, added in order."""
    K, size, lanes, fours = len(rows_K), size_of(tag), lanes_KS.ctypes.data, len(rows_K) // 4 * 4
    for n in range(len(sums_NK)):
        low = (first + n) * BLOCK
        high = min(low + BLOCK, columns)
        for k in range(K):
            for i in range(32):
                lanes_KS[k, i] = 0.0
        for c in range(low, high, CHUNK):
            end = min(c + CHUNK, high)
            even = end - (end - c) % 32
            for k in range(0, fours, 4):
                rows = take(rows_K, k, 4)
                for i in range(c, even, 32):
                    dot(tag, lanes + 256 * k, shift(rows, size * i), grad + 4 * i, 32)
            for k in range(K):
                for i in range(c if k >= fours else even, even, 32):
                    dot(tag, lanes + 256 * k, (rows_K[k] + size * i,), grad + 4 * i, 32)
                for i in range(even, end):
                    dot(tag, lanes + 256 * k + 8 * (i - even), (rows_K[k] + size * i,), grad + 4 * i, 1)
        for k in range(K):
            total = 0.0
            for i in range(32):
                total += lanes_KS[k, i]
            sums_NK[n, k] = total


def accumulate(acc_BC: np.ndarray, coef_BR: np.ndarray, rows_RC: np.ndarray, dtype: str) -> None:
    """`acc += coef @ rows` in row order, leaving out terms whose coefficient is zero. One thread, without the GIL.

    A sum that is built up by several calls starts from -0.0 to have the bits of `combine_rows`.

    Args:
        acc_BC: float64, shape (B, C); rows contiguous.
        coef_BR: coefficients, shape (B, R); rounded here as by `round_coef`.
        rows_RC: numbers or their raw bits, shape (R, C); rows contiguous, any stride between them.
        dtype: what the bits mean: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: shapes, strides or the dtype do not fit.
    """
    tag, (B, C) = tag_of(dtype), acc_BC.shape
    if coef_BR.shape != (B, len(rows_RC)) or rows_RC.shape[1] != C:
        raise ValueError(f"shapes do not fit: acc {acc_BC.shape}, coef {coef_BR.shape}, rows {rows_RC.shape}.")
    rows_R, acc_B = addresses("rows_RC", rows_RC, tag.itemsize), addresses("acc_BC", acc_BC, 8)
    if acc_BC.size:
        chunk = chunk_columns(B, C, tag.itemsize)
        _add(tag, round_coef(coef_BR)[:, None], rows_R, _ZEROS, int(acc_B[0]), acc_BC.strides[0], C, chunk)


def finish(acc_BC: np.ndarray, out_BC: np.ndarray) -> bool:
    """`out = float32(acc)`, shape (B, C), rows contiguous; True when all are finite. One thread, without the GIL."""
    if acc_BC.shape != out_BC.shape:
        raise ValueError(f"shapes do not fit: acc {acc_BC.shape}, out {out_BC.shape}.")
    acc_B, out_B = addresses("acc_BC", acc_BC, 8), addresses("out_BC", out_BC, 4)
    return not acc_BC.size or bool(_round_all(int(acc_B[0]), acc_BC.strides[0], out_B, acc_BC.shape[1]))


def combine_rows(
    coef_BK: np.ndarray,
    W_KP: np.ndarray,
    out_BP: np.ndarray,
    *,
    dtype: str,
    anchor_P: np.ndarray | None = None,
    anchor_coef_B: np.ndarray | None = None,
    starts_S: np.ndarray | None = None,
    groups_S: np.ndarray | None = None,
    threads: int | None = None,
) -> bool:
    """`out = anchor_coef * anchor + coef @ W`, all candidates in one pass over W; True when all are finite.

    Args:
        coef_BK: coefficients, shape (B, K), or (B, G, K) with segments; rounded here as by `round_coef`.
        W_KP: numbers or their raw bits, shape (K, P); rows contiguous, any stride between them.
        out_BP: float32, shape (B, P); rows contiguous.
        dtype: what the bits mean: float32, bfloat16, float16 or float64.
        anchor_P: float32, shape (P,): what the rows are differences to. It is added first.
        anchor_coef_B: its coefficients, shape (B,) or (B, G); None means the sums of the rows' coefficients.
        starts_S: first columns of S segments and, last, P; shape (S + 1,).
        groups_S: whose coefficients each segment takes, shape (S,).
        threads: at most so many; None means `default_threads()`.

    Raises:
        ValueError: shapes, strides or the dtype do not fit.
    """
    tag, (B, P), coef_BGK = tag_of(dtype), out_BP.shape, round_coef(coef_BK if coef_BK.ndim == 3 else coef_BK[:, None])
    if coef_BGK.shape[::2] != (B, len(W_KP)) or W_KP.shape[1] != P:
        raise ValueError(f"shapes do not fit: coef {coef_BK.shape}, W {W_KP.shape}, out {out_BP.shape}.")
    parts, base_BG, anchor = segments(starts_S, groups_S, P, coef_BGK.shape[1]), np.zeros(coef_BGK.shape[:2]), 0
    if anchor_P is not None:
        if anchor_P.shape != (P,):
            raise ValueError(f"the anchor has shape {anchor_P.shape}, not {(P,)}.")
        anchor = int(addresses("anchor_P", anchor_P[None], 4)[0])
        base_BG.T[...] = round_coef(sum_coef(coef_BGK) if anchor_coef_B is None else np.asarray(anchor_coef_B)).T
    rows_K, out_B = addresses("W_KP", W_KP, tag.itemsize), addresses("out_BP", out_BP, 4)

    def work(start: int, stop: int) -> bool:
        span = 64 * start, min(P, 64 * stop), 4 * P * B > BYPASS_BYTES
        return _columns(tag, coef_BGK, rows_K, (anchor, base_BG, _ZEROS), parts, out_B, span, sums(B, P, tag.itemsize))

    return not out_BP.size or all(spread(work, -(-P // 64), len(W_KP) * P * tag.itemsize, threads))


def project_rows(
    grad_P: np.ndarray,
    W_KP: np.ndarray,
    *,
    dtype: str,
    anchor_P: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """`W @ grad` (with an anchor, `(W + anchor) @ grad`), float64, shape (K,); the same bits for any thread count.

    Args:
        grad_P: float32, shape (P,), contiguous.
        W_KP: numbers or their raw bits, shape (K, P); rows contiguous, any stride between them.
        dtype: what the bits mean: float32, bfloat16, float16 or float64.
        anchor_P: float32, shape (P,): what the rows are differences to.
        threads: at most so many; None means `default_threads()`.
    """
    tag, (K, P) = tag_of(dtype), W_KP.shape
    if grad_P.shape != (P,) or (anchor_P is not None and anchor_P.shape != (P,)):
        raise ValueError(f"shapes do not fit: grad {grad_P.shape}, W {W_KP.shape}.")
    grad, rows_K = int(addresses("grad_P", grad_P[None], 4)[0]), addresses("W_KP", W_KP, tag.itemsize)
    sums_NK = np.zeros((-(-P // BLOCK), K))

    def work(start: int, stop: int) -> None:
        _dots(tag, rows_K, grad, P, start, np.empty((K, 32)), sums_NK[start:stop])

    spread(work, len(sums_NK), K * P * tag.itemsize, threads)
    total_K = functools.reduce(np.add, sums_NK, np.zeros(K))
    if anchor_P is None:
        return total_K
    return total_K + project_rows(grad_P, anchor_P[None], dtype="float32", threads=threads)

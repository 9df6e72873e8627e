"""Entropy coders in integer arithmetic: the same bytes on every machine, whatever its number of threads.

`encode_adaptive` is a range coder over at most 16 symbols whose probabilities are counts that it learns on the way, in
a fine and in a coarse context; `encode_static` is rANS over bytes with one fixed table a context. Both sides make the
same integers. Neither notices damage: the container checks.
Sources: D. Subbotin's carryless range coder (1999), with 64 bits; J. Duda, arXiv:1311.2540 (rANS).

Shapes: N symbols, F fine and C coarse (or fixed) contexts, S symbols of the alphabet, 16 at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

#: what a symbol that came up adds to its count, in the fine and in the coarse context
FINE, COARSE = 4096, 256
#: counts of a context are halved beyond this sum
FINE_LIMIT, COARSE_LIMIT = 2**25, 2**19
#: what each symbol's count begins with in a coarse context; fine ones begin at 0 and so with the coarse one's opinion
START = 128
#: bits of a probability of `encode_static`
PRECISION = 12
_TOP, _BOTTOM = np.uint64(1 << 56), np.uint64(1 << 48)
_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)


def fresh_counts(fine: int, coarse: int, num_symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts that have seen nothing, int64, shapes (F, S) and (C, S)."""
    return np.zeros((fine, num_symbols), np.int64), np.full((coarse, num_symbols), START, np.int64)


@njit(nogil=True, cache=True)
def _learn(counts: Any, ctx: int, symbol: int, total: int, more: int, limit: int, least: int) -> None:
    counts[ctx, symbol] += more
    if total + more > limit:
        for j in range(counts.shape[1]):
            counts[ctx, j] = max(counts[ctx, j] >> 1, least)


@njit(nogil=True, cache=True)
def shift_out(low: Any, span: Any, out: Any, n: int) -> Any:
    """Write the bytes of a range that are settled; returns the range and where `out` ends, -1 where it is full."""
    while True:
        if (low ^ (low + span)) >= _TOP:
            if span >= _BOTTOM:
                break
            span = (~low + np.uint64(1)) & (_BOTTOM - np.uint64(1))
        if n == len(out):
            return low, span, -1
        out[n] = np.uint8(low >> np.uint64(56))
        n += 1
        low <<= np.uint64(8)
        span <<= np.uint64(8)
    return low, span, n


@njit(nogil=True, cache=True)
def shift_in(low: Any, span: Any, code: Any, data: Any, n: int) -> Any:
    """Read as many bytes as `shift_out` wrote, zeros behind the last; returns the range, the number in it and n."""
    while True:
        if (low ^ (low + span)) >= _TOP:
            if span >= _BOTTOM:
                break
            span = (~low + np.uint64(1)) & (_BOTTOM - np.uint64(1))
        code = (code << np.uint64(8)) | np.uint64(data[n] if n < len(data) else 0)
        n += 1
        low <<= np.uint64(8)
        span <<= np.uint64(8)
    return low, span, code, n


@njit(nogil=True, cache=True)
def _encode(sym_N: Any, fine_N: Any, coarse_N: Any, fine_FS: Any, coarse_CS: Any, out: Any) -> Any:
    low, span, n, S = np.uint64(0), _ONES, 0, fine_FS.shape[1]
    for i in range(len(sym_N)):
        s, f, c = int(sym_N[i]), int(fine_N[i]), int(coarse_N[i])
        below = own = 0
        for j in range(s):
            below += fine_FS[f, j] + coarse_CS[c, j]
        fine = coarse = 0
        for j in range(S):
            fine += fine_FS[f, j]
            coarse += coarse_CS[c, j]
        own = fine_FS[f, s] + coarse_CS[c, s]
        span //= np.uint64(fine + coarse)
        low += np.uint64(below) * span
        span *= np.uint64(own)
        _learn(fine_FS, f, s, fine, FINE, FINE_LIMIT, 0)
        _learn(coarse_CS, c, s, coarse, COARSE, COARSE_LIMIT, 1)
        low, span, n = shift_out(low, span, out, n)
        if n < 0:
            break
    return n, low, span


@njit(nogil=True, cache=True)
def _decode(data: Any, fine_N: Any, coarse_N: Any, fine_FS: Any, coarse_CS: Any, sym_N: Any) -> None:
    low, span, code, n, S = np.uint64(0), _ONES, np.uint64(0), 8, fine_FS.shape[1]
    for i in range(8):
        code = (code << np.uint64(8)) | np.uint64(data[i] if i < len(data) else 0)
    for i in range(len(sym_N)):
        f, c = int(fine_N[i]), int(coarse_N[i])
        fine = coarse = 0
        for j in range(S):
            fine += fine_FS[f, j]
            coarse += coarse_CS[c, j]
        span //= np.uint64(fine + coarse)
        target = min(int((code - low) // span), fine + coarse - 1)
        below, s = 0, 0
        own = fine_FS[f, 0] + coarse_CS[c, 0]
        while below + own <= target:
            below += own
            s += 1
            own = fine_FS[f, s] + coarse_CS[c, s]
        low += np.uint64(below) * span
        span *= np.uint64(own)
        sym_N[i] = s
        _learn(fine_FS, f, s, fine, FINE, FINE_LIMIT, 0)
        _learn(coarse_CS, c, s, coarse, COARSE, COARSE_LIMIT, 1)
        low, span, code, n = shift_in(low, span, code, data, n)


def last_bytes(low: int, span: int) -> bytes:
    """The shortest number within [low, low + span): a decoder reads zeros behind the last byte."""
    for size in range(9):
        step = 1 << (64 - 8 * size)
        value = -(-low // step) * step
        if value < min(low + span, 1 << 64):
            return value.to_bytes(8, "big")[:size]
    raise AssertionError("a range holds no number")


def encode_adaptive(
    sym_N: np.ndarray, fine_N: np.ndarray, coarse_N: np.ndarray, counts: tuple[np.ndarray, np.ndarray]
) -> bytes | None:
    """Symbols as bytes; `counts` learn. None where that takes a byte a symbol or more (the counts are spoilt then).

    Args:
        sym_N: uint8, each below S.
        fine_N, coarse_N: contexts, int32, below F and C.
        counts: see `fresh_counts`.
    """
    out = np.empty(len(sym_N) + 8, np.uint8)
    n, low, span = _encode(sym_N, fine_N, coarse_N, *counts, out)
    if n < 0:
        return None
    return out[:n].tobytes() + last_bytes(int(low), int(span))


def decode_adaptive(
    data: bytes, fine_N: np.ndarray, coarse_N: np.ndarray, counts: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The symbols again, uint8, shape (N,); `counts` learn as on writing. Anything from damaged bytes."""
    sym_N = np.empty(len(fine_N), np.uint8)
    _decode(np.frombuffer(data, np.uint8), fine_N, coarse_N, *counts, sym_N)
    return sym_N


@njit(nogil=True, cache=True)
def _rans_encode(sym_N: Any, ctx_N: Any, freq_CS: Any, first_CS: Any, out: Any) -> Any:
    state, n = np.uint64(1 << 31), len(out)
    for i in range(len(sym_N) - 1, -1, -1):
        f, c = np.uint64(freq_CS[ctx_N[i], sym_N[i]]), np.uint64(first_CS[ctx_N[i], sym_N[i]])
        if state >= (np.uint64((1 << 31) >> PRECISION) << np.uint64(32)) * f:
            n -= 1
            out[n] = np.uint32(state & np.uint64(0xFFFFFFFF))
            state >>= np.uint64(32)
        state = ((state // f) << np.uint64(PRECISION)) + state % f + c
    return n, state


@njit(nogil=True, cache=True)
def _rans_decode(words: Any, state: Any, ctx_N: Any, freq_CS: Any, first_CS: Any, table: Any, out_N: Any) -> None:
    n, mask = 0, np.uint64((1 << PRECISION) - 1)
    for i in range(len(out_N)):
        slot, c = state & mask, ctx_N[i]
        s = table[c, slot]
        out_N[i] = s
        state = np.uint64(freq_CS[c, s]) * (state >> np.uint64(PRECISION)) + slot - np.uint64(first_CS[c, s])
        if state < np.uint64(1 << 31) and n < len(words):
            state = (state << np.uint64(32)) | np.uint64(words[n])
            n += 1


def frequencies(counts_C256: np.ndarray) -> np.ndarray:
    """Counts of bytes in each context as whole shares of 2^PRECISION, uint16, shape (C, 256).

    A symbol that came up has a share of at least one; a context that did not has the whole share for symbol 0.
    """
    counts, whole = counts_C256.astype(np.int64), 1 << PRECISION
    total_C = counts.sum(1, keepdims=True)
    found = np.where(counts > 0, np.maximum(1, counts * whole // np.maximum(total_C, 1)), 0)
    for c in range(len(found)):
        while rest := whole - int(found[c].sum()):  # what rounding left goes to the commonest, or comes from it
            k = int(found[c].argmax())
            found[c, k] += rest if rest > 0 else max(rest, 1 - int(found[c, k]) // 2)
    return found.astype(np.uint16)


def _first(freq_CS: np.ndarray) -> np.ndarray:
    return (np.cumsum(freq_CS, axis=1, dtype=np.int64) - freq_CS).astype(np.uint16)


def encode_static(sym_N: np.ndarray, ctx_N: np.ndarray, freq_CS: np.ndarray) -> bytes:
    """Bytes by rANS with shares from `frequencies`; 8 bytes of state, then words of 32 bits.

    Args:
        sym_N: uint8.
        ctx_N: uint16, below C.
        freq_CS: of the counts of these very symbols.
    """
    out = np.empty(len(sym_N) * PRECISION // 32 + 16, np.uint32)
    n, state = _rans_encode(sym_N, ctx_N, freq_CS, _first(freq_CS), out)
    return int(state).to_bytes(8, "little") + out[n:].tobytes()


def decode_static(data: bytes, ctx_N: np.ndarray, freq_CS: np.ndarray) -> np.ndarray:
    """The bytes again, uint8, shape (N,); anything from damaged bytes.

    Raises:
        ValueError: shares that do not sum to 2^PRECISION, or no state and whole words.
    """
    if (freq_CS.sum(1, dtype=np.int64) != 1 << PRECISION).any() or len(data) < 8 or len(data) % 4:
        raise ValueError("no shares, or no words")
    table = np.stack([np.repeat(np.arange(256, dtype=np.uint8), freq_S) for freq_S in freq_CS])
    out_N = np.empty(len(ctx_N), np.uint8)
    state = np.uint64(int.from_bytes(data[:8], "little"))
    _rans_decode(np.frombuffer(data, "<u4", offset=8), state, ctx_N, freq_CS, _first(freq_CS), table, out_N)
    return out_N


# ------------------------------------------------------------------------------------------------------- bits, tokens


@njit(nogil=True, cache=True)
def split_delta(delta_N: Any, bits: int, token_N: Any, rest_N: Any, width_N: Any) -> None:
    """Differences mod 2^bits, uint64, as a token of size and first two digits, and the digits that remain.

    The sign is part of the token up to 32 bits and the first of the remaining digits above.
    """
    one = np.uint64(1)
    for i in range(len(delta_N)):
        d = delta_N[i]
        negative = (d >> np.uint64(bits - 1)) & one
        if negative:
            d = ~d + one
            if bits < 64:
                d &= (one << np.uint64(bits)) - one
        token, width, size = int(d), 0, 0
        if d >= np.uint64(4):
            x = d
            while x:
                x >>= one
                size += 1
            width = size - 3
            token = 4 + width * 4 + int((d >> np.uint64(width)) & np.uint64(3))
            d &= (one << np.uint64(width)) - one
        else:
            d = np.uint64(0)
        if bits <= 32:
            token = token * 2 + int(negative)
        else:
            d |= negative << np.uint64(width)
            width += 1
        token_N[i], rest_N[i], width_N[i] = token, d, width


@njit(nogil=True, cache=True)
def widths_of(token_N: Any, bits: int, width_N: Any) -> None:
    """How many digits remain beside each token of `split_delta`."""
    for i in range(len(token_N)):
        token = token_N[i] >> 1 if bits <= 32 else token_N[i]
        width_N[i] = (max(token - 4, 0) >> 2) + (0 if bits <= 32 else 1)


@njit(nogil=True, cache=True)
def join_delta(token_N: Any, rest_N: Any, bits: int, delta_N: Any) -> None:
    """What `split_delta` took apart; anything from tokens that it does not give."""
    one = np.uint64(1)
    for i in range(len(token_N)):
        token, d = int(token_N[i]), rest_N[i]
        if bits <= 32:
            negative, token = np.uint64(token & 1), token >> 1
        width = max(token - 4, 0) >> 2
        if bits > 32:
            negative = (d >> np.uint64(width)) & one
            d &= (one << np.uint64(width)) - one
        if token < 4:
            d = np.uint64(token)
        else:
            d |= np.uint64(4 + ((token - 4) & 3)) << np.uint64(width)
        if negative:
            d = ~d + one
            if bits < 64:
                d &= (one << np.uint64(bits)) - one
        delta_N[i] = d


@njit(nogil=True, cache=True)
def pack_bits(value_N: Any, width_N: Any, out: Any) -> int:
    """The low digits of uint64 numbers, `width_N` of each, as bytes; returns how many."""
    held, count, n = np.uint64(0), 0, 0
    for i in range(len(value_N)):
        value, left = value_N[i], int(width_N[i])
        while left:
            take = min(left, 8 - count)
            left -= take
            held = (held << np.uint64(take)) | ((value >> np.uint64(left)) & np.uint64((1 << take) - 1))
            count += take
            if count == 8:
                out[n] = np.uint8(held)
                n, held, count = n + 1, np.uint64(0), 0
    if count:
        out[n] = np.uint8(held << np.uint64(8 - count))
        n += 1
    return n


@njit(nogil=True, cache=True)
def unpack_bits(data: Any, width_N: Any, value_N: Any) -> None:
    """What `pack_bits` packed; zeros behind the last byte."""
    at, used = 0, 0
    for i in range(len(value_N)):
        value, left = np.uint64(0), int(width_N[i])
        while left:
            take = min(left, 8 - used)
            byte = int(data[at]) if at < len(data) else 0
            value = (value << np.uint64(take)) | np.uint64((byte >> (8 - used - take)) & ((1 << take) - 1))
            left, used = left - take, used + take
            if used == 8:
                at, used = at + 1, 0
        value_N[i] = value

"""A small network that tells the shares of each next symbol and learns from it, with a range coder behind it.

The context of a symbol is other symbols that both sides know: at the same place and around it in planes that are there
already, before it in its own plane, and how large its row and column have been so far. Each has a row in a table for
each of its values; their sum goes through one hidden layer, as one-hot inputs would. To the logits come those of a few
tables of counts, by weights that the hidden layer tells. Shares become whole numbers before they are coded, and each
symbol is followed by one step of stochastic gradient descent with RMSprop. Reader and writer do the same in the same
order.

All of it is additions, products, quotients and roots of float32, each rounded once and in the order that stands here
(no fast-math, no fused multiply-add, no library's exponential), so that processors that follow IEEE 754 agree, whatever
their number of lanes or threads. A compiler that rounds otherwise would not: see `lcsc.codec.neural`.
Sources: arXiv:2506.12000 (a network over the checkpoint before, trained while it codes); M. Mahoney, "Adaptive weighing
of context models for lossless data compression" (2005), for counts among its inputs; rows and columns: lcsc.

Shapes: N symbols of P planes, S symbols of the alphabet, 16 at most, E tensors, K slots, J tables of counts with C rows
in all, R rows of the network's table, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite.binding import get_host_cpu_name
from numba import config, njit

from lcsc.kernels.entropy import last_bytes, shift_in, shift_out

#: of a context that is not there: beyond a tensor's edge, or of a plane that is not known
UNKNOWN = 16
#: sources of a slot beside planes: sizes of what the row, and the column, held so far
ROW, COLUMN = -1, -2
HIDDEN = 16
_VALUES = UNKNOWN + 1
_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
#: shares are whole parts of about this
_WHOLE = np.float32(1 << 20)
#: first rate of learning, the last, and how fast it falls; memory of squared gradients, their first mean, and a floor
_RATE, _LEAST, _FALL = np.float32(0.01), np.float32(0.001), np.float32(0.01)
_KEPT, _NEW, _FIRST, _FLOOR = np.float32(0.999), np.float32(0.001), np.float32(0.01), np.float32(1e-3)
#: what a symbol that came up adds to its count, what counts begin with, and the sum beyond which they are halved
_COUNT, _START, _LIMIT = 32, 8, 1 << 18
#: logarithms of shares in 4096ths; rounded, so that no library's last digit counts
_LOG_STEPS = np.float32(4096)
_LOGS = (np.round(np.log((np.arange(4097) + 0.5) / 4096.5) * 4096) / 4096).astype(np.float32)
#: weights of counts learn at this part of the rate
_SLOWER = np.float32(0.25)
_LEAK, _ZERO, _ONE, _HALF = np.float32(0.1), np.float32(0), np.float32(1), np.float32(0.5)
_LOG2E, _LOWEST = np.float32(1.44269504), np.float32(-39)
_POWERS = np.ldexp(_ONE, np.arange(-40, 1)).astype(np.float32)
_C1, _C2, _C3 = np.float32(0.69314718), np.float32(0.24022651), np.float32(0.05550411)
_C4, _C5 = np.float32(0.00961813), np.float32(0.00133336)


class Net(NamedTuple):
    """Parameters, each followed by the mean of its squared gradients, float32; counts; symbols that it has seen.

    `mix_JH` has a column more, for what does not depend on the hidden layer.
    """

    table_RH: np.ndarray
    table_sq: np.ndarray
    out_HS: np.ndarray
    out_sq: np.ndarray
    bias_S: np.ndarray
    bias_sq: np.ndarray
    mix_JH: np.ndarray
    mix_sq: np.ndarray
    counts_CS: np.ndarray
    seen: np.ndarray

    def copy(self) -> Net:
        """Another of the same numbers."""
        return Net(*(part.copy() for part in self))


class Contexts(NamedTuple):
    """Where contexts lie; all int64.

    Args:
        slots_K3: a plane (or ROW, COLUMN), rows down and columns right from the symbol.
        counted_J4: of each table of counts the first row, and three slots that choose the row; -1 is none.
        size_S: how much each symbol counts in the sizes of rows and columns, 0 to 15 times 256.
    """

    slots_K3: np.ndarray
    counted_J4: np.ndarray
    size_S: np.ndarray


def target() -> str:
    """The processor that the kernel is compiled for."""
    return str(getattr(config, "CPU_NAME", None) or get_host_cpu_name())


def fresh_net(contexts: Contexts) -> Net:
    """A network that has seen nothing: small numbers in the table, all symbols alike."""
    tables, size = len(contexts.counted_J4), len(contexts.size_S)
    slots = len(contexts.slots_K3) + tables
    rows = slots * _VALUES
    mixed = np.arange(rows * HIDDEN, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    small = (mixed >> np.uint64(48)).astype(np.float32) / np.float32(1 << 15) - _ONE
    scale = np.float32(0.3) / np.sqrt(np.float32(slots))
    table, out = (small * scale).reshape(rows, HIDDEN), np.zeros((HIDDEN, size), np.float32)
    bias, mix = np.zeros(size, np.float32), np.zeros((tables, HIDDEN + 1), np.float32)
    mix[:, HIDDEN] = _ONE / np.float32(tables)
    a, b, c, d = (np.full_like(part, _FIRST) for part in (table, out, bias, mix))
    first, *last = contexts.counted_J4[-1].tolist()
    counts = np.full((first + _VALUES ** sum(slot >= 0 for slot in last), size), _START, np.int32)
    return Net(table, a, out, b, bias, c, mix, d, counts, np.zeros(1, np.int64))


@njit(nogil=True, cache=True, error_model="numpy")
def _exp(x: Any) -> Any:
    """About e^x for x of 0 and below, by powers of two and a polynomial."""
    y = max(x * _LOG2E, _LOWEST)
    k = int(y - _HALF)
    r = y - np.float32(k)
    return (_ONE + r * (_C1 + r * (_C2 + r * (_C3 + r * (_C4 + r * _C5))))) * _POWERS[k + 40]


@njit(nogil=True, cache=True, error_model="numpy")
def _find(
    i: int, start: int, end: int, columns: int, known_PN: Any, row_size: int, column_size: int, contexts: Any,
    value_K: Any, line_J: Any,
) -> None:  # fmt: skip
    """Contexts of the symbol at i, of a tensor from start to end with so many columns, and its rows of the counts."""
    slots, at = contexts.slots_K3, (i - start) % columns
    for k in range(len(slots)):
        plane, right = slots[k, 0], slots[k, 2]
        j = i + slots[k, 1] * columns + right
        if plane == ROW:
            value_K[k] = min(UNKNOWN, row_size >> 8)
        elif plane == COLUMN:
            value_K[k] = min(UNKNOWN, column_size >> 8)
        elif j < start or j >= end or at + right < 0 or at + right >= columns:
            value_K[k] = UNKNOWN
        else:
            value_K[k] = known_PN[plane, j]
    for j in range(len(line_J)):
        line = 0
        for slot in contexts.counted_J4[j, 1:]:
            if slot >= 0:
                line = line * _VALUES + value_K[slot]
        line_J[j] = contexts.counted_J4[j, 0] + line


@njit(nogil=True, cache=True, error_model="numpy")
def _ask_counts(line_J: Any, net: Any, rows: Any, log_JS: Any) -> None:
    """Fill in the logarithms of the counts' shares; how much they have seen is a context of the network too."""
    J, K = len(line_J), len(rows) - len(line_J)
    for j in range(J):
        total, seen = 0, 0
        for count in net.counts_CS[line_J[j]]:
            total += count
        scale = _LOG_STEPS / np.float32(total)
        for s in range(log_JS.shape[1]):
            log_JS[j, s] = _LOGS[int(np.float32(net.counts_CS[line_J[j], s]) * scale)]
        most = total // _COUNT
        while most > 1 and seen < UNKNOWN:
            most >>= 1
            seen += 1
        rows[K + j] = (K + j) * _VALUES + seen


@njit(nogil=True, cache=True, error_model="numpy")
def _predict(rows: Any, net: Any, log_JS: Any, hidden_H: Any, share_S: Any, freq_S: Any) -> int:
    """Fill in the hidden layer, shares, and the shares as whole numbers of 1 and above; returns their sum."""
    H, S = net.out_HS.shape
    for h in range(H):
        hidden_H[h] = _ZERO
    for r in rows:
        for h in range(H):
            hidden_H[h] += net.table_RH[r, h]
    for s in range(S):
        share_S[s] = net.bias_S[s]
    for h in range(H):
        if hidden_H[h] < _ZERO:
            hidden_H[h] *= _LEAK
        x = hidden_H[h]
        for s in range(S):
            share_S[s] += x * net.out_HS[h, s]
    for j in range(len(log_JS)):
        weight = net.mix_JH[j, H]
        for h in range(H):
            weight += net.mix_JH[j, h] * hidden_H[h]
        for s in range(S):
            share_S[s] += weight * log_JS[j, s]
    top = share_S[0]
    for s in range(1, S):
        top = max(top, share_S[s])
    total = _ZERO
    for s in range(S):
        share_S[s] = _exp(share_S[s] - top)
        total += share_S[s]
    whole = 0
    for s in range(S):
        share_S[s] /= total
        freq_S[s] = 1 + int(share_S[s] * _WHOLE) if share_S[s] > _ZERO else 1
        whole += freq_S[s]
    return whole


@njit(nogil=True, cache=True, error_model="numpy")
def _descend(value_N: Any, square_N: Any, i: int, step: Any, rate: Any) -> None:
    """A step of RMSprop of one number; `step` is its gradient."""
    square = _KEPT * square_N[i] + _NEW * (step * step)
    square_N[i] = square
    value_N[i] -= rate * step / (np.sqrt(square) + _FLOOR)


@njit(nogil=True, cache=True, error_model="numpy")
def _learn(symbol: int, rows: Any, net: Any, log_JS: Any, hidden_H: Any, share_S: Any, back_H: Any) -> None:
    """One step down the gradient of the symbol's bits; `share_S` becomes that of the logits."""
    H, S = net.out_HS.shape
    rate = max(_LEAST, _RATE / np.sqrt(_ONE + np.float32(net.seen[0]) * _FALL))
    net.seen[0] += 1
    share_S[symbol] -= _ONE
    for h in range(H):
        back_H[h] = _ZERO
    for j in range(len(log_JS)):
        step = _ZERO
        for s in range(S):
            step += share_S[s] * log_JS[j, s]
        for h in range(H):
            back_H[h] += step * net.mix_JH[j, h]
            _descend(net.mix_JH[j], net.mix_sq[j], h, step * hidden_H[h], _SLOWER * rate)
        _descend(net.mix_JH[j], net.mix_sq[j], H, step, _SLOWER * rate)
    for h in range(H):
        back = _ZERO
        for s in range(S):
            back += net.out_HS[h, s] * share_S[s]
        back_H[h] += back
        for s in range(S):
            _descend(net.out_HS[h], net.out_sq[h], s, hidden_H[h] * share_S[s], rate)
        if hidden_H[h] < _ZERO:
            back_H[h] *= _LEAK
    for s in range(S):
        _descend(net.bias_S, net.bias_sq, s, share_S[s], rate)
    for r in rows:
        for h in range(H):
            _descend(net.table_RH[r], net.table_sq[r], h, back_H[h], rate)


@njit(nogil=True, cache=True, error_model="numpy")
def _count(symbol: int, line_J: Any, counts_CS: Any) -> None:
    for line in line_J:
        counts_CS[line, symbol] += _COUNT
        total = 0
        for count in counts_CS[line]:
            total += count
        if total > _LIMIT:
            for s in range(counts_CS.shape[1]):
                counts_CS[line, s] = max(counts_CS[line, s] >> 1, 1)


@njit(nogil=True, cache=True, error_model="numpy")
def _walk(
    reading: bool, sym_N: Any, data: Any, own: int, known_PN: Any, ends_E: Any, columns_E: Any, contexts: Any, net: Any
) -> Any:
    """Write `sym_N` into `data`, or read it from there; returns where the bytes end, and the range that is left."""
    zero: Any = np.int64(0)  # a plain 0 has a type of its own, for which all is compiled once more
    K, (H, S) = len(contexts.slots_K3), net.out_HS.shape
    J = len(contexts.counted_J4)
    rows, value_K, line_J = np.empty(K + J, np.int64), np.empty(K, np.int64), np.empty(J, np.int64)
    log_JS = np.empty((J, S), np.float32)
    hidden_H, back_H = np.empty(H, np.float32), np.empty(H, np.float32)
    share_S, freq_S = np.empty(S, np.float32), np.empty(S, np.int64)
    column_size, row_size = np.zeros(columns_E.max(), np.int64), zero
    low, span, code, n = np.uint64(0), _ONES, np.uint64(0), 0
    if reading:
        for n in range(8):
            code = (code << np.uint64(8)) | np.uint64(data[n] if n < len(data) else 0)
        n = 8
    e, start, end, columns = 0, zero, ends_E[0], columns_E[0]
    for i in range(len(sym_N)):
        while i >= end:
            e, start = e + 1, end
            end, columns, row_size = ends_E[e], columns_E[e], zero
            column_size[:] = 0
        at = (i - start) % columns
        _find(i, start, end, columns, known_PN, row_size, column_size[at], contexts, value_K, line_J)
        for k in range(K):
            rows[k] = k * _VALUES + value_K[k]
        _ask_counts(line_J, net, rows, log_JS)
        whole = _predict(rows, net, log_JS, hidden_H, share_S, freq_S)
        span //= np.uint64(whole)
        symbol, below = int(sym_N[i]), 0
        if reading:
            target, symbol = min(int((code - low) // span), whole - 1), 0
            while below + freq_S[symbol] <= target:
                below += freq_S[symbol]
                symbol += 1
            sym_N[i] = symbol
        else:
            for s in range(symbol):
                below += freq_S[s]
        low += np.uint64(below) * span
        span *= np.uint64(freq_S[symbol])
        if reading:
            low, span, code, n = shift_in(low, span, code, data, n)
        else:
            low, span, n = shift_out(low, span, data, n)
        known_PN[own, i] = symbol
        _learn(symbol, rows, net, log_JS, hidden_H, share_S, back_H)
        _count(symbol, line_J, net.counts_CS)
        size = contexts.size_S[symbol] + 256
        row_size += (size - row_size + 8) >> 4
        column_size[at] = size if column_size[at] == 0 else column_size[at] + ((size - column_size[at] + 2) >> 2)
    return n, low, span


def encode(
    sym_N: np.ndarray, known_PN: np.ndarray, ends_E: np.ndarray, columns_E: np.ndarray, contexts: Contexts, net: Net
) -> bytes:
    """Symbols as bytes; `net` learns.

    Args:
        sym_N: uint8, each below S.
        known_PN: symbols of other planes, uint8, below 17; the last plane is the own one and is written here.
        ends_E: where each tensor ends, int64, the last at N.
        columns_E: of each tensor as a matrix, int64, above 0.
        contexts: slots may point into the own plane only before the symbol.
        net: see `fresh_net`.
    """
    out = np.empty(3 * len(sym_N) + 16, np.uint8)  # a share of 2^-20 takes 20 bits
    n, low, span = _walk(False, sym_N, out, len(known_PN) - 1, known_PN, ends_E, columns_E, contexts, net)
    return out[:n].tobytes() + last_bytes(int(low), int(span))


def decode(
    data: bytes, known_PN: np.ndarray, ends_E: np.ndarray, columns_E: np.ndarray, contexts: Contexts, net: Net
) -> np.ndarray:
    """The symbols again, uint8, shape (N,); `net` learns as on writing. Anything from damaged bytes."""
    sym_N = np.zeros(known_PN.shape[1], np.uint8)
    own = np.frombuffer(bytearray(data), np.uint8)  # writable, as one kernel both reads and writes
    _walk(True, sym_N, own, len(known_PN) - 1, known_PN, ends_E, columns_E, contexts, net)
    return sym_N

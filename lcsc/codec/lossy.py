"""Differences and moments as a few symbols each, whose probabilities are learned from what a reader knows by then.

Weights are predicted by the *reconstruction* of the checkpoint before, so that errors do not add up along a chain; what
is left is pruned, put on a scale of its tensor and replaced by the nearest of a codebook. Moments are quantised as they
are, the second one on a logarithmic scale. Symbol 0 is "nothing": no difference, no moment.

Of each plane the symbols' counts are kept in a fine and a coarse context made of symbols that are known already: those
of the checkpoint before at the same place, and of the planes before in this one. A stretch takes the contexts that suit
it best. Counts go on from checkpoint to checkpoint. Sources: arXiv:2506.12000 (prediction, contexts of the checkpoint
before), arXiv:2406.11257 (ExCP: thresholds, joint mask); contexts across planes and their choice: lcsc.

N = numbers, S = symbols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.codec.arrays import State, Stretch
from lcsc.codec.coders import Wrong, encode_bytes
from lcsc.codec.container import Stream
from lcsc.codec.quantize import codebook, nearest, threshold

#: fine and coarse context by plane; `w`, `m`, `v` are symbols of this checkpoint, `w-` and so on of the one before
CONTEXTS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "w": ((("m-", "w-"), ("m-",)), (("w-", "m-", "v-"), ("w-",)), (("w-", "m-", "v-"), ("m-",)), ((), ())),
    "m": (
        (("w", "m-"), ("w",)),
        (("w", "m-", "v-"), ("w", "m-")),
        (("w", "m-", "w-"), ("m-",)),
        (("w", "m-", "v-"), ("v-",)),
        ((), ()),
    ),
    "v": ((("m", "v-"), ("v-",)), (("m", "v-", "m-"), ("v-", "m")), (("m", "v-", "w"), ("v-",)), ((), ())),
}
#: planes in the order in which they are coded
ORDER = ("w", "m", "v")
#: symbols that the contexts are chosen on
_TRIAL = 1 << 17
#: a symbol counts by its highest four bits in a context
_DIGIT = 16


@dataclass(frozen=True)
class Pruning:
    """What becomes symbol 0.

    Args:
        tau: differences of weights up to `tau` times their median size in a tensor; 0 drops none.
        beta: first moments up to `beta` times their mean size; 0 drops none.
        joint: with `tau` or `beta`, moments are dropped where the difference or the first moment is (ExCP's rule).
    """

    tau: float = 0.0
    beta: float = 0.0
    joint: bool = True


@dataclass(frozen=True)
class Plane:
    """A quantised plane of a stretch: symbols, and what each of them stands for.

    Args:
        symbols: uint8, shape (N,).
        scales: of each tensor, float32.
        codes: increasing, float32, shape (S,); symbol s above 0 stands for `scale * codes[s - 1]`.
    """

    symbols: np.ndarray
    scales: np.ndarray
    codes: np.ndarray

    def values(self, sizes: Sequence[int]) -> np.ndarray:
        """The numbers, float32, shape (N,); one rounded product each, so the same everywhere."""
        found, at = np.empty(self.symbols.size, np.float32), 0
        for scale, size in zip(self.scales, sizes, strict=True):
            table = np.concatenate([np.zeros(1, np.float32), scale * self.codes]).astype(np.float32)
            found[at : at + size] = table[self.symbols[at : at + size]]
            at += size
        return found


def quantise(values: Sequence[np.ndarray], kept: Sequence[np.ndarray], bits: int, log: bool) -> Plane:
    """Numbers of a stretch's tensors as symbols below 2^bits; those not kept become 0. `bits` 0 drops all.

    Args:
        values: float32, flat; those kept above 0 where `log`.
        kept: which count, bool.
        bits: at most 8.
        log: quantise the logarithm.
    """
    scaled, scales = [], []
    for value_N, kept_N in zip(values, kept, strict=True):
        some = value_N[kept_N].astype(np.float64)
        if log:
            some = np.log2(some)
            scale = float(np.median(some)) if some.size else 0.0
            scales.append(2.0**scale)
            scaled.append(some - scale)
        else:
            scale = float(np.sqrt(np.mean(some**2))) if some.size else 1.0
            scales.append(scale)
            scaled.append(some / (scale or 1.0))
    every = np.concatenate(scaled)
    codes = codebook(every, (1 << bits) - 1) if bits and every.size else np.empty(0, np.float32)
    found = []
    for kept_N, some in zip(kept, scaled, strict=True):
        symbol_N = np.zeros(kept_N.size, np.uint8)
        if codes.size:
            symbol_N[kept_N] = nearest(some, codes) + np.uint8(1)
        found.append(symbol_N)
    with np.errstate(over="ignore"):  # the caller looks at what is read back
        stored = np.exp2(codes.astype(np.float64)).astype(np.float32) if log else codes
    return Plane(np.concatenate(found), np.array(scales, np.float32), stored)


def planes_of(
    stretch: Stretch, arrays: Mapping[str, Sequence[np.ndarray]], delta: Sequence[np.ndarray] | None, pruning: Pruning
) -> dict[str, Plane]:
    """The quantised planes of a stretch.

    Args:
        stretch: with bits for some planes.
        arrays: by plane, float32, flat, one a tensor.
        delta: weights minus their prediction; None for an anchor, whose weights are not quantised.
        pruning: what to drop.
    """
    found: dict[str, Plane] = {}
    kept_w = None
    if delta is not None and "w" in stretch.bits:
        kept_w = [(np.abs(x) > threshold(x, pruning.tau)) & (x != 0) for x in delta]
        found["w"] = quantise(delta, kept_w, stretch.bits["w"], log=False)
    if "m" not in stretch.bits and "v" not in stretch.bits:
        return found
    kept_m = [x != 0 for x in arrays["m"]]
    if pruning.beta:
        kept_m = [k & (np.abs(x) > pruning.beta * np.abs(x).mean()) for k, x in zip(kept_m, arrays["m"], strict=True)]
    joint = pruning.joint and (pruning.tau or pruning.beta)
    if joint and pruning.tau and kept_w is not None:
        kept_m = [a & b for a, b in zip(kept_m, kept_w, strict=True)]
    if "m" in stretch.bits:
        found["m"] = quantise(arrays["m"], kept_m, stretch.bits["m"], log=False)
    if "v" in stretch.bits:
        kept_v = [(x > 0) & (k if joint else True) for x, k in zip(arrays["v"], kept_m, strict=True)]
        found["v"] = quantise(arrays["v"], kept_v, stretch.bits["v"], log=True)
    return found


# ----------------------------------------------------------------------------------------------------------- streams


def digits(symbols: np.ndarray, bits: int) -> np.ndarray:
    """What symbols of this many bits count as in a context, below 16."""
    return symbols >> np.uint8(max(0, bits - 4))


def _contexts(names: Sequence[str], known: Mapping[str, np.ndarray], size: int) -> tuple[np.ndarray, int]:
    """A context of some names, int32, shape (N,), and how many there are; those unknown count as 0."""
    found, num = np.zeros(size, np.int32), 1
    for name in names:
        num *= _DIGIT
        found = found * _DIGIT
        if name in known:
            found = found + known[name]
    return found, num


def known_symbols(stretch: Stretch, state: State | None) -> dict[str, np.ndarray]:
    """The symbols of the checkpoint before by `w-`, `m-` and `v-`, as far as all tensors of the stretch have some."""
    found = {}
    for plane in stretch.planes:
        names = stretch.of(plane)
        if state is not None and all(name in state.symbols for name in names):
            found[f"{plane}-"] = np.concatenate([state.symbols[name] for name in names])
    return found


def parts_of(symbols: np.ndarray, bits: int) -> list[tuple[np.ndarray, int]]:
    """Symbols in parts of at most 16 values, the highest bits first, and how many values each has."""
    if bits <= 4:
        return [(symbols, 1 << bits)]
    low = bits - 4
    return [(symbols >> np.uint8(low), 16), (symbols & np.uint8((1 << low) - 1), 1 << low)]


def joined(parts: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """The symbols whose parts these are."""
    return parts[0] if bits <= 4 else (parts[0] << np.uint8(bits - 4)) | parts[1]


Counts = tuple[np.ndarray, np.ndarray]


def _fresh(mode: int, plane: str, bits: int) -> list[Counts]:
    """Counts of a plane's parts that have seen nothing."""
    from lcsc.kernels.entropy import fresh_counts

    fine, coarse = (_DIGIT ** len(names) for names in CONTEXTS[plane][mode])
    found = [fresh_counts(fine, coarse, min(16, 1 << bits))]
    if bits > 4:
        found.append(fresh_counts(_DIGIT, 1, 1 << (bits - 4)))
    return found


def _walk(
    data: list[bytes] | None, symbols: np.ndarray | None, plane: str, mode: int, bits: int, size: int,
    known: Mapping[str, np.ndarray], counts: list[Counts],
) -> tuple[list[bytes | None], np.ndarray]:  # fmt: skip
    """Write `symbols`, or read `data`: both go the same way."""
    from lcsc.kernels.entropy import decode_adaptive, encode_adaptive

    fine_N, coarse_N = (_contexts(names, known, size)[0] for names in CONTEXTS[plane][mode])
    out: list[bytes | None] = []
    found: list[np.ndarray] = []
    for i, own in enumerate(counts):
        if i:  # the lower bits, given the higher ones
            fine_N, coarse_N = found[0].astype(np.int32), np.zeros(size, np.int32)
        if symbols is not None:
            part_N = np.ascontiguousarray(parts_of(symbols, bits)[i][0])
            out.append(encode_adaptive(part_N, fine_N, coarse_N, own))
        else:
            assert data is not None
            part_N = decode_adaptive(data[i], fine_N, coarse_N, own)
        found.append(part_N)
    return out, joined(found, bits)


def _copied(counts: list[Counts]) -> list[Counts]:
    return [(fine.copy(), coarse.copy()) for fine, coarse in counts]


def encode_plane(
    plane: str, symbols: np.ndarray, bits: int, known: Mapping[str, np.ndarray], before: Any
) -> tuple[list[Any], list[Stream], Any]:
    """Symbols as streams.

    Args:
        plane: `w`, `m` or `v`.
        symbols: uint8, shape (N,), below 2^bits.
        bits: 1 to 8.
        known: symbols by the names that contexts have.
        before: what the checkpoint before learned, None for nothing.

    Returns:
        Parameters, streams, and what the next checkpoint may go on from.
    """
    tries: list[tuple[int, int, bool]] = []
    head = {name: values[:_TRIAL] for name, values in known.items()}
    part = symbols[:_TRIAL]
    for mode, names in enumerate(CONTEXTS[plane]):
        if mode and all(name not in known for name in (*names[0], *names[1])) and any(names):
            continue  # no better than the last, which has no contexts
        for warm in (False, True):
            if warm and (before is None or before[0] != (mode, bits)):
                continue
            counts = _copied(before[1]) if warm else _fresh(mode, plane, bits)
            out, _ = _walk(None, part, plane, mode, bits, len(part), head, counts)
            tries.append((sum(len(part) if data is None else len(data) for data in out), mode, warm))
    _, mode, warm = min(tries)
    counts = _copied(before[1]) if warm else _fresh(mode, plane, bits)
    out, _ = _walk(None, symbols, plane, mode, bits, len(symbols), known, counts)
    if any(data is None for data in out):
        streams = [encode_bytes(np.ascontiguousarray(values)) for values, _ in parts_of(symbols, bits)]
        return [bits, -1, 0], streams, None
    streams = [Stream("counts", [], data or b"") for data in out]
    return [bits, mode, int(warm)], streams, ((mode, bits), counts)


def decode_plane(
    plane: str, params: Any, streams: Sequence[tuple[Sequence[Any], bytes]], size: int,
    known: Mapping[str, np.ndarray], before: Any,
) -> tuple[np.ndarray, Any]:  # fmt: skip
    """The symbols again, uint8, shape (N,), and what the next checkpoint may go on from.

    Raises:
        Wrong: settings that `encode_plane` does not give.
    """
    from lcsc.codec.coders import decode_bytes

    bits, mode, warm = params
    if not 1 <= bits <= 8 or not -1 <= mode < len(CONTEXTS[plane]) or len(streams) != (2 if bits > 4 else 1):
        raise Wrong(f"symbols are coded as {str(params)[:40]}")
    if mode < 0:
        parts = [decode_bytes(row[0], row[1], data, size) for row, data in streams]
        if any(
            part.max(initial=0) >= num
            for part, num in zip(parts, (min(16, 1 << bits), 1 << (bits - 4) if bits > 4 else 0), strict=False)
        ):
            raise Wrong("a symbol has more bits than its plane")
        return joined(parts, bits), None
    if warm and (before is None or before[0] != (mode, bits)):
        raise Wrong("symbols go on from counts that the checkpoint before does not have")
    counts = _copied(before[1]) if warm else _fresh(mode, plane, bits)
    _, symbols = _walk([data for _, data in streams], None, plane, mode, bits, size, known, counts)
    return symbols, ((mode, bits), counts)

"""Numbers without loss, against those of the checkpoint before: three ways, of which the smallest is kept.

* `planes`: as they are or XOR the reference, byte by byte of their width, each plane by the coder that suits it.
* `delta`: differences of the numbers' places on the number line, as tokens of size and first digits, and the digits
  that remain as they are. The tokens' shares depend on a context.
* `exponent`: floats as they are; the exponent in a context, the digits as they are.

Contexts are what a reader knows already: the exponent of the reference, the last difference's size, and for a moment of
the optimizer the exponents of the other moment. Differences of trained weights are known to within their exponent from
there, which byte planes alone do not see. N = numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.codec.coders import Wrong, count, decode_bytes, encode_bytes, entropy_bits
from lcsc.codec.container import Stream
from lcsc.core.dtypes import ITEMSIZE

#: first bit of a float's exponent (or of its whole first byte), by dtype
EXPONENT = {"float32": 23, "bfloat16": 7, "float16": 8, "float8_e4m3fn": 0, "float8_e5m2": 0}
#: floats whose bits, with the sign turned, lie in the order of the numbers
ORDERED = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
#: most numbers that a choice is made on
_SAMPLE = 1 << 17
#: a context counts in this many steps, alone or beside another
_ALONE, _BESIDE = 64, 16
#: ways are tried whose estimate is within this factor of the least
_NEAR = 1.04
#: bytes that a share takes in a table, as far as a choice is concerned
_SHARE = 1.5


@dataclass(frozen=True)
class Known:
    """What a reader has before a stretch of numbers is read; arrays of shape (N,).

    Args:
        dtype: of the numbers.
        reference: bits of the checkpoint before, unsigned; None for an anchor.
        contexts: sizes by what they are of, uint8, such as exponents.
    """

    dtype: str
    reference: np.ndarray | None
    contexts: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Coded:
    """Streams of a stretch: `how` and `params` say which way they were made."""

    how: str
    params: list[Any]
    streams: list[Stream]

    @property
    def nbytes(self) -> int:
        """Bytes of the streams."""
        return sum(len(stream.data) for stream in self.streams)


#: bytes that a way takes, about, and what carries it out
Way = tuple[float, Callable[[], Coded]]


def unsigned(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of any dtype as unsigned numbers of its width, flat; complex ones as their two parts."""
    size = min(ITEMSIZE[dtype], 8)
    size = size // 2 if dtype == "complex64" else size
    return np.ascontiguousarray(bits).reshape(-1).view(f"<u{size}")


def exponents(bits_N: np.ndarray, dtype: str) -> np.ndarray:
    """How large each number is, uint8: a float's exponent, the top byte of others."""
    width = 8 * bits_N.itemsize
    return ((bits_N >> bits_N.dtype.type(EXPONENT.get(dtype, width - 8))) & bits_N.dtype.type(255)).astype(np.uint8)


def _ordered(bits_N: np.ndarray, dtype: str) -> np.ndarray:
    """Places on the number line, mod 2^width."""
    if dtype not in ORDERED:
        return bits_N
    top = bits_N.dtype.type(1 << (8 * bits_N.itemsize - 1))
    return np.where(bits_N & top, ~bits_N, bits_N | top)


def _unordered(place_N: np.ndarray, dtype: str) -> np.ndarray:
    if dtype not in ORDERED:
        return place_N
    top = place_N.dtype.type(1 << (8 * place_N.itemsize - 1))
    return np.where(place_N & top, place_N ^ top, ~place_N)


# --------------------------------------------------------------------------------------------------------- contexts


def _context(known: Known, names: Sequence[str], tops: Sequence[int]) -> tuple[np.ndarray, int]:
    """Contexts of some names together, uint16, and how many there are: steps down from the largest of each."""
    steps = _ALONE if len(names) == 1 else _BESIDE
    found, num = np.zeros(1, np.uint16), 1
    for name, top in zip(names, tops, strict=True):
        down = np.clip(top - known.contexts[name].astype(np.int16), 0, steps - 1).astype(np.uint16)
        found, num = found * np.uint16(steps) + down, num * steps
    return found, num


def _tops(known: Known, names: Sequence[str]) -> list[int]:
    return [int(known.contexts[name].max(initial=0)) for name in names]


def _cheapest(token_N: np.ndarray, known: Known) -> tuple[float, list[str]]:
    """Bytes that tokens take, and the contexts, at most two, with which they take them."""
    part = slice(None, None, max(1, len(token_N) // _SAMPLE))
    scale, tokens = len(token_N) / len(token_N[part]), token_N[part]

    def cost(names: list[str]) -> float:
        some = Known(known.dtype, None, {name: known.contexts[name][part] for name in names})
        counts = count(tokens, *_context(some, names, _tops(some, names))) if names else count(tokens)
        return entropy_bits(counts) / 8 * scale + _SHARE * int((counts > 0).sum())

    found: tuple[float, list[str]] = (cost([]), [])
    alone = sorted((cost([name]), name) for name in known.contexts)
    if alone and alone[0][0] < found[0]:
        found = (alone[0][0], [alone[0][1]])
        pairs = [(cost([alone[0][1], name]), [alone[0][1], name]) for _, name in alone[1:]]
        found = min([found, *pairs])
    return found


def _code_tokens(token_N: np.ndarray, known: Known, names: list[str]) -> tuple[Stream, list[list[Any]]]:
    tops = _tops(known, names)
    stream = encode_bytes(token_N, *_context(known, names, tops)) if names else encode_bytes(token_N)
    return stream, [[name, top] for name, top in zip(names, tops, strict=True)]


def _decode_tokens(row: Sequence[Any], data: bytes, size: int, known: Known, said: Any) -> np.ndarray:
    names, tops = [str(name) for name, _ in said], [int(top) for _, top in said]
    if len(names) > 2 or any(name not in known.contexts for name in names):
        raise Wrong(f"a stream depends on {names}")
    contexts = _context(known, names, tops) if names else ()
    return decode_bytes(row[0], row[1], data, size, *contexts)


# ----------------------------------------------------------------------------------------------------------- the ways


def encode(bits_N: np.ndarray, known: Known) -> Coded:
    """Unsigned numbers as the smallest of the three ways; those whose estimate is far from the best are not tried."""
    found = [_encode_planes(bits_N, known)]
    if known.reference is not None and bits_N.size:
        found.append(_encode_delta(bits_N, known))
    if known.dtype in EXPONENT and bits_N.size:
        found.append(_encode_exponent(bits_N, known))
    least = min(estimate for estimate, _ in found)
    return min((make() for estimate, make in found if estimate <= _NEAR * least), key=lambda coded: coded.nbytes)


def decode(
    how: str, params: Any, streams: Sequence[tuple[Sequence[Any], bytes]], size: int, known: Known
) -> np.ndarray:
    """The unsigned numbers again, shape (N,).

    Args:
        how, params: as `encode` gave them.
        streams: coder with parameters, and bytes, of each.
        size: N.
        known: as on writing.

    Raises:
        Wrong: streams that do not fit.
        MissingExtraError: a stream of zstd without the package `zstandard`.
    """
    way = {"planes": _decode_planes, "delta": _decode_delta, "exponent": _decode_exponent}.get(how)
    if way is None:
        raise Wrong(f"a part is coded as `{str(how)[:20]}`")
    try:
        return way(params, streams, size, known)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise Wrong(f"the settings of a part are {str(params)[:60]}") from None


def _kind(known: Known) -> np.dtype:
    return unsigned(np.empty(0, np.uint8), known.dtype).dtype


def _encode_planes(bits_N: np.ndarray, known: Known) -> Way:
    ways = [("none", bits_N)]
    if known.reference is not None:
        ways.append(("xor", bits_N ^ known.reference))
    part = slice(None, None, max(1, bits_N.size // _SAMPLE))

    def cost(numbers: np.ndarray) -> float:
        planes = np.ascontiguousarray(numbers[part]).view(np.uint8).reshape(-1, bits_N.itemsize)
        bits = sum(entropy_bits(count(planes[:, i])) for i in range(bits_N.itemsize))
        return bits / 8 * bits_N.size / max(1, len(planes))

    costs = [cost(numbers) for _, numbers in ways]
    least = min(costs)
    name, numbers = ways[costs.index(least)]

    def make() -> Coded:
        planes = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, bits_N.itemsize)
        streams = [encode_bytes(np.ascontiguousarray(planes[:, i])) for i in range(bits_N.itemsize)]
        return Coded("planes", [name], streams)

    return least, make


def _decode_planes(params: Any, streams: Sequence[tuple[Any, bytes]], size: int, known: Known) -> np.ndarray:
    kind = _kind(known)
    if len(streams) != kind.itemsize or params not in (["none"], ["xor"]):
        raise Wrong(f"{kind.itemsize} planes are {len(streams)} streams of {str(params)[:30]}")
    planes = np.empty((size, kind.itemsize), np.uint8)
    for i, (row, data) in enumerate(streams):
        planes[:, i] = decode_bytes(row[0], row[1], data, size)
    numbers = planes.reshape(-1).view(kind)
    return numbers if params == ["none"] else numbers ^ _need(known)


def _need(known: Known) -> np.ndarray:
    if known.reference is None:
        raise Wrong("a part needs a reference that it does not have")
    return known.reference


def _with_digits(how: str, token_N: np.ndarray, rest_N: np.ndarray, width_N: np.ndarray, known: Known) -> Way:
    """Tokens in their cheapest contexts, and the digits that they leave."""
    nbytes = int(width_N.sum(dtype=np.int64)) // 8 + 1
    tokens, names = _cheapest(token_N, known)

    def make() -> Coded:
        from lcsc.kernels.entropy import pack_bits

        stream, said = _code_tokens(token_N, known, names)
        out = np.empty(nbytes, np.uint8)
        return Coded(how, said, [stream, Stream("raw", [], out[: pack_bits(rest_N, width_N, out)].tobytes())])

    return nbytes + tokens, make


def _encode_delta(bits_N: np.ndarray, known: Known) -> Way:
    from lcsc.kernels.entropy import split_delta

    bits = 8 * bits_N.itemsize
    delta_N = (_ordered(bits_N, known.dtype) - _ordered(_need(known), known.dtype)).astype(np.uint64)
    token_N, width_N = np.empty(bits_N.size, np.uint8), np.empty(bits_N.size, np.uint8)
    rest_N = np.empty(bits_N.size, np.uint64)
    split_delta(delta_N, bits, token_N, rest_N, width_N)
    return _with_digits("delta", token_N, rest_N, width_N, known)


def _decode_delta(params: Any, streams: Sequence[tuple[Any, bytes]], size: int, known: Known) -> np.ndarray:
    from lcsc.kernels.entropy import join_delta, unpack_bits, widths_of

    kind = _kind(known)
    (row, data), (_, digits) = streams
    token_N = _decode_tokens(row, data, size, known, params)
    width_N, rest_N, delta_N = np.empty(size, np.uint8), np.empty(size, np.uint64), np.empty(size, np.uint64)
    bits = 8 * kind.itemsize
    widths_of(token_N, bits, width_N)
    if width_N.max(initial=0) > bits:
        raise Wrong("a difference has more digits than its dtype")
    unpack_bits(np.frombuffer(digits, np.uint8), width_N, rest_N)
    join_delta(token_N, rest_N, bits, delta_N)
    return _unordered(_ordered(_need(known), known.dtype) + delta_N.astype(kind), known.dtype)


def _encode_exponent(bits_N: np.ndarray, known: Known) -> Way:
    bits, first = 8 * bits_N.itemsize, EXPONENT[known.dtype]
    token_N, wide = exponents(bits_N, known.dtype), bits_N.astype(np.uint64)
    rest_N = wide & np.uint64((1 << first) - 1)
    if first + 8 < bits:
        rest_N |= (wide >> np.uint64(first + 8)) << np.uint64(first)
    # token 0 is the number 0 alone, which needs no digits; other numbers of exponents 0 and 1 share token 1
    small_N = (token_N < 2) & (bits_N != 0)
    rest_N[small_N] |= token_N[small_N].astype(np.uint64) << np.uint64(bits - 8)
    token_N[small_N] = 1
    return _with_digits("exponent", token_N, rest_N, _widths(token_N, bits), known)


def _widths(token_N: np.ndarray, bits: int) -> np.ndarray:
    table = np.full(256, bits - 8, np.uint8)
    table[:2] = 0, bits - 7
    return table[token_N]


def _decode_exponent(params: Any, streams: Sequence[tuple[Any, bytes]], size: int, known: Known) -> np.ndarray:
    from lcsc.kernels.entropy import unpack_bits

    kind, first = _kind(known), EXPONENT[known.dtype]
    (row, data), (_, digits) = streams
    token_N = _decode_tokens(row, data, size, known, params)
    rest_N, bits = np.empty(size, np.uint64), 8 * kind.itemsize
    unpack_bits(np.frombuffer(digits, np.uint8), _widths(token_N, bits), rest_N)
    exponent_N, small_N = token_N.astype(np.uint64), token_N == 1
    exponent_N[small_N] = rest_N[small_N] >> np.uint64(bits - 8)
    rest_N[small_N] &= np.uint64((1 << (bits - 8)) - 1)
    high = np.uint64(0) if first + 8 > bits - 1 else (rest_N >> np.uint64(first)) << np.uint64(first + 8)
    return ((rest_N & np.uint64((1 << first) - 1)) | exponent_N << np.uint64(first) | high).astype(kind)


def sizes(bits_N: np.ndarray, reference_N: np.ndarray, dtype: str) -> np.ndarray:
    """Digits of each difference of places on the number line, uint8, shape (N,)."""
    moved = _ordered(bits_N, dtype) - _ordered(reference_N, dtype)
    moved = np.minimum(moved, ~moved + moved.dtype.type(1))
    return np.frexp(moved.astype(np.float64))[1].astype(np.uint8)

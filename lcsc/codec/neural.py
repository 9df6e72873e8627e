"""Symbols coded by a network that learns while it codes: smaller and slower than counts, for archives.

Planes and symbols are those of `lcsc.codec.lossy`; here a small network (`lcsc.kernels.neural`) tells the shares of
each next symbol from the symbols around its place in the checkpoint before and in the planes before, and from those
behind it in its own plane. It goes on from checkpoint to checkpoint.

Its arithmetic is float32. It does not depend on threads, and processors that follow IEEE 754 agree; but one compiled
otherwise reads other symbols. So a writer reads its own streams at once and compares; and it records its environment,
with a digest of what new networks make of some fixed symbols. A reader whose digest is another refuses.
Source: arXiv:2506.12000 (networks over the checkpoint before); rows, columns and planes beside it: lcsc.

N = numbers of a stretch, P = planes, E = tensors.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc.codec.coders import Wrong
from lcsc.codec.container import Stream
from lcsc.codec.lossy import joined, parts_of
from lcsc.core.errors import BankError

if TYPE_CHECKING:
    from lcsc.kernels.neural import Contexts, Net

#: number of the model below; files of another are refused
MODEL = 1
#: places around a symbol: rows down, columns right
_HERE = ((0, 0),)
_CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
_SQUARE = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
_BEHIND = ((0, -1), (0, -2), (-1, -1), (-1, 0), (-1, 1))
#: planes that a context may be of, the own one last: of this checkpoint and, with `-`, of the one before
_PLANES = ("w-", "m-", "v-", "w", "m", "high", "own")
#: contexts by plane, and pairs of them at the symbol's own place
_SLOTS: dict[str, tuple[tuple[str, tuple[tuple[int, int], ...]], ...]] = {
    "w": (("w-", _SQUARE), ("m-", _CROSS), ("v-", _HERE), ("own", _BEHIND)),
    "m": (("m-", _CROSS), ("w", _SQUARE), ("v-", _HERE), ("w-", _HERE), ("own", _BEHIND)),
    "v": (("v-", _SQUARE), ("m", _SQUARE), ("w", _HERE), ("m-", _HERE), ("own", _BEHIND)),
    "low": (("high", _HERE),),
}
#: contexts of the tables of counts, of slots at the symbol's own place
_COUNTED = {
    "w": (("w-", "m-", "v-"), ("m-", "w-"), ("w-",)),
    "m": (("w", "m-", "v-"), ("w", "m-"), ("v-",)),
    "v": (("m", "v-", "m-"), ("m", "v-"), ("v-",)),
    "low": (("high",),),
}


@functools.cache
def _contexts(plane: str, size: int) -> Contexts:
    """Contexts of a plane, or of `low` digits, for symbols below `size`."""
    from lcsc.kernels.neural import COLUMN, ROW, UNKNOWN, Contexts

    slots = [(_PLANES.index(name), *place) for name, places in _SLOTS[plane] for place in places]
    at = {_PLANES[source]: k for k, (source, *place) in enumerate(slots) if place == [0, 0]}
    if plane != "low":
        slots += [(ROW, 0, 0), (COLUMN, 0, 0)]
    first, counted = 0, []
    for names in _COUNTED[plane]:
        counted.append([first, *[at[name] for name in names], *[-1] * (3 - len(names))])
        first += (UNKNOWN + 1) ** len(names)
    symbol_S = np.arange(size)
    size_S = symbol_S * 16 // size if plane == "v" else np.where(symbol_S, abs(2 * symbol_S - size) * 16 // size, 0)
    return Contexts(
        np.array(slots, np.int64), np.array(counted, np.int64), 256 * np.minimum(size_S, 15).astype(np.int64)
    )


class _Place:
    """Where the numbers of a stretch lie."""

    def __init__(self, shapes: Sequence[Sequence[int]], size: int) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) != size or not size:
            raise Wrong(f"{size} symbols are of tensors of {sum(sizes)} numbers")
        some = [
            (size, size // (shape[0] if len(shape) > 1 else 1))
            for size, shape in zip(sizes, shapes, strict=True)
            if size
        ]
        self.ends_E = np.cumsum([size for size, _ in some], dtype=np.int64)
        self.columns_E = np.array([columns for _, columns in some], np.int64)
        self.size = size

    def arguments(self, planes: Mapping[str, np.ndarray], digits: tuple[str, int], net: Net) -> tuple[Any, ...]:
        """For the kernel: planes by name as uint8 of shape (P, N), ends, columns, contexts and network."""
        from lcsc.kernels.neural import UNKNOWN

        known_PN = np.full((len(_PLANES), self.size), UNKNOWN, np.uint8)
        for name, symbols in planes.items():
            if name in _PLANES:
                known_PN[_PLANES.index(name)] = symbols
        return known_PN, self.ends_E, self.columns_E, _contexts(*digits), net


def _digits(plane: str, bits: int) -> list[tuple[str, int]]:
    """Whose contexts the digits of symbols of so many bits have, the highest first, and how many values."""
    return [(plane, 1 << bits)] if bits <= 4 else [(plane, 16), ("low", 1 << (bits - 4))]


def _nets(plane: str, bits: int, before: Any) -> list[Net]:
    """Networks of the digits: new, or copies of those that the checkpoint before trained."""
    from lcsc.kernels.neural import fresh_net

    if before is not None:
        return [net.copy() for net in before[1]]
    return [fresh_net(_contexts(*digits)) for digits in _digits(plane, bits)]


def _same(nets: Sequence[Net], others: Sequence[Net]) -> bool:
    return all(
        np.array_equal(a, b) for net, other in zip(nets, others, strict=True) for a, b in zip(net, other, strict=True)
    )


def encode_plane(
    plane: str, symbols: np.ndarray, bits: int, known: Mapping[str, np.ndarray], before: Any,
    shapes: Sequence[Sequence[int]],
) -> tuple[list[Any], list[Stream], Any]:  # fmt: skip
    """Symbols as streams, which were read again and compared.

    Args:
        plane: `w`, `m` or `v`.
        symbols: uint8, shape (N,), below 2^bits.
        bits: 1 to 8.
        known: symbols by the names that contexts have, below 16.
        before: what the checkpoint before learned, None for nothing.
        shapes: of the tensors.

    Returns:
        Parameters, streams, and what the next checkpoint may go on from.

    Raises:
        BankError: the streams did not give the symbols back.
    """
    from lcsc.kernels.neural import encode

    place, kind = _Place(shapes, symbols.size), ("neural", MODEL, bits)
    if before is not None and before[0] != kind:
        before = None
    nets, streams, planes = _nets(plane, bits, before), [], known
    for net, digits, (part_N, _) in zip(nets, _digits(plane, bits), parts_of(symbols, bits), strict=True):
        data = encode(part_N, *place.arguments(planes, digits, net))
        streams.append(Stream("neural", [], data))
        planes = {"high": part_N}
    params = [bits, int(before is not None), MODEL]
    rows = [([stream.coder, stream.params], stream.data) for stream in streams]
    again, (_, others) = decode_plane(plane, params, rows, symbols.size, known, before, shapes)
    if not np.array_equal(again, symbols) or not _same(nets, others):
        raise BankError(
            f"{symbols.size} symbols of plane {plane} did not come back from the stream that `coder` neural made of "
            "them, because this machine did not compute the same twice. Use coder=counts, which works in integers."
        )
    return params, streams, (kind, nets)


def decode_plane(
    plane: str, params: Any, streams: Sequence[tuple[Sequence[Any], bytes]], size: int,
    known: Mapping[str, np.ndarray], before: Any, shapes: Sequence[Sequence[int]],
) -> tuple[np.ndarray, Any]:  # fmt: skip
    """The symbols again, uint8, shape (N,), and what the next checkpoint may go on from.

    Raises:
        Wrong: settings that `encode_plane` does not give.
    """
    from lcsc.kernels.neural import decode

    bits, warm, model = params
    if model != MODEL:
        raise Wrong(f"its symbols are of the network {str(model)[:20]}, and this lcsc has {MODEL}")
    if not 1 <= bits <= 8 or len(streams) != len(_digits(plane, bits)):
        raise Wrong(f"symbols are coded as {str(params)[:40]}")
    kind = ("neural", MODEL, bits)
    if warm and (before is None or before[0] != kind):
        raise Wrong("symbols go on from a network that the checkpoint before does not have")
    place, nets = _Place(shapes, size), _nets(plane, bits, before if warm else None)
    parts: list[np.ndarray] = []
    for net, digits, (_, data) in zip(nets, _digits(plane, bits), streams, strict=True):
        planes = {"high": parts[0]} if parts else known
        parts.append(decode(data, *place.arguments(planes, digits, net)))
    return joined(parts, bits), (kind, nets)


# ------------------------------------------------------------------------------------------------------- environment


def environment() -> dict[str, str]:
    """What a stream of this process depends on: `arithmetic` is a digest of what comes out, the rest says of where."""
    from lcsc.kernels.neural import target

    versions = {name: importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")}
    return {
        "arithmetic": _arithmetic(),
        "machine": platform.machine(),
        "byteorder": sys.byteorder,
        "processor": target(),
        **versions,
    }


@functools.cache
def _arithmetic() -> str:
    """Digest of the bytes and the networks that come of symbols that are the same everywhere."""
    from lcsc.kernels.neural import encode, fresh_net

    shapes, found = [(24, 32), (7, 40), (200,)], hashlib.sha256()
    place = _Place(shapes, size := sum(map(math.prod, shapes)))
    at = np.arange(len(_PLANES) * size, dtype=np.uint64)
    mixed = (at * at * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).reshape(len(_PLANES), size)
    planes = dict(zip(_PLANES, (mixed % np.uint64(16)).astype(np.uint8), strict=True))
    for plane in _SLOTS:
        own_N = np.minimum(planes["own"], planes["m-"] // np.uint8(3))
        own_N[size // 2 :] = 3  # shares near 0 and 1
        digits = (plane, 16)
        net = fresh_net(_contexts(*digits))
        found.update(encode(own_N, *place.arguments(planes, digits, net)))
        found.update(b"".join(part.tobytes() for part in net))
    return found.hexdigest()[:32]


def check_environment(path: Path, said: Any) -> None:
    """Raise BankError unless this process computes as the one that wrote `said`, which `environment` gave there."""
    if said.__class__ is not dict or said.get("arithmetic") != _arithmetic():
        raise refusal(path, said)


def refusal(path: Path, said: Any) -> BankError:
    """The error for a file whose network does not come out here as where it was written."""
    here, there = environment(), said if said.__class__ is dict else {}
    other = [
        f"{key} {str(there.get(key))[:40]} there, {own} here" for key, own in here.items() if there.get(key) != own
    ]
    return BankError(
        f"`{path}` was coded by a network (coder=neural) that does not compute here what it did where it was written: "
        f"{'; '.join(other) or 'the environments look the same'}. Read it there, or pack the bank there again with "
        "coder=counts, which is read everywhere."
    )

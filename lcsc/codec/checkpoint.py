"""One checkpoint against the one before it: bytes of a file, and back.

The header of a file names `step`, `lossy`, `reference` (file and digest of the checkpoint that it needs, null for an
anchor), `digest` (of tensors, dtypes, shapes and all numbers as a reader gets them), `tensors` (name, dtype, shape),
`parts`, `about` (plain values of whoever wrote it) and, where a network coded symbols, `environment`. A part is a plane
of a stretch: number of the stretch, plane, tensors, way, parameters, rows of its streams, and SHA-256 (16 bytes of it)
of its numbers as they are read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lcsc.codec import lossless, lossy, neural
from lcsc.codec.arrays import State, Stretch, Tensors, flat, put, stretches
from lcsc.codec.coders import Wrong
from lcsc.codec.container import Container, Stream, damaged, pack
from lcsc.codec.settings import CodecSettings
from lcsc.core.digests import value_digest
from lcsc.core.dtypes import ITEMSIZE
from lcsc.core.errors import BankError, NonFiniteError

#: how parts of symbols are coded, by coder
_SYMBOLS = {"counts": "symbols", "neural": "neural"}
#: most tensors of a file, and axes and numbers of a tensor
_MAX_TENSORS, _MAX_AXES, _MAX_NUMBERS = 1_000_000, 64, 1 << 40


def _sha(bits_N: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(bits_N).data).hexdigest()[:32]


def _digest(tensors: list[Any], shas: list[list[Any]]) -> str:
    return value_digest([tensors, sorted(shas)])


class _Known:
    """What is known of a stretch while its planes are coded one after another."""

    def __init__(self, stretch: Stretch, state: State | None, kinds: Mapping[str, tuple[str, tuple]]) -> None:
        self.stretch, self.state = stretch, state
        self.shapes = [kinds[name][1] for name in stretch.names]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.reference: dict[str, np.ndarray] = {}
        for plane in stretch.planes:
            names = stretch.of(plane)
            if state is not None and all(n in state.tensors and state.tensors[n].kind == kinds[n] for n in names):
                self.reference[plane] = flat(state.tensors, names)
        self.done: dict[str, np.ndarray] = {}
        self.symbols = lossy.known_symbols(stretch, state)

    def of(self, plane: str) -> lossless.Known:
        """For the lossless coder."""
        dtype, found = self.stretch.dtype, {}
        for other, reference in self.reference.items():
            if other == plane or self.stretch.dtype == "float32":
                found["ref" if other == plane else f"ref_{other}"] = lossless.exponents(reference, dtype)
        names = self.stretch.of(plane)
        if self.state is not None and plane in self.reference and all(name in self.state.sizes for name in names):
            found["last"] = np.concatenate([self.state.sizes[name] for name in names])
        if plane == "m" and "v" in self.done:
            found["cur_v"] = lossless.exponents(self.done["v"], dtype)
        if plane == "m" and "w" in self.done and "w" in self.reference:
            with np.errstate(invalid="ignore", over="ignore"):
                moved = self.done["w"].view("<f4") - self.reference["w"].view("<f4")
            found["moved"] = lossless.exponents(moved.view("<u4"), dtype)
        return lossless.Known(dtype, self.reference.get(plane), found)


def _remember(known: _Known, plane: str, state: State) -> None:
    """Keep how large a plane's differences were."""
    if (reference := known.reference.get(plane)) is None:
        return
    sizes, at = lossless.sizes(known.done[plane], reference, known.stretch.dtype), 0
    for name, size in zip(known.stretch.of(plane), known.sizes, strict=True):
        width = size * (sizes.size // max(1, sum(known.sizes)))
        state.sizes[name], at = sizes[at : at + width], at + width


# ------------------------------------------------------------------------------------------------------------- write


def encode(
    tensors: Tensors, before: State | None, settings: CodecSettings, *, file: str, step: int, about: Mapping[str, Any]
) -> tuple[bytes, State]:
    """A checkpoint as the bytes of a file, and what the next one is coded against.

    Args:
        tensors: all of it; moments as `lcsc.codec.arrays` names them.
        before: the checkpoint that it is coded against; None makes an anchor.
        settings: how.
        file: its name.
        step: of the training.
        about: plain values that are kept in the header.

    Raises:
        NonFiniteError: NaN or Inf in a tensor that is to be quantised.
        MissingExtraError: without the package `zstandard`.
    """
    kinds = {name: array.kind for name, array in tensors.items()}
    names = sorted(tensors)
    place = {name: i for i, name in enumerate(names)}
    reference = {n for n in names if before is not None and n in before.tensors and before.tensors[n].kind == kinds[n]}
    state, parts, streams, shas = State(file, ""), [], [], []
    cut = stretches(tensors, reference, lambda name: settings.bits_of(name, tensors[name].bits.size))
    for i, stretch in enumerate(cut):
        known = _Known(stretch, before, kinds)
        ways = {}
        if stretch.bits:
            ways = _encode_symbols(stretch, tensors, known, state, settings)
        for plane in stretch.planes:
            own = stretch.of(plane)
            if plane in ways:
                how, params, some = ways[plane]
            else:
                known.done[plane] = flat(tensors, own)
                coded = lossless.encode(known.done[plane], known.of(plane))
                how, params, some = coded.how, coded.params, coded.streams
            put(state.tensors, known.done[plane], own, kinds)
            _remember(known, plane, state)
            sha = _sha(known.done[plane])
            shas.append([own, sha])
            parts.append([i, plane, [place[n] for n in own], how, params, [stream.row() for stream in some], sha])
            streams += some
    listed = [[name, kinds[name][0], list(kinds[name][1])] for name in names]
    state.digest = _digest(listed, shas)
    header = {
        "step": step,
        "lossy": settings.mode == "lossy",
        "reference": None if before is None else {"file": before.file, "digest": before.digest},
        "digest": state.digest,
        "tensors": listed,
        "parts": parts,
        "about": dict(about),
    }
    if any(part[3] == _SYMBOLS["neural"] for part in parts):
        header["environment"] = neural.environment()
    return pack(header, streams), state


def _encode_symbols(
    stretch: Stretch, tensors: Tensors, known: _Known, state: State, settings: CodecSettings
) -> dict[str, tuple[str, list[Any], list[Stream]]]:
    arrays = {p: [tensors[n].bits.reshape(-1).view("<f4") for n in stretch.of(p)] for p in stretch.planes}
    for plane, own in arrays.items():
        for name, numbers in zip(stretch.of(plane), own, strict=True):
            if not np.isfinite(numbers).all():
                raise NonFiniteError(
                    f"`{name}` of `{state.file}` holds NaN or Inf, which cannot be quantised. Use codec=lossless, or "
                    "leave that checkpoint out."
                )
    predicted = known.reference.get("w")
    delta = None
    if predicted is not None:
        ends = np.cumsum(known.sizes)[:-1]
        with np.errstate(over="ignore"):
            delta = [a - b for a, b in zip(arrays["w"], np.split(predicted.view("<f4"), ends), strict=True)]
        if not all(np.isfinite(x).all() for x in delta):
            delta = None
    planes = lossy.planes_of(stretch, arrays, delta, settings.pruning)
    ways = {}
    for plane in lossy.ORDER:
        if plane not in planes or not np.isfinite(_read_back(known, plane, planes[plane])).all():
            continue  # numbers too far apart for a scale: kept without loss
        symbols, bits = planes[plane], max(1, stretch.bits[plane])
        before = None if known.state is None else known.state.counts.get((stretch.names, plane))
        given = (plane, symbols.symbols, bits, known.symbols, before)
        if settings.coder == "neural":
            params, streams, learned = neural.encode_plane(*given, known.shapes)
        else:
            params, streams, learned = lossy.encode_plane(*given)
        table = np.concatenate([symbols.scales, symbols.codes]).astype("<f4").tobytes()
        ways[plane] = (_SYMBOLS[settings.coder], params, [*streams, Stream("raw", [], table)])
        _take_symbols(known, plane, symbols, bits, learned, state)
    return ways


def _read_back(known: _Known, plane: str, own: lossy.Plane) -> np.ndarray:
    """The numbers that symbols stand for, float32, shape (N,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = own.values(known.sizes)
        return (known.reference["w"].view("<f4") + values).astype("<f4") if plane == "w" else values


def _take_symbols(known: _Known, plane: str, own: lossy.Plane, bits: int, learned: Any, state: State) -> None:
    """What symbols stand for, and what later planes and checkpoints may know of them."""
    stretch = known.stretch
    known.done[plane] = _read_back(known, plane, own).view("<u4")
    known.symbols[plane] = lossy.digits(own.symbols, bits)
    at = 0
    for name, size in zip(stretch.of(plane), known.sizes, strict=True):
        state.symbols[name], at = known.symbols[plane][at : at + size], at + size
    if learned is not None:
        state.counts[stretch.names, plane] = learned


# -------------------------------------------------------------------------------------------------------------- read


def needed(container: Container, wanted: Collection[str] | None) -> set[str] | None:
    """Names of the tensors that lie in stretches with those wanted; None means all."""
    if wanted is None:
        return None
    names = [entry[0] for entry in container.header["tensors"]]
    inside: dict[int, set[str]] = {}
    for part in container.header["parts"]:
        inside.setdefault(part[0], set()).update(names[k] for k in part[2])
    return set().union(*(some for some in inside.values() if some & set(wanted)))


def decode(container: Container, before: State | None, wanted: Collection[str] | None = None) -> State:
    """A checkpoint, or the stretches of some of its tensors, with every number compared with its digest.

    Args:
        container: the file.
        before: what `decode` gave for its reference; None for an anchor.
        wanted: names as `needed` gives them.

    Raises:
        BankError: a damaged file, or another reference.
        MissingExtraError: a stream of zstd without the package `zstandard`.
    """
    try:
        return _decode(container, before, wanted)
    except BankError:  # which is a ValueError as well
        raise
    except Wrong as error:
        raise damaged(container.path, str(error)) from None
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, MemoryError, StopIteration):
        raise damaged(container.path, "its header does not describe a checkpoint") from None


def kinds_in(container: Container) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor by name; raises BankError where the header does not tell them."""
    try:
        return _kinds(container.header["tensors"])
    except Wrong as error:
        raise damaged(container.path, str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise damaged(container.path, "its header does not describe a checkpoint") from None


def _decode(container: Container, before: State | None, wanted: Collection[str] | None) -> State:
    header = container.header
    check_reference(container, before)
    kinds = _kinds(header["tensors"])
    names = list(kinds)
    listed = [[part[2], part[6]] for part in header["parts"]]
    if header["digest"] != _digest(header["tensors"], [[[names[k] for k in own], sha] for own, sha in listed]):
        raise Wrong("its digest is not that of its parts")
    if sorted(k for own, _ in listed for k in own) != list(range(len(names))):
        raise Wrong("its parts are not its tensors, each once")
    state = State(container.path.name, header["digest"])
    places = iter(container.places([row for part in header["parts"] for row in part[5]]))
    stretch: dict[int, list[tuple[Any, list[Any]]]] = {}
    for part in header["parts"]:
        stretch.setdefault(part[0], []).append((part, [next(places) for _ in part[5]]))
    for parts in stretch.values():
        if wanted is None or any(names[k] in wanted for part, _ in parts for k in part[2]):
            _decode_stretch(container, parts, names, kinds, before, state)
    return state


def _kinds(listed: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for name, dtype, shape in listed:
        whole = all(n.__class__ is int and n >= 0 for n in shape) and len(shape) <= _MAX_AXES
        if name.__class__ is not str or dtype not in ITEMSIZE or not whole:
            raise Wrong("a tensor has no name, dtype and shape")
        size = 1
        for n in shape:
            if (size := size * n) > _MAX_NUMBERS:
                raise Wrong(f"a tensor has {size} numbers")
        found[name] = (dtype, tuple(shape))
    total = sum(ITEMSIZE[dtype] * math.prod(shape) for dtype, shape in found.values())
    if total > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise Wrong(f"its tensors take {total} bytes, more than the {memory} of memory here")
    if len(found) != len(listed) or len(found) > _MAX_TENSORS:
        raise Wrong("a tensor stands in it twice, or there are too many")
    return found


def check_reference(container: Container, before: State | None) -> None:
    """Raise BankError unless `before` is what a file was coded against."""
    said = container.header["reference"]
    if (said is None) != (before is None) or (before is not None and said["digest"] != before.digest):
        name = "nothing" if said is None else f"`{said['file']}`"
        raise BankError(
            f"`{container.path}` was coded against {name} of other contents than what lies before it. Restore the "
            "files of the bank as they were written."
        )


def _decode_stretch(
    container: Container, parts: list[tuple[Any, list[Any]]], names: list[str], kinds: Any, before: Any, state: State
) -> None:
    """All planes of a stretch: those of symbols first, as they were written."""
    own = {part[1]: [names[k] for k in part[2]] for part, _ in parts}
    stretch = Stretch(tuple(own["w"]), kinds[own["w"][0]][0], tuple(own))
    if any(
        own[p] != stretch.of(p) or any(kinds[n] != kinds[w] for n, w in zip(own[p], own["w"], strict=True)) for p in own
    ):
        raise Wrong("moments are not those of the weights beside them")
    if any(kinds[name][0] != stretch.dtype for name in stretch.names):
        raise Wrong("a stretch has several dtypes")
    known = _Known(stretch, before, kinds)
    first = [item for plane in lossy.ORDER for item in parts if item[0][1] == plane and item[0][3] in _SYMBOLS.values()]
    for part, places in first:
        _decode_symbols(container, part, places, known, state)
    for part, places in parts:
        _, plane, _, how, params, _, sha = part
        if how not in _SYMBOLS.values():
            size = sum(known.sizes) * (
                ITEMSIZE[stretch.dtype] // lossless.unsigned(np.empty(0, np.uint8), stretch.dtype).itemsize
            )
            streams = [([row[0], row[1]], container.read(*row[2:])) for row in places]
            known.done[plane] = lossless.decode(how, params, streams, size, known.of(plane))
        if _sha(known.done[plane]) != sha:
            raise _other(container, how, f"the numbers of `{own[plane][0]}` are not those that were written")
        put(state.tensors, known.done[plane], own[plane], kinds)
        _remember(known, plane, state)


def _other(container: Container, how: str, what: str) -> Exception:
    """The error for numbers that are not the ones written, though their bytes and their reference are."""
    if how == _SYMBOLS["neural"]:
        return neural.refusal(container.path, container.header.get("environment"))
    return Wrong(what)


def _decode_symbols(container: Container, part: Any, places: list[Any], known: _Known, state: State) -> None:
    _, plane, _, how, params, _, _ = part
    *rows, last = places
    if (plane == "w" and "w" not in known.reference) or known.stretch.dtype != "float32":
        raise Wrong("symbols stand for differences from nothing")
    size = sum(known.sizes)
    before = None if known.state is None else known.state.counts.get((known.stretch.names, plane))
    streams = [([row[0], row[1]], container.read(*row[2:])) for row in rows]
    given = (plane, params, streams, size, known.symbols, before)
    if how == _SYMBOLS["neural"]:
        neural.check_environment(container.path, container.header.get("environment"))
        symbols, learned = neural.decode_plane(*given, known.shapes)
    else:
        symbols, learned = lossy.decode_plane(*given)
    table = np.frombuffer(container.read(*last[2:]), "<f4")
    scales, codes = table[: len(known.sizes)], table[len(known.sizes) :]
    if len(scales) != len(known.sizes) or symbols.max(initial=0) > codes.size:
        raise _other(container, how, "a symbol stands for nothing")
    _take_symbols(known, plane, lossy.Plane(symbols, scales, codes), params[0], learned, state)

"""Tensors as the codec sees them: bits with the name of a dtype; and in which stretches they are coded.

A *stretch* is some tensors of one dtype one behind the other, so that many small ones share streams and a large one
can be read without the others. Where an optimizer's moments are there, named `exp_avg/NAME` and `exp_avg_sq/NAME`
beside the weights NAME, the three lie in one stretch as its planes w, m and v: each tells something of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcsc.codec.lossless import unsigned
from lcsc.core.dtypes import raw_dtype

#: what the names of a plane's tensors begin with
PREFIX = {"w": "", "m": "exp_avg/", "v": "exp_avg_sq/"}
#: what the names of tensors begin with that belong to an optimizer or another state, and not to the network
STATES = (PREFIX["m"], PREFIX["v"], "state/")
#: most numbers of a stretch of several tensors
LENGTH = 1 << 20


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor: dtype by name, and its bits in the dtype `raw_dtype` gives, in its shape."""

    dtype: str
    bits: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", np.asarray(self.bits, raw_dtype(self.dtype)))

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape."""
        return self.dtype, self.bits.shape


Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Stretch:
    """Tensors that are coded together.

    Args:
        names: of the weights.
        dtype: of all of them.
        planes: `w`, or `w`, `v` and `m`.
        bits: of the symbols of each plane, empty without loss.
    """

    names: tuple[str, ...]
    dtype: str
    planes: tuple[str, ...]
    bits: Mapping[str, int] = field(default_factory=dict)

    def of(self, plane: str) -> list[str]:
        """Names of a plane's tensors."""
        return [PREFIX[plane] + name for name in self.names]


@dataclass
class State:
    """What the next checkpoint is coded against; arrays are flat.

    Args:
        file: name of the file.
        digest: of its contents.
        tensors: as a reader has them.
        sizes: how large the last differences were, by name.
        symbols: of planes that were quantised, by name.
        counts: what the coder of symbols learned, by weights and plane: the model it was, and its counts or networks.
    """

    file: str
    digest: str
    tensors: dict[str, Array] = field(default_factory=dict)
    sizes: dict[str, np.ndarray] = field(default_factory=dict)
    symbols: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[tuple[tuple[str, ...], str], tuple[object, Any]] = field(default_factory=dict)


def flat(tensors: Tensors, names: Sequence[str]) -> np.ndarray:
    """The bits of some tensors of one dtype, unsigned, one behind the other."""
    return np.concatenate([unsigned(tensors[name].bits, tensors[name].dtype) for name in names])


def put(
    into: dict[str, Array], flat_N: np.ndarray, names: Sequence[str], kinds: Mapping[str, tuple[str, tuple]]
) -> None:
    """What `flat` joined, as tensors again."""
    at = 0
    for name in names:
        dtype, shape = kinds[name]
        size = int(np.prod(shape, dtype=np.int64)) * raw_dtype(dtype).itemsize // flat_N.itemsize
        into[name] = Array(dtype, flat_N[at : at + size].view(raw_dtype(dtype)).reshape(shape))
        at += size


def stretches(
    tensors: Tensors, reference: Collection[str], bits_of: Callable[[str], Mapping[str, int]] | None
) -> list[Stretch]:
    """All tensors, each in one stretch.

    Args:
        tensors: of the checkpoint.
        reference: names that the one before has in the same dtype and shape.
        bits_of: bits by plane for a tensor that may be quantised, empty for none; None quantises nothing.
    """
    moments = {PREFIX[plane] + name for name in tensors if _has_moments(tensors, name) for plane in "mv"}
    groups: dict[tuple, list[str]] = {}
    for name in sorted(tensors.keys() - moments):
        planes = ("w", "v", "m") if _has_moments(tensors, name) else ("w",)
        loses = bits_of and tensors[name].dtype == "float32" and not name.startswith(STATES)
        bits = dict(bits_of(name)) if bits_of and loses else {}
        bits = {plane: bits[plane] for plane in planes if plane in bits}
        known = tuple(PREFIX[plane] + name in reference for plane in planes)
        groups.setdefault((tensors[name].dtype, planes, tuple(bits.items()), known), []).append(name)
    found = []
    for (dtype, planes, bits, _), names in groups.items():
        some: list[str] = []
        size = 0
        for name in names:
            if some and size + tensors[name].bits.size > LENGTH:
                found.append(Stretch(tuple(some), dtype, planes, dict(bits)))
                some, size = [], 0
            some.append(name)
            size += tensors[name].bits.size
        found.append(Stretch(tuple(some), dtype, planes, dict(bits)))
    return found


def _has_moments(tensors: Tensors, name: str) -> bool:
    own = tensors[name].kind
    if name.startswith((PREFIX["m"], PREFIX["v"])):
        return False
    return own[0] == "float32" and all(
        (other := tensors.get(PREFIX[plane] + name)) is not None and other.kind == own for plane in "mv"
    )

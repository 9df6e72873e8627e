"""What a searcher may vary: named boxes of floats, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lcsc.core.errors import ConfigError

Point = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Natural:
    """The numbers a person would write for a box's floats, such as coefficients: natural = center + axes @ floats.

    Args:
        center: float64, shape (N,).
        axes: float64, shape (N, size).
        inverse: float64, shape (size, N): floats = inverse @ (natural - center).
        total: what natural numbers sum to; None where any sum will do.
    """

    center: np.ndarray
    axes: np.ndarray
    inverse: np.ndarray
    total: float | None = None

    def of(self, floats: np.ndarray) -> np.ndarray:
        """Natural numbers, shape (N,)."""
        return self.center + self.axes @ floats

    def floats(self, natural: np.ndarray) -> np.ndarray:
        """The box's floats, shape (size,); the sum is mended by adding, never by dividing."""
        if self.total is not None:
            natural = natural - (natural.sum() - self.total) / natural.size
        return self.inverse @ (natural - self.center)


@dataclass(frozen=True)
class Choices:
    """What each float of a box chooses among, with a cost that adds up over the floats.

    Args:
        floats: a float for each choice; it may lie beyond the box's bounds, where it holds whatever the others cost.
        costs: whole numbers above 0, increasing; the last is no change at all.
        budget: what the costs may sum to.
        unit: what the costs count, in the plural.
    """

    floats: tuple[float, ...]
    costs: tuple[int, ...]
    budget: int
    unit: str = "costs"


@dataclass(frozen=True)
class Box:
    """`size` floats under one name; where some matter more than others, those come first.

    Args:
        name: key in a point.
        size: number of floats.
        lower, upper: bounds of every float; infinite means unbounded.
        scale: length of a typical move, in the box's own units; searchers start with it.
        lengths: how far a step of one `scale` along each float moves the candidate, in any common unit; None means
            that all move it alike, or that nobody knows.
        natural: how people write these floats; None means as they are.
        level: boxes of level 1 and above refine those below them, and are idle at zero.
        choices: what each float chooses among within a budget; None where floats are numbers, or nothing is scarce.
    """

    name: str
    size: int
    lower: float = -math.inf
    upper: float = math.inf
    scale: float = 1.0
    lengths: tuple[float, ...] | None = None
    natural: Natural | None = field(default=None, compare=False, repr=False)
    level: int = 0
    choices: Choices | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"box `{self.name}` has size {self.size}; a box holds at least 1 float. Drop it instead.")
        if not self.lower < self.upper:
            raise ConfigError(f"box `{self.name}` spans [{self.lower}, {self.upper}]; lower must be below upper.")
        if self.lengths is not None and (len(self.lengths) != self.size or not all(x > 0 for x in self.lengths)):
            raise ConfigError(f"box `{self.name}` has {self.size} floats; it needs as many `lengths`, all above 0.")


@dataclass(frozen=True)
class SearchSpace:
    """An ordered set of boxes. Empty means that there is nothing to search."""

    boxes: tuple[Box, ...] = ()

    @property
    def size(self) -> int:
        """Number of floats in all boxes."""
        return sum(box.size for box in self.boxes)

    @property
    def lower(self) -> np.ndarray:
        """Lower bounds, shape (size,), float64."""
        return np.concatenate([np.full(b.size, b.lower) for b in self.boxes] or [np.empty(0)])

    @property
    def upper(self) -> np.ndarray:
        """Upper bounds, shape (size,), float64."""
        return np.concatenate([np.full(b.size, b.upper) for b in self.boxes] or [np.empty(0)])

    @property
    def scale(self) -> np.ndarray:
        """Typical move of every float, shape (size,), float64."""
        return np.concatenate([np.full(b.size, b.scale) for b in self.boxes] or [np.empty(0)])

    @property
    def lengths(self) -> np.ndarray:
        """How far a typical move of every float moves the candidate, relative to the others, shape (size,), float64."""
        parts = [np.ones(b.size) if b.lengths is None else np.array(b.lengths, dtype=np.float64) for b in self.boxes]
        return np.concatenate(parts or [np.empty(0)])

    @property
    def step_lengths(self) -> np.ndarray:
        """How far unit steps along the floats move the candidate, relative to one another, shape (size,), float64.

        In coordinates floats * step_lengths all unit steps are equally long.
        """
        return self.lengths / self.scale

    def to_natural(self, vector: np.ndarray) -> list[np.ndarray]:
        """What people would write for a vector, shape (size,): one array for each box."""
        floats = self.to_point(vector)
        return [floats[b.name] if b.natural is None else b.natural.of(floats[b.name]) for b in self.boxes]

    def from_natural(self, natural: Sequence[np.ndarray]) -> np.ndarray:
        """The vector inside the bounds for what people write, shape (size,), float64."""
        parts = [n if b.natural is None else b.natural.floats(n) for b, n in zip(self.boxes, natural, strict=True)]
        return np.clip(np.concatenate(parts or [np.empty(0)]), self.lower, self.upper)

    def to_point(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Cut a flat vector, shape (size,), into the boxes' arrays."""
        vector = np.asarray(vector, dtype=np.float64)
        if vector.shape != (self.size,):
            raise ConfigError(f"a point of this space has {self.size} floats, got shape {vector.shape}.")
        point, start = {}, 0
        for box in self.boxes:
            point[box.name] = vector[start : start + box.size].copy()
            start += box.size
        return point

    def to_vector(self, point: Point) -> np.ndarray:
        """Join a point's arrays into one float64 vector, shape (size,)."""
        names = {box.name for box in self.boxes}
        if set(point) != names:
            raise ConfigError(f"point has {sorted(point)}, the space wants {sorted(names)}.")
        parts = [np.asarray(point[box.name], dtype=np.float64).reshape(-1) for box in self.boxes]
        vector = np.concatenate(parts or [np.empty(0)])
        if vector.shape != (self.size,):
            raise ConfigError(f"point holds {vector.size} floats, the space wants {self.size}.")
        return vector

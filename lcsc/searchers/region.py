"""Where a descent may go: inside the boxes, and where one is wanted inside a trust region in weight space."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.right_angles import right_angles
from lcsc.core.space import SearchSpace


@dataclass(frozen=True, eq=False)
class Region:
    """Where a descent may go, in coordinates whose unit steps are equally long in weight space.

    Args:
        space: what is varied.
        center: the start in these coordinates, shape (size,).
        radius: largest distance of the weights from the start's; None means no limit.
        square: what makes squared distances of weights, away @ square @ away, shape (size, size); None where that is
            the identity, or nobody knows.
    """

    space: SearchSpace
    center: np.ndarray
    radius: float | None = None
    square: np.ndarray | None = None
    lengths: np.ndarray = field(init=False)
    lower: np.ndarray = field(init=False)
    upper: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.space.step_lengths
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "lower", self.space.lower * lengths)
        object.__setattr__(self, "upper", self.space.upper * lengths)

    @classmethod
    def around(cls, space: SearchSpace, begin: np.ndarray, radius: float | None) -> Region:
        """The region around a vector of the space.

        Raises:
            ConfigError: a radius where boxes refine others and do not tell how far both together move the weights.
        """
        center, frame = begin * space.step_lengths, right_angles(space)
        if frame is None and radius is not None:
            finer = next(box.name for box in space.boxes if box.level > 0)
            raise ConfigError(
                f"`searcher.radius` is {radius}, but box `{finer}` refines another one and nobody knows how far both "
                "together move the weights. Leave it null."
            )
        alike = len({box.lengths is None for box in space.boxes}) < 2 and all(box.level == 0 for box in space.boxes)
        if frame is None or alike:
            return cls(space, center, radius)
        matrix_YZ = frame.matrix_YZ / space.step_lengths
        return cls(space, center, radius, matrix_YZ.T @ matrix_YZ)

    def outward(self, away: np.ndarray) -> np.ndarray:
        """Half the derivative of the squared distance of the weights, shape (size,)."""
        return away if self.square is None else self.square @ away

    def distance(self, away: np.ndarray) -> float:
        """How far a move away from the start takes the weights."""
        if self.square is None:
            return float(np.linalg.norm(away))
        return float(np.sqrt(max(0.0, away @ self.outward(away))))

    def change(self, away: np.ndarray) -> float:
        """How far a move changes the candidate: its distance, and as much again for floats that move no weights."""
        if self.square is None:
            return self.distance(away)
        return float(np.hypot(self.distance(away), np.linalg.norm(away[self.square.diagonal() == 0])))

    def nearest(self, at: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        """The nearest place in the trust region, then the nearest in the boxes.

        Args:
            at: a place, shape (size,).
            weight: how much each coordinate's squared distance counts, all above 0; None counts them alike.
        """
        away = at - self.center
        if self.radius is not None and self.distance(away) > self.radius:
            at = self.center + self._drawn_back(away, self.radius, weight)
        return np.clip(at, self.lower, self.upper)

    def _drawn_back(self, away: np.ndarray, radius: float, weight: np.ndarray | None) -> np.ndarray:
        """The nearest point of the ellipsoid x @ square @ x = radius^2.

        In coordinates y along its axes, in which squares count alike, that is y / (1 + m energy) with one number m, by
        Lagrange.
        """
        from scipy.optimize import brentq

        root = np.ones_like(away) if weight is None else np.sqrt(weight)
        square = np.eye(away.size) if self.square is None else self.square
        energy, turn = np.linalg.eigh(square / np.outer(root, root))
        energy, inner = np.clip(energy, 0.0, None), turn.T @ (root * away)

        def size(multiplier: float) -> float:
            return float(np.sqrt(energy @ (inner / (1 + multiplier * energy)) ** 2))

        # enough for every axis whose energy is not rounding
        most = size(0.0) / radius / energy[energy > 1e-12 * energy.max()].min()
        while size(most) > radius:
            most *= 2
        multiplier = brentq(lambda m: size(m) - radius, 0.0, most, xtol=np.finfo(np.float64).tiny, maxiter=1000)
        return turn @ (inner / (1 + multiplier * energy)) / root

    def vector(self, at: np.ndarray) -> np.ndarray:
        """The space's vector at a place; clipped, because a division rounds."""
        return np.clip(at / self.lengths, self.space.lower, self.space.upper)

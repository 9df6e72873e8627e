"""A price on the distance from the best baseline in weight space, for every searcher. K = checkpoints, G = groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.space import SearchSpace
from lcsc.operators.base import Distances, Measured, Operator
from lcsc.searchers.base import Start


def check_penalty(operator: Operator, weight: float, race: str) -> None:
    """Raise ConfigError when a search cannot be penalised."""
    if not weight:
        return
    if not isinstance(operator, Measured):
        raise ConfigError(
            f"`search.penalty` is {weight}, but the operator `{type(operator).__name__}` knows no distance of weights. "
            "Leave it at 0, or use operator=linear or operator=linear_grouped."
        )
    if race:
        raise ConfigError(
            f"`search.penalty` is {weight} and {race}, but a race compares scores without a "
            "penalty. Leave one of the two out."
        )


@dataclass(frozen=True, eq=False)
class Penalty:
    """weight x (distance from the anchor / distance last checkpoint to mean)^2.

    Distances are those of flat weights, exact: with coefficients c and d that sum to one and the Gram matrix M of the
    checkpoints' deltas from their mean, |W^T c - W^T d|^2 = (c - d)^T M (c - d), summed over layer groups.

    Args:
        weight: above 0.
        bank, operator: of the search; the operator is `Measured`.
        space: what is searched; boxes that are not the operator's cost nothing.
        anchor: the vector of the best baseline, shape (space.size,).

    Raises:
        ConfigError: the last checkpoint is the mean of all, so that there is no unit.
    """

    weight: float
    bank: CheckpointBank
    operator: Measured
    space: SearchSpace
    anchor: np.ndarray
    distances: Distances = field(init=False)
    anchor_GK: np.ndarray = field(init=False)
    unit_squared: float = field(init=False)

    def __post_init__(self) -> None:
        distances = self.operator.distances(self.bank)
        square = float(distances.gram_GKK[:, -1, -1].sum())
        if not square > 0:
            raise ConfigError(
                f"`search.penalty` is {self.weight}, in units of the distance from the last checkpoint to the mean, "
                f"which is 0 in `{self.bank.path}`. Leave it at 0."
            )
        object.__setattr__(self, "distances", distances)
        object.__setattr__(self, "anchor_GK", self._coefficients(self.anchor))
        object.__setattr__(self, "unit_squared", square)

    def paid(self, vector: np.ndarray) -> float:
        """What a vector, shape (space.size,), pays; 0 at the anchor."""
        way_GK = self._coefficients(vector) - self.anchor_GK
        return (
            self.weight * float(np.einsum("gk,gkl,gl->", way_GK, self.distances.gram_GKK, way_GK)) / self.unit_squared
        )

    def slope(self, vector: np.ndarray) -> np.ndarray:
        """The derivative of `paid`, shape (space.size,)."""
        way_GK = self._coefficients(vector) - self.anchor_GK
        grad_GK = 2 * self.weight / self.unit_squared * np.einsum("gkl,gl->gk", self.distances.gram_GKK, way_GK)
        pulled = self.distances.pull(grad_GK)
        return self.space.to_vector({**self.space.to_point(np.zeros(self.space.size)), **pulled})

    def told(self, start: Start) -> Start:
        """A start with the value that a searcher hears."""
        return dataclasses.replace(start, value=start.value + self.paid(start.vector))

    def _coefficients(self, vector: np.ndarray) -> np.ndarray:
        return np.atleast_2d(self.operator.coefficients(self.bank, self.space.to_point(vector)))

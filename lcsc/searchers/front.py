"""The trials of a search that nothing beats in value and in further numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.pareto import pareto, thinned
from lcsc.searchers.base import Start


class Front:
    """Scored trials by value and further numbers, all to be low.

    Args:
        weighed: names of the numbers beside the value.
        at_most: the most the first of them may be for a winner; None leaves it free.
    """

    def __init__(self, weighed: tuple[str, ...], at_most: float | None) -> None:
        self.weighed, self._at_most = weighed, at_most
        self._scored: list[_Scored] = []
        self._vectors: dict[int, np.ndarray] = {}

    def add(self, uid: int, vector: np.ndarray, value: float, numbers: tuple[float, ...]) -> None:
        """A trial that was scored.

        Raises:
            EvaluationError: one of the numbers is not finite.
        """
        for name, number in zip(self.weighed, numbers, strict=True):
            if not np.isfinite(number):
                raise EvaluationError(f"trial {uid} says `{name}` is {number}; it must be finite.")
        self._scored.append(_Scored(float(value), tuple(map(float, numbers)), uid))
        self._vectors[uid] = vector

    def allows(self, numbers: Mapping[str, float]) -> bool:
        """Whether a candidate that tells these numbers keeps the limit."""
        return self._at_most is None or numbers.get(self.weighed[0], np.inf) <= self._at_most

    def best(self) -> np.ndarray | None:
        """The lowest value that costs no more than is allowed; None while there is none."""
        fit = self._fit()
        return self._vectors[min(fit).uid] if fit else None

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The front within the limit, thinned to `count`."""
        front = self._front(self._fit())
        if not front:
            return []
        kept = [front[at] for at in thinned(*_columns(front), count)]
        return [(f"trial {point.uid}, {self._shown(point)}", self._vectors[point.uid]) for point in kept]

    def account(self) -> list[str]:
        """How long the front is and what it spans."""
        front = self._front(self._scored)
        if not front:
            return [f"no trial told its {' and '.join(f'`{name}`' for name in self.weighed)}"]
        values, numbers_NC = [point.value for point in front], np.array([point.numbers for point in front])
        spans = ", ".join(
            f"`{name}` {column.min():g} to {column.max():g}"
            for name, column in zip(self.weighed, numbers_NC.T, strict=True)
        )
        every = "both" if len(self.weighed) == 1 else f"all {1 + len(self.weighed)}"
        return [
            f"nothing beats {len(front)} of {len(self._scored)} trials in {every} numbers: {spans}, value "
            f"{max(values):.5g} to {min(values):.5g}"
        ]

    def _shown(self, point: _Scored) -> str:
        return ", ".join(f"{name} {number:g}" for name, number in zip(self.weighed, point.numbers, strict=True))

    def _fit(self) -> list[_Scored]:
        return [point for point in self._scored if self._at_most is None or point.numbers[0] <= self._at_most]

    def _front(self, points: list[_Scored]) -> list[_Scored]:
        kept = pareto(*_columns(points)) if points else ()
        return [point for point, keep in zip(points, kept, strict=True) if keep]


class _Scored(NamedTuple):
    """A trial: its value, the further numbers, and which it is."""

    value: float
    numbers: tuple[float, ...]
    uid: int


def _columns(points: list[_Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Further numbers, shape (N, C), and values, shape (N,)."""
    return np.array([point.numbers for point in points]), np.array([point.value for point in points])


def check_number(setting: str, name: str, starts: tuple[Start, ...]) -> None:
    """Refuse a number that candidates do not tell.

    Raises:
        ConfigError: naming those that they tell.
    """
    told = {number for start in starts for number in start.numbers}
    if starts and name not in told:
        known = f"one of {', '.join(sorted(told))}" if told else "another searcher: these candidates tell none"
        raise ConfigError(f"`searcher.{setting}` is `{name}`, which no candidate here tells. Use {known}.")

"""Two numbers at a time, such as loss and bytes of cache: the candidates that nothing beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.pareto import pareto, thinned
from lcsc.core.registry import register
from lcsc.searchers.base import Proposal, Start, Task, check_told
from lcsc.searchers.nevergrad import Nevergrad, NevergradSession


class _Pairs(NevergradSession):
    """An optimizer of nevergrad that hears two losses: each told as the hypervolume that its point adds.

    Args:
        optimizer, scale: see `NevergradSession`.
        starts: scored points, which give both numbers their units and the corner that volumes are measured from.
        second, at_most: see `Pareto`.
    """

    def __init__(
        self, optimizer: Any, scale: np.ndarray, starts: tuple[Start, ...], second: str, at_most: float | None
    ) -> None:
        super().__init__(optimizer, scale)
        self.second, self._at_most = second, at_most
        pairs = [(start.value, start.numbers[second]) for start in starts]
        self._worst = np.max(pairs, axis=0) if pairs else None  # what a failure counts as
        span = np.ptp(pairs, axis=0) if pairs else np.zeros(2)
        self._unit = np.where(span > 0, span, 1.0)
        self._begin = starts[0].vector if starts else None
        self._vectors: dict[int, np.ndarray] = {}
        self._weights: dict[int, float | None] = {}
        self._scored: list[tuple[float, float, int]] = []  # value, second number, uid
        if self._worst is not None:
            self.hear_corner(self._worst / self._unit + 0.1)

    def ask(self) -> Proposal:
        proposal = super().ask()
        self._vectors[proposal.uid] = proposal.vector
        return proposal

    def weigh(self, uid: int, number: float | None) -> None:
        """The second number of a proposal, before its value; None where it failed."""
        self._weights[uid] = number

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        number = self._weights.pop(uid, None)
        pair = np.array([value, np.nan if number is None else number])
        if number is not None:
            if not np.isfinite(number):
                raise EvaluationError(f"trial {uid} says `{self.second}` is {number}; it must be finite.")
            self._scored.append((float(value), float(number), uid))
            self._worst = pair if self._worst is None else np.maximum(self._worst, pair)
        elif self._worst is None:  # the first of all failed: nothing is known yet
            self._asked.pop(uid)
            return
        told = np.where(np.isnan(pair), self._worst, pair)
        self._optimizer.tell(self._asked.pop(uid), list(told / self._unit))

    def best(self) -> np.ndarray:
        """The lowest value that costs no more than is allowed; where the search began while there is none."""
        fit = self._fit()
        if fit:
            return self._vectors[min(fit)[2]]
        return super().best() if self._begin is None else self._begin

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The front within the limit, thinned to `count`."""
        front = self._front(self._fit())
        kept = thinned(np.array([p[1] for p in front]), np.array([p[0] for p in front]), count) if front else []
        return [(f"trial {front[at][2]}, {self.second} {front[at][1]:g}", self._vectors[front[at][2]]) for at in kept]

    def account(self) -> list[str]:
        """How long the front is and what it spans."""
        front = self._front(self._scored)
        if not front:
            return [f"no trial told its `{self.second}`"]
        values, numbers = [p[0] for p in front], [p[1] for p in front]
        return [
            f"nothing beats {len(front)} of {len(self._scored)} trials in both numbers: `{self.second}` "
            f"{min(numbers):g} to {max(numbers):g}, value {max(values):.5g} to {min(values):.5g}"
        ]

    def _fit(self) -> list[tuple[float, float, int]]:
        return [p for p in self._scored if self._at_most is None or p[1] <= self._at_most]

    def _front(self, points: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
        kept = pareto(np.array([p[1] for p in points]), np.array([p[0] for p in points]))
        return [point for point, keep in zip(points, kept, strict=True) if keep]


@register(
    "searcher",
    "pareto",
    source="hypervolume indicator, Zitzler & Thiele 1998, with differential evolution, by nevergrad",
)
@dataclass(frozen=True)
class Pareto:
    """Searches value and a second number together; the finalists are the front.

    The winner is the finalist of the lowest value on the select seeds. Without a limit that is about the dearest end of
    the front, so say `at_most` where one model is wanted; the report draws all of it.

    Args:
        second: the other number, as the journal names it, such as `cache_bytes_per_token`; lower is better.
        at_most: the most it may be for the winner; None leaves it free. Dearer candidates still teach the search.
        optimizer: its name in nevergrad's registry; differential evolution suits fronts.
        sigma0: length of the first moves, in units of the boxes' scale.
    """

    second: str = "cache_bytes_per_token"
    at_most: float | None = None
    optimizer: str = "DE"
    sigma0: float = 1.0

    def start(self, task: Task) -> _Pairs:
        """Begin; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, no such optimizer, or nobody tells the second number.
        """
        inner = Nevergrad(self.optimizer, self.sigma0, warm_start=False)
        inner.check(task)
        told = _numbers(task.starts)
        if task.starts and self.second not in told:
            known = f"one of {', '.join(sorted(told))}" if told else "another searcher: these candidates tell none"
            raise ConfigError(f"`searcher.second` is `{self.second}`, which no candidate here tells. Use {known}.")
        starts = tuple(start for start in task.starts if self.second in start.numbers)
        recipe = inner.recipe(replace(task, starts=starts))
        return _Pairs(recipe.make(), task.space.scale, starts, self.second, self.at_most)


def _numbers(starts: tuple[Start, ...]) -> Mapping[str, None]:
    return {name: None for start in starts for name in start.numbers}

"""Several numbers at a time, such as loss and bytes of cache: the candidates that nothing beats in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.pareto import pareto, thinned
from lcsc.core.registry import register
from lcsc.searchers.base import Proposal, Start, Task, check_told
from lcsc.searchers.nevergrad import Nevergrad, NevergradSession


class _Several(NevergradSession):
    """An optimizer of nevergrad that hears several losses: each told as the hypervolume that its point adds.

    Args:
        optimizer, scale: see `NevergradSession`.
        starts: scored points, which give all numbers their units and the corner that volumes are measured from.
        weighed: names of the numbers beside the value; the first is the one that `at_most` bounds.
        at_most: see `Pareto`.
    """

    def __init__(
        self,
        optimizer: Any,
        scale: np.ndarray,
        starts: tuple[Start, ...],
        weighed: tuple[str, ...],
        at_most: float | None,
    ) -> None:
        super().__init__(optimizer, scale)
        self.weighed, self._at_most = weighed, at_most
        points = [(start.value, *(start.numbers[name] for name in weighed)) for start in starts]
        self._worst = np.max(points, axis=0) if points else None  # what a failure counts as
        span = np.ptp(points, axis=0) if points else np.zeros(1 + len(weighed))
        self._unit = np.where(span > 0, span, 1.0)
        self._begin = starts[0].vector if starts else None
        self._vectors: dict[int, np.ndarray] = {}
        self._weights: dict[int, tuple[float, ...] | None] = {}
        self._scored: list[_Scored] = []
        if self._worst is not None:
            self.hear_corner(self._worst / self._unit + 0.1)

    def ask(self) -> Proposal:
        proposal = super().ask()
        self._vectors[proposal.uid] = proposal.vector
        return proposal

    def weigh(self, uid: int, numbers: tuple[float, ...] | None) -> None:
        """The further numbers of a proposal, before its value; None where it failed."""
        self._weights[uid] = numbers

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        numbers = self._weights.pop(uid, None)
        if numbers is not None:
            for name, number in zip(self.weighed, numbers, strict=True):
                if not np.isfinite(number):
                    raise EvaluationError(f"trial {uid} says `{name}` is {number}; it must be finite.")
            self._scored.append(_Scored(float(value), tuple(map(float, numbers)), uid))
            told = np.array([value, *numbers])
            self._worst = told if self._worst is None else np.maximum(self._worst, told)
        elif self._worst is None:  # the first of all failed: nothing is known yet
            self._asked.pop(uid)
            return
        else:
            told = np.array([value, *self._worst[1:]])
        self._optimizer.tell(self._asked.pop(uid), list(told / self._unit))

    def best(self) -> np.ndarray:
        """The lowest value that costs no more than is allowed; where the search began while there is none."""
        fit = self._fit()
        if fit:
            return self._vectors[min(fit).uid]
        return super().best() if self._begin is None else self._begin

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


@register(
    "searcher",
    "pareto",
    source="hypervolume indicator, Zitzler & Thiele 1998, with differential evolution, by nevergrad",
)
@dataclass(frozen=True)
class Pareto:
    """Searches value and a second number together, and a third where one is named; the finalists are the front.

    The winner is the finalist of the lowest value on the select seeds. Without a limit that is about the dearest end of
    the front, so say `at_most` where one model is wanted; the report draws all of it.

    Args:
        second: the other number, as the journal names it, such as `cache_bytes_per_token`; lower is better.
        third: one more number, lower is better; null searches two.
        at_most: the most the second may be for the winner; None leaves it free. Dearer candidates still teach the
            search.
        optimizer: its name in nevergrad's registry; differential evolution suits fronts.
        sigma0: length of the first moves, in units of the boxes' scale.
    """

    second: str = "cache_bytes_per_token"
    third: str | None = None
    at_most: float | None = None
    optimizer: str = "DE"
    sigma0: float = 1.0

    def start(self, task: Task) -> _Several:
        """Begin; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, no such optimizer, or nobody tells one of the numbers.
        """
        inner = Nevergrad(self.optimizer, self.sigma0, warm_start=False)
        inner.check(task)
        told = _numbers(task.starts)
        settings = {"second": self.second, **({} if self.third is None else {"third": self.third})}
        for setting, name in settings.items():
            if task.starts and name not in told:
                known = f"one of {', '.join(sorted(told))}" if told else "another searcher: these candidates tell none"
                raise ConfigError(f"`searcher.{setting}` is `{name}`, which no candidate here tells. Use {known}.")
        if self.third == self.second:
            raise ConfigError(f"`searcher.second` and `searcher.third` are both `{self.second}`. Leave the third null.")
        weighed = tuple(settings.values())
        starts = tuple(start for start in task.starts if set(weighed) <= start.numbers.keys())
        recipe = inner.recipe(replace(task, starts=starts))
        return _Several(recipe.make(), task.space.scale, starts, weighed, self.at_most)


def _numbers(starts: tuple[Start, ...]) -> Mapping[str, None]:
    return {name: None for start in starts for name in start.numbers}

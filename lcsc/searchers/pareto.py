"""Several numbers at a time, such as loss and bytes of cache: the candidates that nothing beats in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.searchers.base import Proposal, Start, Task, check_told
from lcsc.searchers.front import Front, check_number
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
        self.weighed, self._front = weighed, Front(weighed, at_most)
        points = [(start.value, *(start.numbers[name] for name in weighed)) for start in starts]
        self._worst = np.max(points, axis=0) if points else None  # what a failure counts as
        span = np.ptp(points, axis=0) if points else np.zeros(1 + len(weighed))
        self._unit = np.where(span > 0, span, 1.0)
        self._begin = starts[0].vector if starts else None
        self._vectors: dict[int, np.ndarray] = {}
        self._weights: dict[int, tuple[float, ...] | None] = {}
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
            self._front.add(uid, self._vectors[uid], value, numbers)
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
        found = self._front.best()
        if found is not None:
            return found
        return super().best() if self._begin is None else self._begin

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The front within the limit, thinned to `count`."""
        return self._front.finalists(count)

    def allows(self, numbers: Mapping[str, float]) -> bool:
        """Whether a candidate that tells these numbers keeps the limit."""
        return self._front.allows(numbers)

    def account(self) -> list[str]:
        """How long the front is and what it spans."""
        return self._front.account()


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
        settings = {"second": self.second, **({} if self.third is None else {"third": self.third})}
        for setting, name in settings.items():
            check_number(setting, name, task.starts)
        if self.third == self.second:
            raise ConfigError(f"`searcher.second` and `searcher.third` are both `{self.second}`. Leave the third null.")
        weighed = tuple(settings.values())
        starts = tuple(start for start in task.starts if set(weighed) <= start.numbers.keys())
        recipe = inner.recipe(replace(task, starts=starts))
        return _Several(recipe.make(), task.space.scale, starts, weighed, self.at_most)

"""One change at a time, and then the best sum of changes within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Choices
from lcsc.recycling.budget import additive_front
from lcsc.searchers.base import Proposal, Task, check_told

Picks = tuple[int, ...]


class AdditiveSession:
    """A search of single changes and then of sums of them.

    Singles may be asked for all at once; the choices that follow from them wait until all are told.
    """

    def __init__(self, task: Task) -> None:
        self._begin, self._num_trials = task.begin(), task.num_trials
        start = 0
        for box in task.space.boxes:
            if box.choices is not None:
                self._choices, self._where = box.choices, slice(start, start + box.size)
                self._size = box.size
            start += box.size
        self._full = len(self._choices.costs) - 1
        unchanged = (self._full,) * self._size
        alone = itertools.product(range(self._size), range(self._full))
        self._singles = [unchanged, *(with_changed(unchanged, {layer: pick}) for layer, pick in alone)]
        self._asked: list[Picks] = []
        self._values: dict[Picks, float] = {}
        self._losses: list[dict[int, float]] = []
        self._predicted: Picks | None = None
        self._joint: Iterator[Picks] = iter(())

    @property
    def width(self) -> int:
        """Proposals that may be open: the singles, then one after the other."""
        left = len(self._singles) - len(self._asked)
        return left + (len(self._asked) - len(self._values)) if left > 0 else 1

    def ask(self) -> Proposal:
        uid = len(self._asked)
        if uid < len(self._singles):
            picks = self._singles[uid]
        else:
            if uid == len(self._singles):
                self._add_up()
            picks = next(self._joint)
        self._asked.append(picks)
        return Proposal(uid, self._vector(picks), may_win=self._cost(picks) <= self._budget)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        self._values[self._asked[uid]] = float(value)

    def best(self) -> np.ndarray:
        """The best of what the budget allows; where nothing of it was scored, where the search began."""
        fit = self._fit()
        return self._vector(fit[0]) if fit else self._begin

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The best within the budget, which the changes of one layer alone exceed."""
        return [(self._shown(picks), self._vector(picks)) for picks in self._fit()[:count]]

    def account(self) -> list[str]:
        """How well the sum of the single changes told what they do together."""
        lines = [f"{len(self._singles)} trials changed one layer at a time"]
        if self._predicted is not None and self._predicted in self._values:
            found, guess = self._values[self._predicted], self._guess(self._predicted)
            lines.append(
                f"the sum of the changes was least with {self._shown(self._predicted)}: {guess:.5g} by the sum, "
                f"{found:.5g} together"
            )
        return lines

    # ------------------------------------------------------------------------------------------------- details

    def _add_up(self) -> None:
        """What each change alone costs; a change that nothing was told about counts as the worst."""
        base, costs = self._values.get(self._singles[0], 0.0), self._choices.costs
        worst = max(self._values.values(), default=base) - base
        self._losses = [{costs[self._full]: 0.0} for _ in range(self._size)]
        for picks in self._singles[1:]:
            layer = self._changed(picks)
            told = self._values.get(picks)
            self._losses[layer][costs[picks[layer]]] = worst if told is None else told - base
        self._joint = self._combined()

    def _changed(self, single: Picks) -> int:
        """The layer that a single change is of."""
        return next(i for i, pick in enumerate(single) if pick != self._full)

    def _combined(self) -> Iterator[Picks]:
        """The best sum within the budget, its neighbours by rising sums, and then the best of smaller budgets.

        Half of the trials that are left go to each of the latter two, as far as there are as many.
        """
        places = {cost: place for place, cost in enumerate(self._choices.costs)}
        front = [tuple(places[cost] for cost in costs) for *_, costs in additive_front(self._losses, self._budget)]
        self._predicted = front[-1]
        yield front[-1]
        cheaper, near = front[-2::-1], sorted(self._near(front[-1]), key=lambda picks: (self._guess(picks), picks))
        left = self._num_trials - len(self._singles) - 1
        first = near[: max(left - len(cheaper), left // 2)]
        rest = [picks for picks in [*cheaper, *near[len(first) :]] if picks not in first]
        yield from first
        yield from rest
        yield from itertools.repeat(front[-1])  # nothing else is left

    def _near(self, picks: Picks) -> set[Picks]:
        """What differs from a choice in one or two layers and keeps the budget."""
        found = set()
        for a, b in itertools.combinations_with_replacement(range(self._size), 2):
            for one, other in itertools.product(range(self._full + 1), repeat=2):
                found.add(with_changed(picks, {a: one, b: other}))
        return {other for other in found if other != picks and self._cost(other) <= self._budget}

    def _fit(self) -> list[Picks]:
        """What was scored and keeps the budget, best first."""
        fit = [picks for picks in self._values if self._cost(picks) <= self._budget]
        return sorted(fit, key=lambda picks: (self._values[picks], picks))

    @property
    def _budget(self) -> int:
        return self._choices.budget

    def _cost(self, picks: Picks) -> int:
        return sum(self._choices.costs[pick] for pick in picks)

    def _guess(self, picks: Picks) -> float:
        costs = self._choices.costs
        changes = [losses[costs[pick]] for losses, pick in zip(self._losses, picks, strict=True)]
        return self._values.get(self._singles[0], 0.0) + sum(changes)

    def _shown(self, picks: Picks) -> str:
        return f"{self._choices.unit} {', '.join(str(self._choices.costs[pick]) for pick in picks)}"

    def _vector(self, picks: Picks) -> np.ndarray:
        vector = self._begin.copy()
        vector[self._where] = [self._choices.floats[pick] for pick in picks]
        return vector


def with_changed(picks: Sequence[int], changed: dict[int, int]) -> Picks:
    """The picks with those of some layers changed."""
    return tuple(changed.get(layer, pick) for layer, pick in enumerate(picks))


@register("searcher", "additive", source="lcsc; a multiple-choice knapsack by dynamic programming")
@dataclass(frozen=True)
class Additive:
    """Scores each change of each layer alone, and then what is best together if the changes add up.

    For operators whose layers choose among costs within a budget, such as `gqa` with `operator.max_kv_heads`. It needs
    1 + layers x (choices - 1) trials, one more for the best sum within the budget, and with what is left scores the
    neighbours of that and the best sums of smaller budgets. Other boxes stay where the best start has them.
    """

    def start(self, task: Task) -> AdditiveSession:
        """See `Searcher.start`.

        Raises:
            ConfigError: nothing to choose within a budget, or too few trials for each change alone.
        """
        size, choices = choices_of(task, "additive")
        check_trials(size, choices, task.num_trials, "additive")
        return AdditiveSession(task)


def choices_of(task: Task, searcher: str) -> tuple[int, Choices]:
    """How many layers choose, and among what; raises ConfigError where no box, or more than one, has choices."""
    found = [(box.size, box.choices) for box in task.space.boxes if box.choices is not None]
    if len(found) != 1:
        raise ConfigError(
            f"searcher `{searcher}` shares a budget out among layers, and this operator has none to share. Give "
            "operator=gqa an `operator.max_kv_heads`, operator=compress an `operator.mean_bits`, or choose another "
            "searcher."
        )
    return found[0]


def check_trials(size: int, choices: Choices, num_trials: int, searcher: str) -> None:
    """Raise ConfigError where there are too few trials for each change alone, or the budget pays for no choice."""
    need, least = 2 + size * (len(choices.costs) - 1), size * min(choices.costs)
    if num_trials < need:
        raise ConfigError(
            f"`search.num_trials` is {num_trials}, and searcher `{searcher}` needs {need}: one without a change, "
            f"{need - 2} with one each, and one for their sum. Raise it to that at least."
        )
    if choices.budget < least:
        raise ConfigError(f"the budget is {choices.budget}, and the cheapest choice costs {least}. Raise it to that.")

"""One change at a time, and then the front of their sums in value and a second number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.pareto import thinned
from lcsc.core.registry import register
from lcsc.recycling.budget import additive_front
from lcsc.searchers.additive import AdditiveSession, Picks, check_trials, choices_of, with_changed
from lcsc.searchers.base import Task, check_told
from lcsc.searchers.front import Front, check_number

Table = dict[int, tuple[int, float]]
#: steps that the second number's range is cut into, so that sums of many layers stay few
STEPS = 4000


class _Sum(NamedTuple):
    """Changes of several layers: what they cost and give together if they add up."""

    cost: int
    value: float
    picks: Picks


class _Session(AdditiveSession):
    """Hears a second number of each trial, and shares it out in place of the costs that the layers choose among."""

    def __init__(self, task: Task, second: str, at_most: float | None) -> None:
        super().__init__(task)
        self.weighed = (second,)
        self._front = Front(self.weighed, at_most)
        self._numbers: dict[Picks, float] = {}
        self._predictions: dict[Picks, float] = {}

    def weigh(self, uid: int, numbers: tuple[float, ...] | None) -> None:
        """The second number of a proposal, before its value; None where it failed."""
        if numbers is not None:
            self._numbers[self._asked[uid]] = numbers[0]

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        picks = self._asked[uid]
        if picks in self._numbers and picks not in self._values:
            self._front.add(uid, self._vector(picks), value, (self._numbers[picks],))
        super().tell(uid, value, gradient)

    def best(self) -> np.ndarray:
        """The lowest value that costs no more than is allowed; where the search began while there is none."""
        found = self._front.best()
        return self._begin if found is None else found

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The front within the limit, thinned to `count`."""
        return self._front.finalists(count)

    def allows(self, numbers: Mapping[str, float]) -> bool:
        """Whether a candidate that tells these numbers keeps the limit."""
        return self._front.allows(numbers)

    def account(self) -> list[str]:
        """The front, and how well the sums told it."""
        lines = [f"{len(self._singles)} trials changed one layer at a time", *self._front.account()]
        apart = [
            abs(self._values[picks] - guess) for picks, guess in self._predictions.items() if picks in self._values
        ]
        if apart:
            lines.append(
                f"{len(apart)} sums of changes were scored, half of them within {float(np.median(apart)):.2g} of what "
                "the changes alone told"
            )
        return lines

    # ------------------------------------------------------------------------------------------------- details

    def _add_up(self) -> None:
        self._joint = self._combined()

    def _combined(self) -> Iterator[Picks]:
        """The front of the sums, as many of it as there are trials; then what one more change makes of it."""
        tables_GC = self._tables()
        places = [{cost: pick for pick, (cost, _) in table.items()} for table in tables_GC]
        losses = [dict(table.values()) for table in tables_GC]
        most = sum(max(table) for table in losses)
        base = self._values.get(self._singles[0], 0.0)
        front: list[_Sum] = []
        for cost, loss, costs in additive_front(losses, most):
            picks = tuple(where[one] for where, one in zip(places, costs, strict=True))
            front.append(_Sum(cost, base + loss, picks))
        cost_N, loss_N = np.array([row.cost for row in front]), np.array([row.value for row in front])
        left = self._num_trials - len(self._singles)
        kept = [front[at] for at in thinned(cost_N, loss_N, left)]
        for _, loss, picks in kept:
            self._predictions[picks] = loss
            yield picks
        yield from _beside(kept, tables_GC)
        yield from itertools.repeat(kept[-1][2])  # nothing else is left

    def _tables(self) -> list[Table]:
        """For each layer (cost, change of the value) by pick; of picks that cost the same the better one."""
        whole = self._singles[0]
        base, begun = self._values.get(whole, 0.0), self._numbers.get(whole, 0.0)
        worst = max(self._values.values(), default=base) - base
        rows: list[dict[int, tuple[float, float]]] = [{self._full: (0.0, 0.0)} for _ in whole]
        for picks in self._singles[1:]:
            layer = self._changed(picks)
            told = picks in self._numbers and picks in self._values
            change = self._values[picks] - base if told else worst
            rows[layer][picks[layer]] = (self._numbers[picks] - begun if told else 0.0, change)
        least = [min(number for number, _ in table.values()) for table in rows]
        span = sum(max(number for number, _ in table.values()) for table in rows) - sum(least)
        unit = span / STEPS or 1.0
        tables: list[Table] = []
        for table, lowest in zip(rows, least, strict=True):
            kept: Table = {}
            for pick, (number, change) in sorted(table.items(), key=lambda item: item[1][1]):
                cost = 1 + round((number - lowest) / unit)
                if cost not in {other for other, _ in kept.values()}:
                    kept[pick] = (cost, change)
            tables.append(kept)
        return tables


def _beside(front: Sequence[_Sum], tables: Sequence[Table]) -> Iterator[Picks]:
    """What differs in one layer from a sum on the front, the least above the front first."""
    cost_N, seen = np.array([row.cost for row in front]), {row.picks for row in front}
    above: dict[Picks, float] = {}
    for row in front:
        for layer, table in enumerate(tables):
            cost, change = table[row.picks[layer]]
            for pick, (other_cost, other_change) in table.items():
                picks = with_changed(row.picks, {layer: pick})
                at = int(np.searchsorted(cost_N, row.cost + other_cost - cost, "right")) - 1
                if picks not in seen and at >= 0:
                    value = row.value + other_change - change - front[at].value
                    above[picks] = min(value, above.get(picks, np.inf))
    yield from sorted(above, key=lambda picks: (above[picks], picks))


@register("searcher", "additive_front", source="lcsc; fronts of a multiple-choice knapsack by dynamic programming")
@dataclass(frozen=True)
class AdditiveFront:
    """Scores each change of each layer alone, and then the front of what the changes come to together if they add up.

    For operators whose layers choose among costs and whose records tell a second number, such as `compress` with
    `operator.mean_bits=8`, whose `file_bytes` no cost tells beforehand. The second number is measured for each change,
    not taken from the costs. It needs 1 + layers x (choices - 1) trials, and with what is left scores the front of
    value and second number, thinned to as many, and then what is near it. The finalists are the front, the winner is
    the one of the lowest value on the select seeds.

    Args:
        second: the other number, as the journal names it; lower is better.
        at_most: the most the second may be for the winner; None leaves it free.
    """

    second: str = "file_bytes"
    at_most: float | None = None

    def start(self, task: Task) -> _Session:
        """See `Searcher.start`.

        Raises:
            ConfigError: nothing to choose, a budget that leaves choices out, too few trials, or nobody tells the second
                number.
        """
        size, choices = choices_of(task, "additive_front")
        check_trials(size, choices, task.num_trials, "additive_front")
        check_number("second", self.second, task.starts)
        if choices.budget < (most := size * max(choices.costs)):
            raise ConfigError(
                f"searcher `additive_front` weighs `{self.second}` in place of a budget, and the operator's is "
                f"{choices.budget} of {most}. Raise it until nothing is left out (operator.mean_bits=8), and bound "
                "the winner with `searcher.at_most`."
            )
        return _Session(task, self.second, self.at_most)

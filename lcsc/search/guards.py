"""Guards: further metrics that keep a finalist from winning although its score is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.objectives.base import Objective

#: Standard errors by which a guard has to be worse than its share allows: chance alone vetoes in about one of 40.
NUM_SE = 2.0

Row = dict[str, Any]


def check_guards(objective: Objective, guards: Mapping[str, float]) -> None:
    """Raise ConfigError for a guard that is none of the objective's other metrics, or the score itself."""
    known = sorted(_directions(objective))
    for name in guards:
        if name == objective.name:
            raise ConfigError(
                f"`search.guards` names `{name}`, which is the score that finalists are ranked by; a guard is another "
                "number. Name one of the `other_metrics`, or leave it out."
            )
        if name not in known:
            listed = ", ".join(f"`{other}`" for other in known) or "none is configured"
            raise ConfigError(
                f"`search.guards` names `{name}`, which is none of the `other_metrics` ({listed})."
                f"{did_you_mean(name, known)}"
            )


class Watch:
    """Compares finalists with the best baseline by the guards, all on the select seeds.

    A finalist is vetoed when a guard is worse than the best baseline's by more than its share of the baseline's value
    and two standard errors of that excess. Both saw the same noise, so the error is that of the paired bootstrap where
    the objective tells its resamples; otherwise it is the one of independent scores, which is larger, and none for a
    score without standard error. The baseline itself is judged against nothing and can never be vetoed.

    Args:
        objective: has `other_metrics`.
        guards: shares by name of the metric; a name also stands for its scores at several numbers of network calls
            (`name@2`).
    """

    def __init__(self, objective: Objective, guards: Mapping[str, float]) -> None:
        self._guards, self._directions = guards, _directions(objective)
        self.rival: Row | None = None

    def judged(self, row: Row) -> Row:
        """The row, with the reason under `vetoed` where a guard objects.

        While there is no rival it may become one, and keeps the guards' resamples; later rows need them no more.
        """
        drawn = {key: values for key, values in row.get("resamples", {}).items() if self._share(key)}
        row = {key: value for key, value in row.items() if key != "resamples"}
        if self.rival is None:
            return {**row, "resamples": drawn} if drawn else row
        ours, theirs = row.get("others") or {}, self.rival.get("others") or {}
        for key in sorted(set(ours) & set(theirs)):
            found = self._share(key)
            if found is None:
                continue
            pair = (drawn.get(key), (self.rival.get("resamples") or {}).get(key))
            reason = self._objection(key, found, ours[key], theirs[key], pair)
            if reason:
                return {**row, "vetoed": reason}
        return row

    def _share(self, key: str) -> tuple[str, float] | None:
        """The guard that a score falls under and its share."""
        name = key if key in self._guards else key.partition("@")[0]
        return (name, self._guards[name]) if name in self._guards else None

    def _objection(
        self, key: str, guard: tuple[str, float], ours: Row, theirs: Row, pair: tuple[Any, Any]
    ) -> str | None:
        name, share = guard
        sign = -1.0 if self._directions[name] else 1.0

        def excess(mine: Any, other: Any) -> Any:
            return sign * (np.asarray(mine) - np.asarray(other)) - share * np.abs(other)

        if None not in pair and len(pair[0]) == len(pair[1]) > 1:
            se = float(np.std(excess(*pair), ddof=1))
        else:
            se = math.hypot(ours.get("se") or 0.0, (1 + share) * (theirs.get("se") or 0.0))
        if not float(excess(ours["value"], theirs["value"])) > NUM_SE * se:
            return None
        return (
            f"`{key}` is {ours['value']:.4g}, the best baseline's {theirs['value']:.4g}; {share:.4g} of it is allowed, "
            f"and {NUM_SE * se:.2g} for chance"
        )


def _directions(objective: Objective) -> dict[str, bool]:
    """Whether higher is better, by name of each of the objective's other metrics."""
    return {other.name: other.higher_is_better for other in getattr(objective, "other_metrics", ())}

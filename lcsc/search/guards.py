"""Guards: further metrics that keep a finalist from winning although its score is the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.objectives.base import Objective

Row = dict[str, Any]


def check_guards(objective: Objective, guards: Mapping[str, float]) -> None:
    """Raise ConfigError for a guard that is none of the objective's other metrics."""
    known = sorted(_directions(objective))
    for name in guards:
        if name not in known:
            listed = ", ".join(f"`{other}`" for other in known) or "none is configured"
            raise ConfigError(
                f"`search.guards` names `{name}`, which is none of the `other_metrics` ({listed})."
                f"{did_you_mean(name, known)}"
            )


class Watch:
    """Compares finalists with the best baseline by the guards, all on the select seeds.

    A finalist is vetoed when a guard is worse than the best baseline's by more than its share of the baseline's value.
    The baseline itself is judged against nothing and can never be vetoed.

    Args:
        objective: has `other_metrics`.
        guards: shares by name of the metric; a name also stands for its scores at several numbers of network calls
            (`name@2`).
    """

    def __init__(self, objective: Objective, guards: Mapping[str, float]) -> None:
        self._guards, self._directions = guards, _directions(objective)
        self.rival: Row | None = None

    def judged(self, row: Row) -> Row:
        """The row, with the reason under `vetoed` where a guard objects."""
        others, theirs = row.get("others") or {}, (self.rival or {}).get("others") or {}
        for name, share in self._guards.items():
            for key in sorted(k for k in theirs if k == name or k.startswith(f"{name}@")):
                reason = self._objection(name, key, share, others.get(key), theirs[key]["value"])
                if reason:
                    return {**row, "vetoed": reason}
        return row

    def _objection(
        self, name: str, key: str, share: float, ours: Mapping[str, float] | None, theirs: float
    ) -> str | None:
        if ours is None:
            return None
        worse = theirs - ours["value"] if self._directions[name] else ours["value"] - theirs
        if not worse > share * abs(theirs):
            return None
        return f"`{key}` is {ours['value']:.4g}, the best baseline's {theirs:.4g}; {share:.4g} of it is allowed"


def _directions(objective: Objective) -> dict[str, bool]:
    """Whether higher is better, by name of each of the objective's other metrics."""
    return {other.name: other.higher_is_better for other in getattr(objective, "other_metrics", ())}

"""What a race left out, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def dropped_note(trials: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence on the trials that a race dropped, and where; none where it dropped none."""
    trials = list(trials)
    dropped = [trial for trial in trials if "dropped_at" in trial]
    if not dropped:
        return ()
    steps = "dropped_after" in dropped[0]
    where = Counter(int(trial["dropped_after" if steps else "dropped_at"]) for trial in dropped)
    told = ", ".join(f"{num} {'after' if steps else 'at'} {rung}" for rung, num in sorted(where.items()))
    unit = "training steps" if steps else "images"
    return (f"race: {len(dropped)} of {len(trials)} trials were dropped behind the best so far: {told} {unit}",)

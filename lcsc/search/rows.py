"""What an evaluation's row must be before the search counts on it; whatever is not is a failed evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lcsc.core.digests import canonical_json
from lcsc.search.evaluate import CAUSES, Row, failed_row

if TYPE_CHECKING:
    from lcsc.search.job import Job

#: What a record says of its step; a row must not say it otherwise.
_OWN = ("seq", "kind", "uid", "vector", "label", "family", "who", "block", "asked", "penalty", "vetoed", "inherited")

#: Numbers of a record that say nothing of the candidate.
_PLAIN = (
    *(*_OWN, "value", "se", "images", "num_images", "seconds"),
    *("prefix_value", "recheck", "dropped_at", "dropped_after"),  # how its score came about
)


def checked(row: Any, job: Job | None = None) -> Row:
    """The row, or that of a failure that says what is wrong with it.

    Args:
        row: what a worker gave.
        job: what was asked for; None checks what holds for all.
    """
    flaw = _flaw(row) or (None if job is None or row["value"] is None else _lack(row, job))
    return row if flaw is None else failed_row({}, f"its result is malformed: {flaw}", 0, cause="error")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def numbers(record: Row) -> dict[str, float]:
    """What a record tells of its candidate and its cost in numbers, by name."""
    return {name: float(value) for name, value in record.items() if name not in _PLAIN and is_number(value)}


def _flaw(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"it is {_shown(row)}, not a row"
    try:
        canonical_json(row)
    except (TypeError, ValueError, RecursionError) as error:
        return f"it cannot be written: {_shown(str(error))}"
    value, status, cost = row.get("value", "absent"), row.get("status", "absent"), row.get("image_forwards", "absent")
    if value is not None and not is_number(value):
        return f"`value` is {_shown(value)}; it must be a number, or null"
    if status != ("failed" if value is None else "ok"):
        return f"`status` is {_shown(status)} where `value` is {_shown(value)}"
    if value is None and (not isinstance(row.get("reason"), str) or row.get("cause", CAUSES[0]) not in CAUSES):
        return f"its reason is {_shown(row.get('reason'))}, its cause {_shown(row.get('cause'))}"
    for name, num in {"image_forwards": cost, "images": row.get("images", 0)}.items():
        if isinstance(num, bool) or not isinstance(num, int) or num < 0:
            return f"`{name}` is {_shown(num)}; it must be a whole number"
    strange = [name for name in _OWN if name in row]
    return f"it says its `{strange[0]}`, which is not its business" if strange else None


def _lack(row: Row, job: Job) -> str | None:
    """What a scored row does not say, or says otherwise than asked."""
    if job.full:
        others = row.get("others", {})
        if not isinstance(others, dict) or any(not isinstance(o, dict) or "value" not in o for o in others.values()):
            return f"`others` is {_shown(others)}"
        se = row.get("se", "absent")
        if se is not None and not is_number(se):
            return f"`se` is {_shown(se)}; it must be a number, or null"
    if job.call == "slope":
        gradient = row.get("gradient", "absent")
        if not isinstance(gradient, list) or len(gradient) != len(job.vector) or not all(map(is_number, gradient)):
            return f"`gradient` is {_shown(gradient)}; it must be {len(job.vector)} numbers"
    drawn = row.get("resamples", {})
    if not isinstance(drawn, dict) or any(
        not isinstance(values, list) or not all(map(is_number, values)) for values in drawn.values()
    ):
        return f"`resamples` is {_shown(drawn)}"
    return None


def _shown(value: Any) -> str:
    return f"`{str(value)[:100]}`"

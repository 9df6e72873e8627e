"""A run that was forked from another takes over the scores that hold for it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc.core.errors import RunError
from lcsc.search.evaluate import Row
from lcsc.search.frames import Record, read_records
from lcsc.search.rundir import RunDir

#: Settings that change what is scored, not what a score is. Sums are the same however a bank is stored.
_FREE = ("`search.", "`searcher.", "`bank.path`", "`bank.storage`")
#: What a record says of its place in the search rather than of the evaluation.
_PLACE = {
    *("seq", "kind", "uid", "vector", "block", "asked", "family", "label", "who"),
    *("penalty", "may_win", "inherited", "job"),
}


def inherited_rows(run: RunDir, note: Callable[[str], None]) -> dict[str, Row]:
    """The rows that a run takes from its parent, by the key of their job; marked with the parent's id.

    Failures are not taken over: their cause may be gone.

    Args:
        run: the child; one without a parent inherits nothing.
        note: hears why nothing is inherited.
    """
    parent = run.info.get("parent")
    if not parent:
        return {}
    other = [row for row in parent["differences"] if not row.startswith(_FREE)]
    if other:
        note(f"nothing is inherited from `{parent['run_id']}`, whose scores are others: {'; '.join(other)}")
        return {}
    try:
        found = RunDir.load(Path(parent["path"]))
        records, _ = read_records(found.path / "journal.jsonl")
    except (RunError, OSError) as error:
        note(f"nothing is inherited from `{parent['run_id']}`: {error}")
        return {}
    rows: dict[str, Row] = {}
    for record in records:
        if record.get("job") and record["value"] is not None:
            rows.setdefault(record["job"], {**_row(record), "inherited": parent["run_id"]})
    return rows


def num_inherited(records: Sequence[Record]) -> int:
    """How many of these were taken over."""
    return sum("inherited" in record for record in records)


def _row(record: Mapping[str, Any]) -> Row:
    place = _PLACE | ({"num_images"} if record["kind"] == "trial" else set())
    row = {key: value for key, value in record.items() if key not in place}
    if record["kind"] == "baseline" and "prefix_value" in row:  # an estimate, beside an anchor that is not the child's
        row["value"] = row.pop("prefix_value")
        del row["images"]
    return row

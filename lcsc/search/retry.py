"""Which failures at the end of a journal stopped the search, so that continuing tries them again."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc.search.frames import Record

#: A search pauses when more than half of so many trials in a row failed: something is wrong with more than candidates.
WINDOW = 20


def retry_from(records: Sequence[Record], num_trials: int) -> int:
    """Place of the first record to compute again; `len(records)` where no failure stopped the search.

    A search stops when more than half of `WINDOW` trials, all trials, all scores on the select seeds, or a score on the
    report seeds fail. What failed directly before, baselines too, is tried again with them: they share the cause.
    Failures among successes stay what they are, and the search goes on behind them.
    """
    end = len(records)
    if end and records[-1]["kind"] == "account":  # written after the last trial, whatever became of the trials
        end -= 1
    start = end
    while start and records[start - 1]["kind"] in ("baseline", "look", "trial") and records[start - 1]["value"] is None:
        start -= 1
    failed = sum(record["kind"] == "trial" for record in records[start:end])
    if failed and failed >= min(WINDOW // 2 + 1, num_trials):
        return start
    if not records or records[-1]["value"] is not None:
        return len(records)
    selected = [place for place, record in enumerate(records) if record["kind"] == "select"]
    if records[-1]["kind"] == "select" and all(records[place]["value"] is None for place in selected):
        return selected[0]
    return len(records) - (records[-1]["kind"] == "report")

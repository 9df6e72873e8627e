"""Results that are none: each is one failed evaluation with its reason, and the search goes on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from test_trials import Disorderly, problem, run, trials

from lcsc.core.seeds import Purpose
from lcsc.search.engines.base import Result
from lcsc.search.evaluate import done_row, failed_row
from lcsc.search.job import Job
from lcsc.search.rows import checked, numbers
from lcsc.search.worker import read_result, write_result

JOB = Job("score", (0.0, 1.0), Purpose.SEARCH, (0, 64))
GOOD = {"value": 1.5, "status": "ok", "reason": None, "image_forwards": 3}
BAD = {"value": None, "status": "failed", "cause": "oom", "reason": "no memory", "image_forwards": 0}
#: Malformed rows that can be written, and what is said of them.
MALFORMED = [
    (None, "it is `None`, not a row"),
    ([1.5], "it is `[1.5]`, not a row"),
    ({}, "`value` is `absent`; it must be a number, or null"),
    ({**GOOD, "value": "1.5"}, "`value` is `1.5`; it must be a number, or null"),
    ({**GOOD, "value": True}, "`value` is `True`; it must be a number, or null"),
    ({**GOOD, "value": 10**400}, f"`value` is `1{'0' * 99}`; it must be a number, or null"),
    ({**GOOD, "value": None}, "`status` is `ok` where `value` is `None`"),
    ({**GOOD, "status": "failed"}, "`status` is `failed` where `value` is `1.5`"),
    ({**GOOD, "status": 0}, "`status` is `0` where `value` is `1.5`"),
    ({**BAD, "reason": None}, "its reason is `None`, its cause `oom`"),
    ({**BAD, "cause": "fate"}, "its reason is `no memory`, its cause `fate`"),
    ({**BAD, "cause": ["oom"]}, "its reason is `no memory`, its cause `['oom']`"),
    ({**GOOD, "image_forwards": 1.5}, "`image_forwards` is `1.5`; it must be a whole number"),
    ({**GOOD, "images": "64"}, "`images` is `64`; it must be a whole number"),
    ({**GOOD, "seq": 0}, "it says its `seq`, which is not its business"),
]
#: Rows that no file can hold, but a process may send.
UNWRITABLE = [{**GOOD, "value": math.nan}, {**GOOD, "coef": np.zeros(2)}, {**GOOD, (1, 2): 3}]


@pytest.mark.parametrize(("row", "flaw"), MALFORMED)
def test_a_malformed_result_in_a_file_is_a_failed_evaluation(tmp_path, row, flaw):
    write_result(tmp_path, Result("a" * 32, row, 2.0, "w"))
    failed = failed_row({}, f"its result is malformed: {flaw}", 0, cause="error")
    assert read_result(tmp_path, "a" * 32) == Result("a" * 32, failed, 2.0, "w")


def test_seconds_that_are_none_are_0_and_good_rows_stay(tmp_path):
    for seconds, read in [(1.5, 1.5), ("long", 0.0), (None, 0.0), (-3, 0.0), (True, 0.0)]:
        for row in (GOOD, BAD, {**GOOD, "coef": [0.5], "images": 64, "recheck": None}):
            write_result(tmp_path, Result("a" * 32, row, seconds, "w"))
            assert read_result(tmp_path, "a" * 32) == Result("a" * 32, row, read, "w")


def test_what_was_asked_for_must_be_there():
    full, slope = dataclasses.replace(JOB, full=True), dataclasses.replace(JOB, call="slope")
    guarded = dataclasses.replace(full, resamples=True)
    other = {"se": None, "others": {"fid": {"value": 1.0, "se": None}}}
    good = [(GOOD, JOB), ({**GOOD, **other}, full), ({**GOOD, "gradient": [0.0, 1]}, slope), (BAD, full), (BAD, slope)]
    good.append(({**GOOD, **other, "resamples": {"fid": [1.0, 2.0]}}, guarded))
    assert [checked(row, job) for row, job in good] == [row for row, _ in good]
    wrong = [
        ({}, full, "`se` is `absent`"),
        ({"se": "0.1"}, full, "`se` is `0.1`"),
        ({"se": None, "others": {"fid": 1.0}}, full, "`others` is `{'fid': 1.0}`"),
        ({}, slope, "`gradient` is `absent`; it must be 2 numbers"),
        ({"gradient": [1.0]}, slope, "`gradient` is `[1.0]`; it must be 2 numbers"),
        ({"gradient": [1.0, "x"]}, slope, "`gradient` is `[1.0, 'x']`; it must be 2 numbers"),
        ({**other, "resamples": {"fid": 1.0}}, guarded, "`resamples` is `{'fid': 1.0}`"),
    ]
    for tail, job, flaw in wrong:
        row = checked({**GOOD, **tail}, job)
        assert row["reason"].startswith(f"its result is malformed: {flaw}")
        assert (row["value"], row["status"], row["cause"]) == (None, "failed", "error")


def test_a_search_goes_on_after_malformed_results(tmp_path):
    rows = [*(row for row, _ in MALFORMED), *UNWRITABLE]
    task = problem("cma", num_trials=4 * len(rows))

    class Garbling(Disorderly):
        """Every fourth result of a trial is malformed."""

        def collect(self, timeout=None):
            (*others, result) = super().collect(timeout)
            if len(self._old) > 3 and len(self._old) % 4 == 0 and rows:
                result = dataclasses.replace(result, row=rows.pop())
            return [*others[:1], result]

    outcome, records = run(tmp_path / "run", task, Garbling(task, 1, 0))
    failed = [record for record in trials(records) if record["status"] == "failed"]
    assert rows == []
    assert len(failed) == outcome.num_failed == len(MALFORMED) + len(UNWRITABLE)
    assert all(record["reason"].startswith("its result is malformed: ") for record in failed)
    assert run(tmp_path / "run", task, Disorderly(task, 1, 0, stop_after=0)) == (outcome, records)  # replayed


def test_rows_as_they_are_made_are_sound():
    assert checked(done_row({"coef": [1.0]}, 2.0, 5, {"images": 10}), JOB)["value"] == 2.0
    for job in (JOB, dataclasses.replace(JOB, call="slope"), dataclasses.replace(JOB, full=True)):
        assert checked(failed_row({}, "x", 0, gradient=None), job)["reason"] == "x"


def test_how_a_score_came_about_is_no_number_of_the_candidate():
    """Else `searcher=pareto` would offer the score of a few images as a second aim."""
    tail = {"images": 4, "prefix_value": 1.0, "recheck": 1.0, "dropped_at": 4, "dropped_after": 2, "coef": [1.0]}
    assert numbers(done_row({"bits": 3.0}, 2.0, 5, tail)) == {"bits": 3.0, "image_forwards": 5.0}

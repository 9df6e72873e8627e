"""When an evaluation counts as hung, by what others took."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lcsc.core.seeds import Purpose
from lcsc.search.engines.base import Result
from lcsc.search.job import Job
from lcsc.search.patience import Patience, judged, kind_of

JOB = Job("score", (0.0,), Purpose.SEARCH, (100, 200))


def with_images(num):
    return dataclasses.replace(JOB, images=(0, num))


def took(patience, *seconds, job=JOB, **row):
    for each in seconds:
        patience.add(job, Result("", {"value": 1.0, **row}, each))


def test_nothing_is_judged_before_five_of_a_run_are_done():
    patience = Patience()
    took(patience, 20.0, 10.0, 10.0, 500.0)
    took(patience, 1.0, 1.0, 1.0, value=None)  # failures take any time
    assert patience.limit(JOB, first=False) is None
    took(patience, 1.0)
    assert patience.limit(JOB, first=False) == 100.0  # 10 x the median, whatever the slowest took
    assert patience.limit(JOB, first=True) == 1000.0


def test_never_less_than_a_minute_and_in_proportion_to_more_images_alone():
    patience = Patience()
    took(patience, *[1.0] * 5)
    assert patience.limit(JOB, first=False) == 60.0
    assert patience.limit(with_images(2000), first=False) == 200.0
    took(patience, *[30.0] * 6)
    assert patience.limit(with_images(10), first=False) == 300.0  # what an evaluation has to do besides is not less


def test_a_kind_that_is_rare_is_judged_by_all_with_more_patience():
    patience, final = Patience(), dataclasses.replace(JOB, full=True, resamples=True, images=(0, 1000))
    took(patience, *[10.0] * 5)
    took(patience, 50.0, 50.0, 50.0, 50.0, job=final)
    assert patience.limit(final, first=False) == 10 * 10 * 10.0 * 10
    took(patience, 50.0, job=final)
    assert patience.limit(final, first=False) == 500.0
    assert patience.limit(JOB, first=False) == 100.0


def test_a_race_counts_the_images_that_it_came_to():
    patience, race = Patience(), dataclasses.replace(JOB, call="race", images=(0, 4000))
    took(patience, *[10.0] * 9, job=race, images=100)
    took(patience, 390.0, job=race, images=4000)
    assert patience.limit(race, first=False) == 10 * 10.0 * 40


def test_what_the_user_says_holds_and_what_others_took_does_not():
    patience = Patience(7.5)
    took(patience, *[100.0] * 9)
    assert [patience.limit(JOB, first) for first in (True, False)] == [7.5, 7.5]
    assert patience.paces == {}


@pytest.mark.parametrize("first", [True, False])
def test_paces_mean_the_same_in_another_process(first):
    patience = Patience()
    took(patience, *[17.0] * 5)
    there = json.loads(json.dumps(patience.paces))
    assert judged(there, *kind_of(JOB.to_plain()), first) == patience.limit(JOB, first) == (1700.0 if first else 170.0)

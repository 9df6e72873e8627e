"""The driver with many simulated workers, in virtual time: every fact here is exact, or a formula's."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.search.budget import Budget
from lcsc.search.dispatch import Dispatcher
from lcsc.search.engines.base import Closing, Result
from lcsc.search.frames import read_records
from lcsc.search.job import Job
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.searchers.nevergrad import NevergradSession

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulated import Coefficients, Loss, Luck, Nothing, SimulatedCrew


@pytest.fixture
def folder(tmp_path):
    """For journals of thousands of lines; in memory where the system offers it, as no test here is about the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


def drive(folder, crew, batch=None, searcher="random"):
    folder.mkdir()
    trials = crew.luck.seconds_AJ.shape[1]
    budget = Budget(trials, 10, num_finalists=2, num_images_select=4, num_images_report=4, batch_size=batch)
    problem = Problem(None, Coefficients(3), build("searcher", searcher), Nothing(), budget, 0)
    with Progress("scaling", 0, quiet=True) as progress, Journal(folder, print) as journal:
        Search(problem, journal, progress, crew).run()
    return [record for record in read_records(folder / "journal.jsonl")[0] if record["kind"] == "trial"]


def crew_of(workers, luck, **settings):
    return SimulatedCrew(workers, luck, **{"clock": lambda: 0.0, **settings})  # a driver that takes no time


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_all_trials_are_told_once_and_nobody_waits_for_the_slowest(folder, workers):
    luck = Luck.drawn(128, seed=workers, deaths=0.05)
    free, batches = crew_of(workers, luck), crew_of(workers, luck)
    told = [drive(folder / "free", free), drive(folder / "batches", batches, batch=workers)]
    for trials in told:
        assert sorted(trial["uid"] for trial in trials) == list(range(128))
    assert [trial["uid"] for trial in told[1]] == list(range(128))
    assert free.shares(free.asked_at)["idle"] == pytest.approx(0, abs=1e-12)
    if workers > 1:
        assert batches.shares(batches.asked_at)["idle"] > 0.2
        assert batches.ended_at > free.ended_at
    # the lost part of each evaluation, and nothing else, is done twice
    assert free.lost_seconds() == pytest.approx(np.nansum(luck.seconds_AJ * luck.dies_AJ * attempted(luck)))
    assert free.lost_seconds() > 0


def attempted(luck):
    """1 where an attempt was made: all before it had died."""
    died = ~np.isnan(luck.dies_AJ)
    return np.cumprod(np.vstack([np.ones(died.shape[1], bool), died[:-1]]), axis=0)


@pytest.mark.parametrize("batch", [None, 8])
def test_equal_times_leave_nobody_idle(folder, batch):
    crew = crew_of(8, Luck.of([3.0] * 48))
    drive(folder / "run", crew, batch)
    assert crew.ended_at == 3.0 * 48 / 8
    assert crew.shares(crew.ended_at) == {"useful": 1.0, "lost": 0.0, "dead": 0.0, "idle": 0.0}


def test_batches_of_exponential_times_are_idle_as_long_as_the_formula_says(folder):
    """The longest of n times of mean 1 takes H_n = 1 + 1/2 + ... + 1/n, so 1 / H_n of a batch is work."""
    workers, batches = 8, 60
    crew = crew_of(workers, Luck.of(np.random.default_rng(0).exponential(size=workers * batches)))
    drive(folder / "run", crew, batch=workers)
    harmonic = sum(1 / n for n in range(1, workers + 1))
    assert crew.shares(crew.ended_at)["idle"] == pytest.approx(1 - 1 / harmonic, abs=0.03)


def test_a_death_costs_its_evaluation_a_lease_and_a_restart(folder):
    luck = Luck(np.array([[10.0, 10.0], [10.0, 10.0]]), np.array([[0.4, np.nan], [np.nan, np.nan]]))
    crew = crew_of(1, luck, lease=5.0, restart=2.0)
    trials = drive(folder / "run", crew)
    assert [trial["uid"] for trial in trials] == [0, 1]
    assert crew.spans[:4] == [(0, 4, "lost"), (4, 11, "dead"), (11, 21, "useful"), (21, 31, "useful")]
    assert crew.done_at == [21, 31]


@pytest.mark.parametrize("back", [True, False])
def test_losing_half_of_the_workers_loses_no_trial(folder, back):
    crew = crew_of(8, Luck.of([4.0] * 100), lease=3.0, restart=2.0, loss=Loss(10.0, 4, back))
    trials = drive(folder / "run", crew)
    assert sorted(trial["uid"] for trial in trials) == list(range(100))
    at_work = {t: crew.at_work(t) for t in (9.5, 10.5, 14.5, 15.5, 30.5)}
    assert at_work == {9.5: 8, 10.5: 4, 14.5: 4, 15.5: 8 if back else 4, 30.5: 8 if back else 4}
    assert crew.slots == (8 if back else 4)


def test_a_worker_begins_while_the_proposals_of_the_others_are_made(folder, monkeypatch):
    now, ask = [0.0], NevergradSession.ask

    def slow(self):
        now[0] += 1
        return ask(self)

    monkeypatch.setattr(NevergradSession, "ask", slow)
    crew = crew_of(4, Luck.of([100.0] * 4), clock=lambda: now[0])
    drive(folder / "run", crew)
    begun = sorted(begin for begin, _, _ in crew.spans)[:4]
    assert begun == [0, 1, 2, 3]


def test_the_next_result_is_found_without_looking_through_all_open_trials():
    """With thousands of workers whatever grows with their number is paid for every trial."""

    class Everything(Closing):
        slots = 1000
        jobs: tuple = ()

        def submit(self, job):
            self.jobs = (*self.jobs, job)

        def collect(self, timeout=None):
            return [Result(job.uid, {}, 1.0) for job in reversed(self.jobs)]

    class Asked(dict):
        times = 0

        def __contains__(self, key):
            self.times += 1
            return super().__contains__(key)

        def __iter__(self):
            raise AssertionError("went through all of them")

    dispatcher = Dispatcher(Everything(), "run", Budget())
    uids = Asked(
        (dispatcher.submit(Job("score", (float(i),), Purpose.SEARCH, (0, 2)), f"trial {i}"), i) for i in range(200)
    )
    order = [uids.pop(dispatcher.first(uids).uid) for _ in range(200)]
    assert order == list(range(199, -1, -1))  # as they came
    assert uids.times == 200

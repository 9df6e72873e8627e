"""Trials in batches and as they come: the journal alone decides how a search goes on, whoever works for it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_fake_run import framed
from helpers_line import Line
from test_loop import Scripted

from lcsc.core.errors import BankError, ConfigError, EvaluationError, RunError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.objectives.base import Score
from lcsc.search.budget import Budget
from lcsc.search.dispatch import Dispatcher
from lcsc.search.engines.base import Closing, Result
from lcsc.search.frames import read_records
from lcsc.search.job import Job, Performer
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.searchers.base import Proposal


class Disorderly(Closing):
    """Some slots; gives results in any order, one at a time, some of them twice, and some that nobody asked for."""

    def __init__(self, problem, slots, seed, stop_after=None):
        self.slots, self._performer, self._rng = slots, Performer(problem), np.random.default_rng(seed)
        self._waiting, self._old, self._left, self.most_open = [], [], stop_after, 0

    def submit(self, job):
        self._waiting.append(job)
        self.most_open = max(self.most_open, len(self._waiting))

    def collect(self, timeout=None):
        if self._left == 0:
            raise KeyboardInterrupt
        if self._left is not None:
            self._left -= 1
        job = self._waiting.pop(self._rng.integers(len(self._waiting)))
        result = Result(job.uid, self._performer.perform(job), 1.0, "somebody")
        self._old.append(result)
        return [Result("nobody's", {"value": 0.0}, 1.0), self._old[self._rng.integers(len(self._old))], result]


class Sized(Line):
    """Candidates that tell a second number: what is far from the origin is cheap."""

    def apply(self, bank, point):
        cost = 100 - float(np.abs(point["x"]).sum())
        recipe = {"operator": "line", "cache_bytes_per_token": cost}
        return SimpleNamespace(x=np.asarray(point["x"]), recipe=recipe, measured={})


def problem(searcher="cma", num_trials=24, **budget):
    budget = {"num_finalists": 3, "num_images_select": 20, "num_images_report": 30, **budget}
    operator = Sized() if searcher == "pareto" else Line()
    return Problem(None, operator, build("searcher", searcher), Scripted(), Budget(num_trials, 10, **budget), 0)


def run(folder, task, crew=None):
    folder.mkdir(exist_ok=True)
    with Progress("", 0, quiet=True) as progress, Journal(folder, print) as journal:
        search = Search(task, journal, progress, crew)
        return search.run(), read_records(folder / "journal.jsonl")[0]


def trials(records):
    return [record for record in records if record["kind"] == "trial"]


@pytest.mark.parametrize("searcher", ["cma", "de", "lcsc_evolution", "random"])
@pytest.mark.parametrize("slots", [2, 5, 64])
def test_batches_give_one_journal_whoever_works(tmp_path, searcher, slots):
    task = problem(searcher, batch_size=5)
    whole = run(tmp_path / "run", task)
    (tmp_path / "other").mkdir()
    again = run(tmp_path / "other" / "run", task, Disorderly(task, slots, 1))
    assert again == whole
    places = [path / "run" / "journal.jsonl" for path in (tmp_path, tmp_path / "other")]
    assert places[0].read_bytes() == places[1].read_bytes()
    asked = [record.get("asked", record["uid"] + 1) for record in trials(whole[1])]
    assert asked == [min(5 * (uid // 5 + 1), 24) for uid in range(24)]


@pytest.mark.parametrize("searcher", ["cma", "pso", "lcsc_evolution", "pareto"])
def test_a_search_without_batches_goes_on_from_its_journal_with_other_workers(tmp_path, searcher):
    task = problem(searcher)
    # 3 baselines, then 24 trials; what is stopped has results that came in disorder, and open proposals
    for stop_after, slots in [(2, 4), (9, 4), (7, 3), (4, 1)]:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", task, Disorderly(task, slots, stop_after, stop_after))
    outcome, records = run(tmp_path / "run", task, Disorderly(task, 6, 5))
    told = trials(records)
    assert sorted(record["uid"] for record in told) == list(range(24))  # none lost, none twice
    assert [record["uid"] for record in told] != list(range(24))
    assert any("asked" in record for record in told)
    whole = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert run(tmp_path / "run", task, Disorderly(task, 1, 0, stop_after=0)) == (outcome, records)  # all replayed
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == whole


def test_a_searcher_that_weighs_hears_the_second_number_of_each_record(tmp_path):
    task = problem("pareto")
    outcome, records = run(tmp_path / "run", task)
    chosen = [record for record in records if record["kind"] == "select" and record["label"].startswith("trial")]
    front = {t["cache_bytes_per_token"]: t["value"] for t in trials(records)}
    kept = [(cost, value) for cost, value in front.items() if all(c > cost or v >= value for c, v in front.items())]
    assert {record["cache_bytes_per_token"] for record in chosen} <= {cost for cost, _ in kept}
    assert len(chosen) == min(3, len(kept))
    account = next(record for record in records if record["kind"] == "account")
    assert f"nothing beats {len(kept)} of 24 trials in both numbers" in account["lines"][0]
    assert outcome.winner["value"] == min(record["value"] for record in records if record["kind"] == "select")


def test_every_cut_of_a_disorderly_journal_is_continued(tmp_path):
    task = problem("cma", num_trials=10)
    run(tmp_path / "run", task, Disorderly(task, 4, 3))
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for num in range(len(lines)):
        path.write_bytes(b"".join(lines[:num]))
        _, records = run(tmp_path / "run", task, Disorderly(task, 2, num))
        assert path.read_bytes().startswith(b"".join(lines[:num]))
        assert sorted(record["uid"] for record in trials(records)) == list(range(10))


def test_one_worker_without_batches_is_one_after_the_other(tmp_path):
    task = problem("cma")
    _, records = run(tmp_path / "run", task)
    assert [record["uid"] for record in trials(records)] == list(range(24))
    assert not any("asked" in record for record in trials(records))


@pytest.mark.parametrize("searcher", ["one_plus_one", "lcsc_evolution", "auto"])
def test_open_proposals_are_as_many_as_the_workers(tmp_path, searcher):
    task = problem(searcher)
    crew = Disorderly(task, 8, 0)
    run(tmp_path / "run", task, crew)
    assert crew.most_open == 8  # the plan has fewer baselines and finalists


def test_a_searcher_that_needs_each_answer_has_one_proposal_open(tmp_path):
    class Step:
        """Goes down one number after the other; asked out of turn it fails."""

        def __init__(self):
            self.uid, self.open = 0, False

        def ask(self):
            assert not self.open
            self.open = True
            return Proposal(self.uid, np.array([1.0 / (self.uid + 1), 0.0]))

        def tell(self, uid, value, gradient=None):
            assert (uid, self.open) == (self.uid, True)
            self.uid, self.open = uid + 1, False

        def finalists(self, count):
            return None

    @dataclass(frozen=True)
    class Steps:
        def start(self, task):
            return Step()

    task = dataclasses.replace(problem(num_trials=6), searcher=Steps())
    _, records = run(tmp_path / "run", task, Disorderly(task, 4, 0))
    assert [record["uid"] for record in trials(records)] == list(range(6))


def test_a_journal_with_a_trial_nobody_proposed_is_refused(tmp_path):
    task = problem("cma", num_trials=6)
    run(tmp_path / "run", task)
    path = tmp_path / "run" / "journal.jsonl"
    records, _ = read_records(path)
    records[5] = {**records[5], "uid": 77}
    path.write_bytes(framed(records))
    with pytest.raises(RunError, match="record 5 is trial 77, which this search has not proposed"):
        run(tmp_path / "run", task)


# ------------------------------------------------------------------------------------------------ jobs


def test_a_job_survives_json_and_its_identity_is_its_content():
    job = Job("race", (0.1, -2.5e-300), Purpose.FRESH, (3, 9), floor=1.5, incumbent=((1.0, 2.0), 3.0)).named("r", "t 1")
    assert Job.from_plain(json.loads(json.dumps(job.to_plain()))) == job
    plain = dataclasses.replace(job, uid="")
    others = [plain.named("s", "t 1"), plain.named("r", "t 2"), dataclasses.replace(plain, floor=1.0).named("r", "t 1")]
    assert len({job.uid, *(other.uid for other in others)}) == 4


@dataclass
class Hungry(Scripted):
    """Fails for lack of memory while a network call takes more than some images."""

    batch_size: int = 64
    fits: int = 32
    error: type = MemoryError

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        self.calls.append(self.batch_size)
        if self.batch_size > self.fits:
            raise self.error("DefaultCPUAllocator: not enough memory")
        return Score(1.0, len(images), 1)


def perform(objective):
    task = dataclasses.replace(problem(), objective=objective)
    return Performer(task).perform(Job("score", (0.0, 0.0), Purpose.SEARCH, (0, 10)))


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_a_lack_of_memory_halves_the_batch_once(error):
    objective = Hungry(error=error)
    assert perform(objective)["value"] == 1.0
    assert objective.calls == [64, 32]
    row = perform(Hungry(fits=16, error=error))
    assert (row["value"], row["status"], row["cause"]) == (None, "failed", "oom")
    assert row["reason"] == "out of memory, also with 32 images a network call"


@dataclass
class Broken(Scripted):
    error: Exception | None = None

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        raise self.error


def test_whatever_code_raises_is_a_failure_with_its_cause():
    row = perform(Broken(error=KeyError("layer\n7")))
    assert (row["cause"], row["reason"], row["image_forwards"]) == ("error", r"KeyError: 'layer\n7'", 0)
    assert perform(Broken(error=EvaluationError("all images are equal")))["cause"] == "invalid"
    with pytest.raises(BankError, match="gone"):  # the problem's fault, not the candidate's
        perform(Broken(error=BankError("the bank is gone.")))


def test_idle_time_is_what_workers_waited(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("lcsc.search.dispatch.time.monotonic", lambda: clock[0])

    class Two(Closing):
        slots = 2

        def __init__(self):
            self.jobs = []

        def submit(self, job):
            self.jobs.append(job)

        def collect(self, timeout=None):
            clock[0] += 10.0
            return [Result(self.jobs.pop(0).uid, {"value": 1.0}, 8.0)]

    dispatcher = Dispatcher(Two(), "run", Budget())
    assert dispatcher.idle_share is None
    uids = [dispatcher.submit(Job("score", (float(i),), Purpose.SEARCH, (0, 1)), f"trial {i}") for i in range(2)]
    assert [dispatcher.first([uid]).uid for uid in uids] == uids
    assert dispatcher.idle_share == pytest.approx(1 - 16 / 40)  # 2 slots for 20 s


@pytest.mark.parametrize("bad", [0, -3, 1.5, "many"])
def test_a_batch_holds_something(bad):
    with pytest.raises(ConfigError, match="`search.batch_size` is"):
        Budget(batch_size=bad)

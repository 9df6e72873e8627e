"""A run that is forked from another computes only what the other has not."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from helpers_fake_run import framed
from helpers_line import Line
from test_loop import Scripted
from test_run_files import BUDGET, problem_of, trained

from lcsc.core.errors import RunError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.report.html import _facts
from lcsc.report.run import Run
from lcsc.search.budget import Budget
from lcsc.search.frames import read_records
from lcsc.search.job import Job
from lcsc.search.journal import Journal
from lcsc.search.lineage import inherited_rows, num_inherited
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.run import run_search
from lcsc.search.rundir import open_run_dir

SIZES = {"num_images": 10, "num_finalists": 3, "num_images_select": 20, "num_images_report": 30}
INFO = {"name": "toy", "config": {"seed": 0, "search": {"num_trials": 5}}, "fingerprints": {"bank": "abc"}}
OTHER = {**INFO, "config": {"seed": 0, "search": {"num_trials": 9}}}
NET = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}


# ---- directories


def test_another_configuration_is_refused_with_the_way_out(tmp_path):
    open_run_dir(tmp_path, tmp_path / "mine", INFO, print)
    with pytest.raises(RunError, match=r"`search\.num_trials`: 5 -> 9\. .* or add `fork=true`"):
        open_run_dir(tmp_path, tmp_path / "mine", OTHER, print)


@pytest.mark.parametrize("named", [True, False])
def test_a_child_names_its_parent_and_is_found_again(tmp_path, named):
    parent, _ = open_run_dir(tmp_path, tmp_path / "mine", INFO, print)
    explicit = tmp_path / "mine" if named else None
    child, state = open_run_dir(tmp_path, explicit, OTHER, print, True)
    assert state == "new"
    assert child.path.parent == tmp_path
    assert child.info["parent"] == {
        "run_id": "mine",
        "path": str(parent.path.resolve()),
        "differences": ["`search.num_trials`: 5 -> 9"],
    }
    assert child.parent == "mine"
    assert open_run_dir(tmp_path, explicit, OTHER, print, True) == (child, "resumed")
    assert open_run_dir(tmp_path, None, OTHER, print) == (child, "resumed")
    assert open_run_dir(tmp_path, explicit, INFO, print, True)[0] == parent  # the same search needs no child


def test_children_of_two_parents_are_told_apart(tmp_path):
    open_run_dir(tmp_path, tmp_path / "a", INFO, print)
    open_run_dir(tmp_path, tmp_path / "b", {**INFO, "config": {"seed": 1}}, print)
    first, _ = open_run_dir(tmp_path, tmp_path / "a", OTHER, print, True)
    second, state = open_run_dir(tmp_path, tmp_path / "b", OTHER, print, True)
    assert (first.parent, second.parent, state) == ("a", "b", "new")


def test_there_has_to_be_something_to_fork(tmp_path):
    with pytest.raises(RunError, match=r"`fork` is true, but .* has no run named `toy` to fork"):
        open_run_dir(tmp_path, None, INFO, print, True)
    with pytest.raises(RunError, match=r"no run directory: it has no run\.json"):
        open_run_dir(tmp_path, tmp_path / "none", INFO, print, True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_differs_in_the_budget_alone_is_pointed_out(tmp_path):
    old, _ = open_run_dir(tmp_path, None, INFO, print)
    notes = []
    open_run_dir(tmp_path, None, OTHER, notes.append)
    assert notes == [
        f"note: `{old.path}` differs in `search.num_trials`: 5 -> 9 alone; `fork=true` would take its scores over"
    ]


# ---- scores


def find(runs, num_trials=4, fork=False, name="distance", notes=None, **budget):
    """A search on an objective that counts; the run directory, its records and how often it scored."""
    budget = Budget(num_trials, **{**SIZES, **budget})
    objective = Scripted(name=name)
    problem = Problem(None, Line(), build("searcher", "random"), objective, budget, 0)
    config = {"seed": 0, "search": dataclasses.asdict(budget), "objective": {"name": name}}
    info = {"name": "toy", "config": config, "fingerprints": {"evaluator": {"metric": name}}}
    note = (notes if notes is not None else []).append
    run, _ = open_run_dir(runs, None, info, lambda _: None, fork)
    with Progress("toy", 0, quiet=True) as progress, Journal(run.path, print) as journal:
        Search(problem, journal, progress, None, inherited_rows(run, note)).run()
    return run, read_records(run.path / "journal.jsonl")[0], [purpose.name for purpose, _ in objective.calls]


def plain(record):
    return {key: value for key, value in record.items() if key not in ("seq", "inherited")}


def test_more_trials_cost_only_the_new_ones(tmp_path):
    parent, _, _ = find(tmp_path / "runs")
    child, records, calls = find(tmp_path / "runs", 7, fork=True)
    _, whole, all_calls = find(tmp_path / "alone", 7)
    assert [plain(record) for record in records] == [plain(record) for record in whole]
    marked = [record for record in records if "inherited" in record]
    assert {record["inherited"] for record in marked} == {parent.path.name}
    assert calls.count("SEARCH") == 3
    assert len(calls) + len(marked) == len(all_calls)  # each score was computed or taken over
    assert num_inherited(records) == len(marked) >= 3 + 4
    assert find(tmp_path / "runs", 7, fork=True)[1:] == (records, [])  # the child's journal holds all of it
    shutil.rmtree(parent.path)  # and its own child takes over from it
    _, records, calls = find(tmp_path / "runs", 8, fork=True)
    assert calls.count("SEARCH") == 1
    assert {record["inherited"] for record in records if "inherited" in record} == {child.path.name}


def test_another_evaluator_inherits_nothing_and_says_so(tmp_path):
    parent, _, _ = find(tmp_path)
    notes = []
    _, records, calls = find(tmp_path, fork=True, name="other", notes=notes)
    assert num_inherited(records) == 0
    assert len(calls) == len([record for record in records if record["kind"] != "floor"])
    assert notes == [
        f"nothing is inherited from `{parent.path.name}`, whose scores are others: "
        "`objective.name`: distance -> other; `fingerprints.evaluator.metric`: distance -> other"
    ]


def test_another_number_of_images_is_another_job(tmp_path):
    find(tmp_path)
    _, records, calls = find(tmp_path, fork=True, num_images=11)
    assert calls.count("SEARCH") == 3 + 4
    assert {record["kind"] for record in records if "inherited" in record} <= {"select", "report"}


@pytest.mark.parametrize("look", [None, 3])
def test_a_first_look_is_taken_over_as_the_score_that_it_was(tmp_path, monkeypatch, look):
    """What the parent estimated of 10 images is no score of the 4 that it had seen."""
    whole = Scripted.__call__

    def biased(self, candidate, *, images, **how):
        score = whole(self, candidate, images=images, **how)
        return dataclasses.replace(score, value=score.value + 40 / len(images))

    monkeypatch.setattr(Scripted, "__call__", biased)
    find(tmp_path / "runs", num_images_baselines=4)
    _, records, _ = find(tmp_path / "runs", fork=True, num_images=4, num_images_baselines=look)
    _, alone, _ = find(tmp_path / "alone", num_images=4, num_images_baselines=look)
    assert [plain(record) for record in records] == [plain(record) for record in alone]
    assert num_inherited(records) > 0


def test_failures_are_tried_again(tmp_path):
    parent, records, _ = find(tmp_path)
    bad = next(record for record in records if record["kind"] == "trial")
    bad.update(value=None, status="failed", cause="oom", reason="out of memory")
    (parent.path / "journal.jsonl").write_bytes(framed(records))
    _, records, calls = find(tmp_path, 5, fork=True)
    trials = [record for record in records if record["kind"] == "trial"]
    assert ["inherited" in trial for trial in trials] == [False, True, True, True, False]
    assert trials[0]["status"] == "ok"
    assert calls.count("SEARCH") == 2


def test_what_was_beyond_a_budget_there_may_win_where_none_is_kept(tmp_path):
    parent, records, _ = find(tmp_path)
    next(record for record in records if record["kind"] == "trial").update(may_win=False)
    (parent.path / "journal.jsonl").write_bytes(framed(records))
    _, records, _ = find(tmp_path, 5, fork=True)
    trials = [record for record in records if record["kind"] == "trial"]
    assert ["inherited" in trial for trial in trials] == [True, True, True, True, False]
    assert not any("may_win" in trial for trial in trials)


def test_a_parent_that_is_not_there_or_is_damaged_gives_nothing(tmp_path):
    parent, _, _ = find(tmp_path)
    child, _, _ = find(tmp_path, 5, fork=True)
    journal = parent.path / "journal.jsonl"
    for spoil, reason in [
        (lambda: journal.write_bytes(b"{}\n" + journal.read_bytes()), "is damaged at record 0"),
        (lambda: shutil.rmtree(parent.path), "is no run directory: it has no run.json"),
    ]:
        spoil()
        (child.path / "journal.jsonl").unlink()
        notes = []
        _, records, calls = find(tmp_path, 5, notes=notes)
        assert (num_inherited(records), calls.count("SEARCH")) == (0, 3 + 5)
        assert len(notes) == 1
        assert notes[0].startswith(f"nothing is inherited from `{parent.path.name}`: ")
        assert reason in notes[0]


def test_a_race_is_the_same_job_only_at_the_same_sizes():
    job = Job("race", (0.0, 1.0), Purpose.SEARCH, (0, 40), incumbent=((1.0, 1.0), 2.0))
    key = job.key(Budget(4, 40, prefixes=[10]))
    assert key == job.named("run", "trial 0").key(Budget(9, 40, prefixes=[10]))
    assert key != job.key(Budget(4, 40, prefixes=[20]))
    assert key != job.key(Budget(4, 40, prefixes=[10], drop_level=0.1))
    assert key != dataclasses.replace(job, incumbent=((1.0, 1.0), 3.0)).key(Budget(4, 40, prefixes=[10]))
    score = dataclasses.replace(job, call="score")
    assert score.key(Budget(4, 40, prefixes=[10])) == score.key(Budget(4, 40))


@pytest.mark.slow
def test_lineage_is_in_the_summary_and_the_report(tmp_path):
    bank = trained(tmp_path / "bank", NET, build("dataset", "gaussian"))
    paths = []
    for num_trials in (2, 3):
        budget = dataclasses.replace(BUDGET, num_trials=num_trials)
        problem = problem_of(bank, searcher="random", budget=budget)
        fork = bool(paths)
        paths.append(run_search(problem, name="toy", runs_dir=tmp_path / "runs", quiet=True, fork=fork))
    parent, child = paths
    num = num_inherited(read_records(child / "journal.jsonl")[0])
    summary = json.loads((child / "summary.json").read_text())
    assert num > 2
    assert (summary["parent"], summary["num_inherited"]) == (parent.name, num)
    assert json.loads((parent / "summary.json").read_text())["num_inherited"] == 0
    assert dict(_facts(Run.open(child)))["forked from"] == f"{parent.name} ({num} scores inherited)"
    assert "forked from" not in dict(_facts(Run.open(parent)))

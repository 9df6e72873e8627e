"""The loop's promises, on an objective whose every number is known: failures, suspicion, selection, counting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.core.space import Box, SearchSpace
from lcsc.objectives.base import Score
from lcsc.operators.base import Baseline
from lcsc.search.journal import Journal, read_records
from lcsc.search.loop import MAX_FAILURES, Budget, Problem, Search
from lcsc.search.progress import Progress


@dataclass
class Weights:
    """A candidate reduced to its point."""

    x: np.ndarray

    @property
    def recipe(self):
        return {"operator": "line"}


class Line:
    """Two numbers; two baseline families."""

    def space(self, bank):
        return SearchSpace((Box("x", 2),))

    def apply(self, bank, point):
        return Weights(np.asarray(point["x"]))

    def baselines(self, bank):
        points = {"near": [1.0, 1.0], "far": [3.0, 3.0]}
        rows = [Baseline("a", "near", {"x": points["near"]}), Baseline("a", "far", {"x": points["far"]})]
        return [*rows, Baseline("b", "other", {"x": [2.0, 2.0]})]


@dataclass
class Scripted:
    """Distance from the origin, spoilt on purpose."""

    spoil: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    floor_value: float | None = None
    name: str = "distance"
    min_images: int = 2

    def floor(self):
        return self.floor_value

    def circumstances(self):
        return {"nfe": 1}

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        index = sum(p is purpose for p, _ in self.calls)
        self.calls.append((purpose, len(images)))
        value = float(np.hypot(*candidate.x)) + 1
        outcome = self.spoil.get((purpose, index), value)
        if isinstance(outcome, Exception):
            raise outcome
        return Score(outcome, len(images), 1, 0.1 if full else None)


def search(tmp_path, objective, num_trials=12, **budget):
    budget = Budget(num_trials, 10, **{"num_finalists": 3, "num_images_select": 20, "num_images_report": 30, **budget})
    problem = Problem(None, Line(), build("searcher", "one_plus_one"), objective, budget, 0)
    with Progress("loop", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        return Search(problem, journal, progress).run(), read_records(tmp_path / "journal.jsonl")[0]


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


BASELINES = 3  # calls with search seeds before the first trial


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "the score is nan"),
        (math.inf, "the score is inf"),
        (-math.inf, "the score is -inf"),
        (EvaluationError("all images are equal"), "all images are equal"),
    ],
)
def test_a_failed_trial_costs_one_evaluation_and_never_wins(tmp_path, bad, reason):
    outcome, records = search(tmp_path, Scripted({(Purpose.SEARCH, BASELINES + 4): bad}))
    failed = of_kind(records, "trial")[4]
    assert (failed["value"], failed["status"], failed["reason"]) == (None, "failed", reason)
    assert outcome.num_failed == 1
    assert outcome.winner["label"] != "trial 4"
    assert "trial 4" not in [record["label"] for record in of_kind(records, "select")]
    assert len(of_kind(records, "trial")) == 12


def test_a_failure_is_told_as_the_worst_value_and_nothing_else(tmp_path, monkeypatch):
    told = []
    from lcsc.searchers import nevergrad

    real = nevergrad._Session.tell
    monkeypatch.setattr(
        nevergrad._Session, "tell", lambda self, uid, value, _: told.append(value) or real(self, uid, value)
    )
    _, records = search(tmp_path, Scripted({(Purpose.SEARCH, BASELINES): math.nan}))
    values = [record["value"] for record in of_kind(records, "trial")]
    worst_baseline = max(record["value"] for record in of_kind(records, "baseline"))
    assert told[0] == worst_baseline == pytest.approx(math.hypot(3, 3) + 1)
    assert told[1:] == values[1:]


def test_better_than_real_data_is_scored_again_and_the_worse_value_counts(tmp_path):
    spoil = {(Purpose.SEARCH, BASELINES + 2): 0.001, (Purpose.RECHECK, 0): 7.5}
    objective = Scripted(spoil, floor_value=0.5)
    outcome, records = search(tmp_path, objective)
    suspect = of_kind(records, "trial")[2]
    assert (suspect["value"], suspect["recheck"]) == (7.5, 7.5)
    assert sum(purpose is Purpose.RECHECK for purpose, _ in objective.calls) == 1
    assert outcome.images_sampled == sum(num for _, num in objective.calls)


def test_a_suspect_that_fails_when_scored_again_has_failed(tmp_path):
    spoil = {(Purpose.SEARCH, BASELINES + 2): 0.001, (Purpose.RECHECK, 0): EvaluationError("collapsed")}
    _, records = search(tmp_path, Scripted(spoil, floor_value=0.5))
    suspect = of_kind(records, "trial")[2]
    assert suspect["status"] == "failed"
    assert suspect["reason"] == "too good (0.001), then: collapsed"


def test_twenty_failures_in_a_row_stop_the_search(tmp_path):
    spoil = {(Purpose.SEARCH, BASELINES + i): EvaluationError(f"broken {i}.") for i in range(40)}
    with pytest.raises(EvaluationError, match=rf"the last {MAX_FAILURES} trials failed: broken 19\. Mend the cause"):
        search(tmp_path, Scripted(spoil), num_trials=40)
    records, _ = read_records(tmp_path / "journal.jsonl")
    assert len(of_kind(records, "trial")) == MAX_FAILURES


def test_the_winner_is_chosen_on_the_select_seeds_and_reported_on_the_report_seeds(tmp_path):
    # the third of the finalists is the best on the select seeds
    spoil = {
        (Purpose.SELECT, 0): 5.0,
        (Purpose.SELECT, 1): math.nan,
        (Purpose.SELECT, 2): 1.0,
        (Purpose.REPORT, 0): 4.25,
    }
    outcome, records = search(tmp_path, Scripted(spoil))
    finalists = of_kind(records, "select")
    ranked = sorted(of_kind(records, "trial"), key=lambda r: (r["value"], r["uid"]))
    labels = [f"trial {record['uid']}" for record in ranked[:3]]
    assert [record["label"] for record in finalists] == [*labels, "near"]
    assert outcome.winner["label"] == finalists[2]["label"]
    assert outcome.reports[0]["who"] == "best"
    assert (outcome.reports[0]["value"], outcome.reports[0]["se"]) == (4.25, 0.1)
    assert [(r["who"], r["label"]) for r in outcome.reports[1:]] == [("a", "near"), ("b", "other")]


def test_the_searcher_starts_at_the_best_baseline(tmp_path):
    _, records = search(tmp_path, Scripted())
    assert np.allclose(of_kind(records, "trial")[0]["vector"], [1.0, 1.0])


def test_images_are_counted_once_also_when_continued(tmp_path):
    objective = Scripted()
    first, records = search(tmp_path, objective)
    assert first.images_sampled == sum(num for _, num in objective.calls) == 3 * 10 + 12 * 10 + 4 * 20 + 3 * 30
    idle = Scripted()
    again, same = search(tmp_path, idle)
    assert idle.calls == []
    assert same == records
    assert again == first


def test_budgets_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"`search\.num_trials` is 0; it must be at least 1"):
        Budget(num_trials=0)
    with pytest.raises(ConfigError, match=r"`search\.num_images_select` is 1: too few images for `distance`"):
        search(tmp_path, Scripted(), num_images_select=1)

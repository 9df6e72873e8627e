"""Baselines on a few images first: values that compare with trials', what is said of them, and what may fail."""

from __future__ import annotations

import json

import pytest
from test_loop import Scripted, of_kind, search

from lcsc.config.hydra_app import compose_config
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.objectives.base import Score
from lcsc.search.budget import Budget
from lcsc.search.progress import Progress
from lcsc.searchers.base import learns

LOOK = {"num_images_baselines": 4, "searcher": "cma"}
#: Distances of the baselines: near, far, other.
NEAR, FAR, OTHER = (1 + 2**0.5 * length for length in (1, 3, 2))


class Biased(Scripted):
    """Scores of few images are higher, as Fréchet distances are."""

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        score = super().__call__(candidate, seed=seed, purpose=purpose, images=images, full=full)
        return Score(score.value + 40 / len(images), len(images), 1, score.se)


def test_values_are_estimates_of_full_scores_and_say_so(tmp_path):
    outcome, records = search(tmp_path, Biased(), **LOOK)
    near, far, other = of_kind(records, "baseline")
    assert near["value"] == pytest.approx(NEAR + 4)
    assert "prefix_value" not in near  # the anchor, scored on all ten
    for row, distance in ((far, FAR), (other, OTHER)):
        assert row["value"] == pytest.approx(distance + 4)
        assert row["prefix_value"] == pytest.approx(distance + 10)
        assert (row["images"], row["image_forwards"]) == (4, 4)
    look = of_kind(records, "look")
    assert [row["value"] for row in look] == [pytest.approx(NEAR + 10)]
    assert [row["label"] for row in of_kind(records, "select")][:3] == ["near", "far", "other"]  # all of their family
    assert outcome.image_forwards == outcome.images_sampled == (10 + 3 * 4) + 12 * 10 + 6 * 20 + 3 * 30


def test_the_next_baseline_is_the_anchor_where_the_first_breaks(tmp_path):
    broken = EvaluationError("diverged")
    _, records = search(tmp_path / "whole", Biased({(Purpose.SEARCH, 0): broken}), **LOOK)
    assert [row["value"] for row in of_kind(records, "baseline")] == [
        None,
        pytest.approx(FAR + 4),
        pytest.approx(OTHER + 4),
    ]
    _, records = search(tmp_path / "few", Biased({(Purpose.SEARCH, 1): broken}), **LOOK)
    assert [row["value"] for row in of_kind(records, "look")] == [None, pytest.approx(FAR + 10)]
    assert of_kind(records, "baseline")[2]["value"] == pytest.approx(OTHER + 4)


def test_an_interrupted_look_goes_on_to_the_same_journal(tmp_path):
    _, whole = search(tmp_path / "whole", Biased(), **LOOK)
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    for cut in (kinds.index("look"), kinds.index("look") + 1, kinds.index("look") + 2):
        (tmp_path / str(cut)).mkdir()
        (tmp_path / str(cut) / "whole").mkdir()
        (tmp_path / str(cut) / "whole" / "journal.jsonl").write_text("".join(lines[:cut]))
        assert search(tmp_path / str(cut) / "whole", Biased(), **LOOK)[1] == whole


def test_the_plan_counts_the_anchor_twice(tmp_path, monkeypatch):
    plans, steps = [], []
    monkeypatch.setattr(Progress, "expect", lambda self, total: plans.append(total))
    monkeypatch.setattr(Progress, "step", lambda self, *args: steps.append(args))
    search(tmp_path, Scripted(), **LOOK)
    assert plans[-1] == len(steps)


@pytest.mark.parametrize("more", [{"num_images_baselines": 10}, {"num_images_baselines": 12}, {"prefixes": [3]}])
def test_where_there_are_no_fewer_images_there_is_one_look(more):
    assert Budget(5, 10, num_images_baselines=4).first_look == 4
    assert Budget(5, 10, **{"num_images_baselines": 4, **more}).first_look is None
    assert Budget(5, 10).first_look is None


@pytest.mark.parametrize("name", ["lcsc_evolution", "de", "one_plus_one", "ladder"])
def test_searchers_that_learn_from_baselines_get_scores_and_no_estimates(tmp_path, name, monkeypatch):
    plans, steps = [], []
    monkeypatch.setattr(Progress, "expect", lambda self, total: plans.append(total))
    monkeypatch.setattr(Progress, "step", lambda self, *args: steps.append(args))
    _, records = search(tmp_path, Biased(), **{**LOOK, "searcher": name})
    assert not of_kind(records, "look")
    assert [row["value"] for row in of_kind(records, "baseline")] == pytest.approx([NEAR + 4, FAR + 4, OTHER + 4])
    assert plans[-1] == len(steps) or name == "ladder"  # which may name fewer finalists


@pytest.mark.parametrize("settings", [{"name": "de", "warm_start": False}, {"name": "ladder", "line_trials": 0}])
def test_searchers_that_only_begin_at_a_baseline_learn_nothing(settings):
    assert not learns(build("searcher", settings))


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="`search.num_images_baselines` is 0; it must be at least 1"):
        Budget(num_images_baselines=0)
    with pytest.raises(ConfigError, match="`search.num_images_baselines` is 1: too few images for `distance`"):
        search(tmp_path, Scripted(), num_images_baselines=1)


@pytest.mark.parametrize("words", [["digits"], ["mnist16", "dataset.path=x", "metric.weights_path=x"]])
def test_the_measured_experiments_begin_with_a_first_look(words):
    budget = Budget(**compose_config([f"experiment={words[0]}", *words[1:]])["search"])
    assert (budget.first_look, budget.num_images, budget.num_trials, budget.num_finalists) == (80, 250, 160, 4)

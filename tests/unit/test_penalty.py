"""The price on distance: exact in weight space, told to every searcher, kept out of scores and of the choice."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers_line import Line, Plain

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.core.space import Box, SearchSpace
from lcsc.objectives.base import Score, Slope
from lcsc.operators.base import Distances
from lcsc.search.budget import Budget
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.penalty import Penalty
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.searchers.base import Proposal, Start

OPERATORS = {
    "linear": {},
    "truncated": {"name": "linear", "rank": 2},
    "linear_grouped": {"groups": {"down": "down_blocks", "up": "up_blocks"}},
}


@pytest.fixture
def bank(tiny_bank):
    return CheckpointBank.open(tiny_bank)


def make(key, bank):
    """Operator, space and the penalty from its tenth baseline, with weight 3."""
    settings = dict(OPERATORS[key])
    operator = build("operator", settings.pop("name", key), **settings)
    space = operator.space(bank)
    anchor = space.to_vector(operator.baselines(bank)[10].point)
    return operator, space, Penalty(3.0, bank, operator, space, anchor)


@pytest.mark.parametrize("key", OPERATORS)
def test_the_price_is_the_squared_distance_of_the_weights(bank, key):
    operator, space, penalty = make(key, bank)
    W_KP = bank.matrix().double()

    def theta(vector):
        row_P = torch.empty(bank.layout.num_parameters)
        operator.apply(bank, space.to_point(vector)).write(row_P)
        return row_P.double()

    unit = float(((W_KP[-1] - W_KP.mean(0)) ** 2).sum())
    for seed in range(3):
        vector = penalty.anchor + np.random.default_rng(seed).normal(size=space.size)
        wanted = 3 * float(((theta(vector) - theta(penalty.anchor)) ** 2).sum()) / unit
        assert penalty.paid(vector) == pytest.approx(wanted, rel=1e-5)  # candidates are float32
    assert penalty.paid(penalty.anchor) == 0
    assert not penalty.slope(penalty.anchor).any()


@pytest.mark.parametrize("key", OPERATORS)
def test_the_slope_is_the_prices_derivative(bank, key):
    _, space, penalty = make(key, bank)
    vector = penalty.anchor + np.random.default_rng(0).normal(size=space.size)
    steps = 1e-3 * np.eye(space.size)  # central differences of a quadratic are exact
    wanted = [(penalty.paid(vector + step) - penalty.paid(vector - step)) / 2e-3 for step in steps]
    np.testing.assert_allclose(penalty.slope(vector), wanted, rtol=1e-6, atol=1e-8)


def test_an_objectives_own_boxes_cost_nothing(bank):
    operator, space, penalty = make("linear", bank)
    wide = SearchSpace((*space.boxes, Box("times", 2, level=1)))
    longer = Penalty(3.0, bank, operator, wide, np.append(penalty.anchor, [0.0, 0.0]))
    vector = np.random.default_rng(0).normal(size=space.size)
    assert longer.paid(np.append(vector, [5.0, 7.0])) == penalty.paid(vector)
    assert longer.slope(np.append(vector, [5.0, 7.0])).tolist() == [*penalty.slope(vector), 0, 0]


# ------------------------------------------------------------------------------------------------------- in a search
class Pair(Line):
    """Two baselines, and no distance."""

    rows = (("a", "near", [1.0, 1.0]), ("b", "other", [2.0, 3.0]))


class Plane(Pair):
    """Combinations of the checkpoints (1, 0), (0, 1) and (0, 0), by the coefficients of the first two."""

    W_KP = np.array([[1.0, 0], [0, 1], [0, 0]])

    def coefficients(self, bank, point):
        return np.append(point["x"], 1 - np.sum(point["x"]))

    def distances(self, bank):
        delta_KP = self.W_KP - self.W_KP.mean(0)
        return Distances((delta_KP @ delta_KP.T)[None], lambda grad_GK: {"x": grad_GK[0, :2] - grad_GK[0, 2]})

    def pull_back(self, bank, point, grad_P):
        return {"x": np.asarray(grad_P, dtype=float)}


@dataclass
class Distance(Plain):
    """Distance from the origin plus one, with its derivative."""

    no_gradient: str | None = None

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        return Score(float(np.hypot(*candidate.x)) + 1, len(images), 1, 0.1 if full else None)

    def slope(self, candidate, *, seed, purpose, images):
        length = float(np.hypot(*candidate.x))
        return Slope(length + 1, torch.from_numpy(candidate.x / length), 4 * len(images))


@dataclass
class Listener:
    """Proposes given vectors, some of them with a derivative, and keeps what it is told."""

    vectors: list
    told: list = field(default_factory=list)
    starts: list = field(default_factory=list)
    asked: int = 0

    def start(self, task):
        self.starts[:], self.asked = task.starts, 0
        return self

    def ask(self):
        self.asked += 1
        return Proposal(self.asked - 1, np.array(self.vectors[self.asked - 1]), gradient=self.asked % 2 == 0)

    def tell(self, uid, value, gradient=None):
        self.told.append((value, None if gradient is None else gradient.tolist()))

    def finalists(self, count):
        return None


def price(x, weight=2.0):
    """Of Plane, from the baseline (1, 1): the last checkpoint is sqrt(2)/3 from the mean."""
    return weight * ((x[0] - 1) ** 2 + (x[1] - 1) ** 2) / (2 / 9)


VECTORS = [[0.5, 0.5], [0.9, 0.8], [0.1, 0.1], [1.0, 0.5]]


def search(folder, searcher, operator=None, **budget):
    budget = Budget(4, 10, **{"num_finalists": 2, "num_images_select": 20, "num_images_report": 30, **budget})
    problem = Problem(None, operator or Plane(), searcher, Distance(), budget, 0)
    with Progress("penalty", 0, quiet=True) as progress, Journal(folder, print) as journal:
        outcome = Search(problem, journal, progress).run()
    return outcome, read_records(folder / "journal.jsonl")[0]


def test_searchers_hear_the_price_and_records_keep_score_and_price_apart(tmp_path):
    listener = Listener(VECTORS)
    outcome, records = search(tmp_path, listener, penalty=2.0)
    trials = [record for record in records if record["kind"] == "trial"]
    assert [trial["value"] for trial in trials] == pytest.approx([np.hypot(*x) + 1 for x in VECTORS])
    assert [trial["penalty"] for trial in trials] == pytest.approx([price(x) for x in VECTORS])
    assert [value for value, _ in listener.told] == [trial["value"] + trial["penalty"] for trial in trials]
    x, (_, slope) = np.array(VECTORS[1]), listener.told[1]
    np.testing.assert_allclose(trials[1]["gradient"], x / np.hypot(*x), rtol=1e-6)
    np.testing.assert_allclose(slope, x / np.hypot(*x) + 2 * 2.0 * (x - 1) / (2 / 9), rtol=1e-6)
    heard = [(start.label, start.value) for start in listener.starts]
    assert heard == [("near", pytest.approx(2**0.5 + 1)), ("other", pytest.approx(13**0.5 + 1 + price([2, 3])))]
    chosen = [record["label"] for record in records if record["kind"] == "select"]
    assert chosen == ["near", "other", "trial 1", "trial 3"]  # the finalists are the best with the price ...
    assert outcome.winner["label"] == "trial 3"  # ... and the winner is the best of them without: 2.12 against 2.20
    assert all("penalty" not in record for record in records if record["kind"] in ("select", "report", "baseline"))
    assert outcome.reports[0]["value"] == pytest.approx(np.hypot(1.0, 0.5) + 1)


def test_a_penalised_search_is_replayed(tmp_path):
    first, again = Listener(VECTORS), Listener(VECTORS)
    outcome, records = search(tmp_path, first, penalty=2.0)
    assert search(tmp_path, again, penalty=2.0) == (outcome, records)
    assert again.told == first.told


def test_without_a_penalty_nothing_is_added(tmp_path):
    listener = Listener(VECTORS)
    _, records = search(tmp_path, listener)
    trials = [record for record in records if record["kind"] == "trial"]
    assert [value for value, _ in listener.told] == [trial["value"] for trial in trials]
    assert all("penalty" not in trial for trial in trials)


@pytest.mark.parametrize("name", ["gradient", "lbfgs", "cma", "de", "lcsc_evolution"])
def test_a_high_price_keeps_every_searcher_near_the_best_baseline(tmp_path, name):
    budget = {"num_trials": 40, "num_images": 10, "num_images_select": 20, "num_images_report": 30}
    means = []
    for weight in (0.0, 300.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        problem = Problem(None, Plane(), build("searcher", name), Distance(), Budget(**budget, penalty=weight), 0)
        with Progress("penalty", 0, quiet=True) as progress, Journal(folder, print) as journal:
            winner = Search(problem, journal, progress).run().winner
        means.append(np.hypot(*(np.array(winner["vector"]) - 1)))
    assert means[1] < 0.5 * means[0]


def test_a_failure_is_told_as_the_worst_that_was_heard(tmp_path, monkeypatch):
    real = Distance.__call__
    monkeypatch.setattr(
        Distance,
        "__call__",
        lambda self, candidate, **how: (
            Score(float("nan"), 10, 1)
            if how["purpose"] is Purpose.SEARCH and candidate.x[0] == 0.1
            else real(self, candidate, **how)
        ),
    )
    listener = Listener(VECTORS)
    search(tmp_path, listener, penalty=2.0)
    assert listener.told[2][0] == pytest.approx(13**0.5 + 1 + price([2, 3]))


@pytest.mark.parametrize(
    ("settings", "operator", "sentence"),
    [
        ({"penalty": 1.0}, Pair(), r"`search\.penalty` is 1\.0, but the operator `Pair` knows no distance of weights"),
        ({"penalty": 1.0, "prefixes": [5]}, Plane(), "but a race compares scores without a penalty"),
        ({"penalty": -1.0}, Plane(), r"`search\.penalty` is -1\.0; it must be a number from 0 to 1e\+12\. "),
        ({"penalty": float("nan")}, Plane(), r"`search\.penalty` is nan; it must be a number from 0 to 1e\+12\. "),
        ({"penalty": 1e308}, Plane(), r"`search\.penalty` is 1e\+308; it must be a number from 0 to 1e\+12\. "),
    ],
)
def test_mistakes_are_named(tmp_path, settings, operator, sentence):
    with pytest.raises(ConfigError, match=sentence):
        search(tmp_path, Listener(VECTORS), operator, **settings)


def test_a_bank_whose_last_checkpoint_is_the_mean_has_no_unit(bank, monkeypatch):
    operator, space, penalty = make("linear", bank)
    monkeypatch.setattr(type(operator), "distances", lambda self, bank: Distances(np.zeros((1, 5, 5)), dict))
    with pytest.raises(ConfigError, match="the distance from the last checkpoint to the mean, which is 0 in"):
        Penalty(3.0, bank, operator, space, penalty.anchor)
    assert penalty.told(Start(penalty.anchor, 4.0, "here")).value == 4.0

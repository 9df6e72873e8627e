"""Every searcher: same seed same proposals, replay to the bit, bounds, start point, progress, broken candidates."""

from __future__ import annotations

import numpy as np
import pytest

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build, discover
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start, Task

#: those left out need more: test_additive.py, test_additive_front.py, test_pareto.py
NAMES = sorted({*discover("searcher")} - {"additive", "additive_front", "pareto"})
SETTINGS = {"hybrid": {"most": 0.2}}  # so that both of its parts have their say
DRAW_NOTHING = ("auto", "gradient", "gradient_small", "ladder", "lbfgs")  # where there is a derivative
FREE = SearchSpace((Box("z", 8, scale=0.5),))
BOXED = SearchSpace((Box("z", 3, -1.0, 2.0),))
TARGET = np.linspace(-0.4, 0.6, 8)


def loss(vector):
    return float(((vector - TARGET) ** 2).sum()) + 0.5


def slope(vector):
    return 2 * (vector - TARGET)


def task(space, seed=0, init=None):
    starts = () if init is None else (Start(init, 1.0, "start"),)
    return Task(space, 60, seed, starts, no_gradient=None, no_memory=None)


def answer(session, value=loss, gradient=slope):
    proposal = session.ask()
    told = gradient(proposal.vector) if proposal.gradient else None
    session.tell(proposal.uid, value(proposal.vector), told)
    return proposal


def make(name):
    return build("searcher", name, **SETTINGS.get(name, {}))


def run(searcher, space, num, seed=0, init=None, value=loss, gradient=slope):
    session = searcher.start(task(space, seed, init))
    proposals = [answer(session, value, gradient) for _ in range(num)]
    assert [proposal.uid for proposal in proposals] == list(range(num))
    return np.array([proposal.vector for proposal in proposals]), session


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_proposals_and_replay_to_the_bit(name):
    first, _ = run(make(name), FREE, 40)
    again, session = run(make(name), FREE, 25)  # an interrupted run, replayed ...
    assert first[:25].tobytes() == again.tobytes()
    for wanted in first[25:]:  # ... and continued
        assert answer(session).vector.tobytes() == wanted.tobytes()
    other, _ = run(make(name), FREE, 40, seed=1)
    assert np.array_equal(first, other) == (name in DRAW_NOTHING)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold(name):
    proposals, session = run(make(name), BOXED, 60, value=lambda v: float(v.sum()), gradient=np.ones_like)
    assert proposals.min() >= -1
    assert proposals.max() <= 2
    assert session.best().shape == (3,)


@pytest.mark.parametrize("name", NAMES)
def test_start_point_is_used(name):
    far = np.full(8, 100.0)
    proposals, _ = run(make(name), FREE, 5, init=far)
    assert np.median(np.abs(proposals - far)) < 5


#: A bowl in 24 dimensions, and 40 scored starts around a place off its centre.
WIDE = SearchSpace((Box("z", 24, scale=0.5),))
CENTER = np.linspace(-0.4, 0.6, 24)
AROUND = CENTER + 0.5 * (-1.0) ** np.arange(24)


def bowl(vector):
    return float(((vector - CENTER) ** 2).sum()) + 0.5


def gain(name, num=300, seeds=3):
    """Which share of the way from the best start to the minimum `num` trials get, on average over the seeds."""
    vectors = AROUND + 0.3 * np.random.default_rng(7).normal(size=(40, 24))
    starts = tuple(sorted((Start(v, bowl(v), "start", "ema") for v in vectors), key=lambda start: start.value))
    shares = []
    for seed in range(seeds):
        session = make(name).start(Task(WIDE, num, seed, starts, no_gradient=None, no_memory=None))
        proposals = [answer(session, bowl, lambda v: 2 * (v - CENTER)) for _ in range(num)]
        best = min(bowl(proposal.vector) for proposal in proposals)
        shares.append(max(0.0, starts[0].value - best) / (starts[0].value - 0.5))
    return float(np.mean(shares))


@pytest.fixture(scope="module")
def gain_by_chance():
    """Of random search: in so many dimensions chance finds little."""
    return gain("random")


@pytest.mark.parametrize("name", sorted({*NAMES} - {"random"}))
def test_finds_clearly_lower_values_than_chance(name, gain_by_chance):
    assert gain_by_chance < 0.2
    assert gain(name) > gain_by_chance + 0.15


@pytest.mark.parametrize("name", NAMES)
def test_broken_candidates_are_survived(name):
    session = make(name).start(task(FREE, init=np.ones(8)))
    session.ask()  # the very first: nothing can be told of it yet
    worst = 1.0
    for turn in range(40):
        proposal = session.ask()
        assert proposal.uid == turn + 1
        assert np.isfinite(proposal.vector).all()
        value = loss(proposal.vector)
        worst = max(worst, value)
        told = slope(proposal.vector) if proposal.gradient and turn % 3 else None
        session.tell(proposal.uid, value if turn % 3 else worst, told)
    assert np.isfinite(session.best()).all()
    assert all(np.isfinite(vector).all() for _, vector in session.finalists(4) or [])


@pytest.mark.parametrize("name", ["cma", "gradient", "hybrid", "lbfgs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_value_that_is_not_finite_reaches_an_optimizer(value, name):
    session = make(name).start(task(FREE))
    uid = session.ask().uid
    with pytest.raises(EvaluationError, match="only finite values may reach it"):
        session.tell(uid, value)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="nevergrad has no optimizer `CMAA`. Did you mean `CMA`"):
        build("searcher", "cma", optimizer="CMAA").start(task(FREE))
    with pytest.raises(ConfigError, match="declares nothing to search"):
        build("searcher", "cma").start(task(SearchSpace()))
    with pytest.raises(ConfigError, match="some boxes have bounds and some have none"):
        build("searcher", "cma").start(task(SearchSpace((Box("a", 1, 0, 1), Box("b", 1)))))
    with pytest.raises(ConfigError, match="`searcher.sigma0` is 0; it must be above 0 and finite"):
        build("searcher", "cma", sigma0=0)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("cma", "sigma0"),
        ("gradient", "step_size"),
        ("lbfgs", "step_size"),
        ("hybrid", "sigma0"),
        ("lcsc_evolution", "mutation_scale"),
    ],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_lengths_are_finite(name, setting, value):
    with pytest.raises(ConfigError, match=rf"{setting}` (is )?{value}.* finite"):
        build("searcher", name, **{setting: value})

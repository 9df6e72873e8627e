"""Optimizers of nevergrad that nobody vouches for run after a rehearsal only; those we vouch for need none."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build, describe, discover
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers import nevergrad as module
from lcsc.searchers.base import Start, Task
from lcsc.searchers.nevergrad import NEEDS_TWO, READY, VOUCHED, Nevergrad, Recipe, flaw, verdict

SPACE = SearchSpace((Box("z", 39),))
TASK = Task(SPACE, 160, 0)


def recipe(optimizer, bound=None, size=39):
    bounds = (None, None) if bound is None else ((-bound,) * size, (bound,) * size)
    return Recipe(optimizer, (0.0,) * size, *bounds, 1.0, 7, 160)


def test_vouched_names_are_the_parts_of_their_own():
    parts = discover("searcher").values()
    assert sorted(part.preset["optimizer"] for part in parts if part.cls is Nevergrad) == sorted(VOUCHED)


@pytest.mark.parametrize("optimizer", VOUCHED)
def test_vouched_names_are_not_rehearsed(optimizer, monkeypatch):
    monkeypatch.setattr(module, "verdict", lambda job: pytest.fail("a rehearsal"))
    build("searcher", "nevergrad", optimizer=optimizer).start(TASK)


@pytest.mark.parametrize("optimizer", VOUCHED)
def test_a_line_is_searched_or_refused_in_one_sentence(optimizer):
    """Two checkpoints leave one coefficient."""
    searcher, line = Nevergrad(optimizer), Task(SearchSpace((Box("z", 1),)), 30, 0)
    if optimizer in NEEDS_TWO:
        with pytest.raises(ConfigError, match=r"`DiagonalCMA` needs at least 2 numbers to vary, not 1\. Use `CMA`"):
            searcher.start(line)
        return
    session, values = searcher.start(line), []
    for _ in range(30):
        proposal = session.ask()
        values.append(bowl(proposal.vector))
        session.tell(proposal.uid, values[-1])
    assert min(values) < bowl(np.zeros(1))


def test_the_general_part_is_cma_by_default_and_keeps_its_name():
    searcher = build("searcher", "nevergrad")
    walks = [[session.ask().vector for _ in range(3)] for session in (searcher.start(TASK), Nevergrad().start(TASK))]
    assert np.array_equal(*walks)
    assert describe("searcher", searcher) == {
        "name": "nevergrad",
        "optimizer": "CMA",
        "sigma0": 1.0,
        "warm_start": True,
    }
    assert describe("searcher", build("searcher", "one_plus_one"))["name"] == "one_plus_one"


def scored(num=60, size=8):
    """Distinct starts, best first, and the best one once more under another name."""
    vectors = np.random.default_rng(5).normal(1, 0.5, size=(num, size))
    starts = sorted((Start(v, bowl(v), f"start {i}") for i, v in enumerate(vectors)), key=lambda start: start.value)
    return (starts[0], Start(starts[0].vector, starts[0].value, "twin"), *starts[1:])


def bowl(vector):
    return float((np.geomspace(1, 0.01, vector.size) * (vector + 1) ** 2).sum())


def warm(optimizer, starts=None, seed=0, num=60, scale=0.5, bound=math.inf, **settings):
    space = SearchSpace((Box("z", 8, -bound, bound, scale=scale),))
    return Nevergrad(optimizer, **settings).start(Task(space, num, seed, scored() if starts is None else starts))


def drive(session, num):
    vectors = []
    for _ in range(num):
        proposal = session.ask()
        vectors.append(proposal.vector)
        session.tell(proposal.uid, bowl(proposal.vector))
    return np.array(vectors)


def told(session, scale=0.5):
    """What the optimizer was told, in order."""
    rows = session._optimizer.archive.values()
    return np.array([row.parameter.value * scale for row in rows]), [row.mean for row in rows]


#: points that an optimizer begins with, in 8 dimensions: a population, one less for pycma, none for those that draw
#: without listening or take their step from the distance to the centre
WORTH = {
    **{"CMA": 9, "DiagonalCMA": 9, "DE": 30, "TwoPointsDE": 30, "RealSpacePSO": 40},
    **{"OnePlusOne": 1, "RandomSearch": 0, "TBPSA": 0},
}


@pytest.mark.parametrize("optimizer", VOUCHED)
@pytest.mark.parametrize("bound", [math.inf, 4.0])
def test_a_warm_start_tells_the_best_starts_and_spends_no_trial(optimizer, bound):
    session, best = warm(optimizer, bound=bound), [scored()[0], *scored()[2:]]
    vectors, values = told(session)
    bounded_cma = optimizer == "CMA" and bound < math.inf  # nevergrad takes another variant of it
    assert len(vectors) == (5 if bounded_cma else WORTH[optimizer])
    np.testing.assert_allclose(vectors.reshape(-1, 8), [s.vector for s in best[: len(vectors)]] or np.empty((0, 8)))
    assert values == [start.value for start in best[: len(vectors)]]
    first = session.ask()
    assert first.uid == 0
    assert not any(np.allclose(first.vector, vector) for vector in vectors) or optimizer == "OnePlusOne"
    assert len(told(warm(optimizer, warm_start=False))[0]) == 0


@pytest.mark.parametrize("optimizer", ["DE", "TwoPointsDE", "RealSpacePSO"])
def test_the_first_population_is_made_of_the_starts(optimizer):
    session, best = warm(optimizer), [scored()[0], *scored()[2:]][: WORTH[optimizer]]
    held = sorted((row.value * 0.5).tolist() for row in session._optimizer.population.values())
    np.testing.assert_allclose(held, sorted(start.vector.tolist() for start in best))
    few = warm(optimizer, scored()[:6])  # the rest is drawn
    assert len(few._optimizer.population) == 5
    drive(few, 50)
    assert len(few._optimizer.population) == WORTH[optimizer]


@pytest.mark.parametrize("optimizer", ["CMA", "DiagonalCMA"])
def test_an_evolution_strategy_learns_from_the_starts(optimizer):
    session = warm(optimizer)
    proposal = session.ask()
    inner = getattr(session._optimizer, "optim", session._optimizer)
    assert inner.es.countiter == 0
    session.tell(proposal.uid, bowl(proposal.vector))
    assert inner.es.countiter == 1  # nine starts and a trial are a generation
    assert np.linalg.norm(inner.es.mean) > 0.1


@pytest.mark.parametrize("optimizer", VOUCHED)
def test_a_warm_start_replays_to_the_bit(optimizer):
    first, again = drive(warm(optimizer), 60), warm(optimizer)
    assert first[:25].tobytes() == drive(again, 25).tobytes()
    assert first[25:].tobytes() == drive(again, 35).tobytes()
    assert first.tobytes() != drive(warm(optimizer, seed=1), 60).tobytes()


@pytest.mark.parametrize("optimizer", ["NGOpt", "Cobyla", "Shiwa", "NaiveTBPSA", "LHSSearch"])
def test_optimizers_that_may_not_listen_are_left_in_peace(optimizer):
    points = tuple((tuple(start.vector.tolist()), start.value) for start in scored())
    with warnings.catch_warnings(action="ignore"):
        assert flaw(Recipe(optimizer, points[0][0], None, None, 1.0, 7, 40, points), 12) is None


@pytest.mark.parametrize("optimizer", ["NGOpt", "CMA", "Shiwa"])
def test_sound_optimizers_pass(optimizer):
    assert flaw(recipe(optimizer), 30) is None
    with warnings.catch_warnings(action="ignore"):  # nevergrad's advice about bounds and settings
        assert flaw(recipe(optimizer, bound=2.0), 30) is None


def test_a_global_random_state_is_found():
    assert flaw(recipe("LognormalDiscreteOnePlusOne"), 30) == "it makes other proposals each time from the same seed"


class Faulty:
    """An optimizer that proposes `value` only."""

    def __init__(self, value):
        self.value = value

    def ask(self):
        return self

    def tell(self, candidate, value):
        if not self.value.any():
            raise ZeroDivisionError("nothing  to\ndivide by.")

    provide_recommendation = ask


@pytest.mark.parametrize(
    ("value", "clause"),
    [
        (np.ones(2), "it proposes shape (2,) instead of (3,)"),
        (np.full(3, math.nan), "it proposes numbers that are not finite"),
        (np.array([0.0, 0.0, 1.5]), "it leaves the bounds"),
        (np.zeros(3), "it fails with ZeroDivisionError: nothing to divide by"),
        (np.array([0.0, 0.0, 1.0]), None),
    ],
)
def test_faults_are_named(value, clause, monkeypatch):
    monkeypatch.setattr(Recipe, "make", lambda self: Faulty(value))
    assert flaw(recipe("CMA", bound=1.0, size=3), 5) == clause


@pytest.mark.parametrize(
    ("rest", "clause"),
    [
        ("print('null')", None),
        ("""print('"it sulks"')""", "it sulks"),
        ("import time; time.sleep(60)", "two rehearsals took longer than 0.3 s"),
        ("import os; os._exit(3)", "it brought down its process with code 3"),
    ],
)
def test_hangs_and_crashes_are_survived(rest, clause):
    assert verdict({}, f"print('{READY}', flush=True); {rest}", limit=0.3) == clause


def test_an_unknown_optimizer_is_answered_by_the_nearest_names():
    with pytest.raises(ConfigError) as caught:
        build("searcher", "nevergrad", optimizer="TwoPointDE").start(TASK)
    hint = "Did you mean `TwoPointsDE`"
    vouched = "Vouched for: CMA, DE, DiagonalCMA, OnePlusOne, RandomSearch, RealSpacePSO, TBPSA, TwoPointsDE; "
    sentence = str(caught.value)
    assert sentence.startswith(f"nevergrad has no optimizer `TwoPointDE`. {hint}")
    assert sentence.endswith(f"? {vouched}`nevergrad.optimizers.registry` lists all.")
    assert len(sentence) < 320


def test_what_cannot_be_loaded_is_refused():
    assert verdict({}, "raise SystemExit(1)") == "a process of its own could not load it"


@pytest.mark.slow
def test_a_refusal_names_optimizer_and_reason():
    sentence = (
        "nevergrad's optimizer `LognormalDiscreteOnePlusOne` is refused: it makes other proposals each time from the "
        "same seed. Use searcher=cma, or another one."
    )
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        build("searcher", "nevergrad", optimizer="LognormalDiscreteOnePlusOne").start(TASK)
    with pytest.raises(ConfigError, match="nevergrad has no optimizer `CMAA`. Did you mean `CMA`"):
        build("searcher", "nevergrad", optimizer="CMAA").start(TASK)

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
from lcsc.searchers.base import Task
from lcsc.searchers.nevergrad import READY, VOUCHED, Nevergrad, Recipe, flaw, verdict

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


def test_the_general_part_is_cma_by_default_and_keeps_its_name():
    searcher = build("searcher", "nevergrad")
    walks = [[session.ask().vector for _ in range(3)] for session in (searcher.start(TASK), Nevergrad().start(TASK))]
    assert np.array_equal(*walks)
    assert describe("searcher", searcher) == {"name": "nevergrad", "optimizer": "CMA", "sigma0": 1.0}
    assert describe("searcher", build("searcher", "one_plus_one"))["name"] == "one_plus_one"


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

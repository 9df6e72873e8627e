"""The searcher `additive`: single changes first, then the best sum within the budget, and what is near it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.space import Box, Choices, SearchSpace
from lcsc.searchers.base import Start, Task, width_of

COSTS, FLOATS = (1, 2, 4), (1.1, 1.5, 1.9)
LAYERS, BUDGET = 4, 9
HARM = np.random.default_rng(3).random((LAYERS, 3)) * [1.0, 0.5, 0.0]
SPACE = SearchSpace(
    (Box("other", 1, 0.0, 4.0), Box("groups", LAYERS, 0.0, 1.0, choices=Choices(FLOATS, COSTS, BUDGET)))
)
START = Start(np.array([3.0, 0.5, 0.5, 0.5, 0.5]), 9.0, "start")


def begun(num=30, space=SPACE, starts=(START,)):
    return build("searcher", "additive").start(Task(space, num, 0, starts))


def picks(vector):
    return tuple(FLOATS.index(x) for x in vector[1:])


def cost(found):
    return sum(COSTS[pick] for pick in found)


def loss(found, both=0.0):
    """What the changes cost alone, and `both` for each two neighbours that are changed."""
    pairs = sum(a < 2 and b < 2 for a, b in itertools.pairwise(found))
    return 5.0 + sum(HARM[i, pick] for i, pick in enumerate(found)) + both * pairs


def walked(num, both=0.0):
    session, seen = begun(num), []
    for uid in range(num):
        proposal = session.ask()
        assert proposal.uid == uid
        assert proposal.vector[0] == 3.0  # what is not chosen stays where the best start has it
        assert proposal.may_win == (cost(picks(proposal.vector)) <= BUDGET)
        seen.append(picks(proposal.vector))
        session.tell(uid, loss(seen[-1], both))
    return session, seen


def test_single_changes_then_the_best_sum_then_neighbours_and_smaller_budgets():
    session, seen = walked(28)
    assert seen[0] == (2, 2, 2, 2)
    assert sorted(seen[1:9]) == sorted(p for p in itertools.product(range(3), repeat=4) if sum(x < 2 for x in p) == 1)
    fits = [p for p in itertools.product(range(3), repeat=4) if cost(p) <= BUDGET]
    best = min(fits, key=loss)
    assert seen[9] == best
    assert all(cost(p) <= BUDGET for p in seen[9:])
    assert len(set(seen)) == 28
    cheapest = {sum_: min((p for p in fits if cost(p) <= sum_), key=loss) for sum_ in range(4, BUDGET)}
    assert set(cheapest.values()) <= set(seen[9:])
    assert picks(session.best()) == best
    assert [picks(v) for _, v in session.finalists(3)] == sorted(seen[9:], key=loss)[:3]
    assert session.finalists(1)[0][0] == f"costs {', '.join(str(COSTS[pick]) for pick in best)}"
    assert session.account()[1].startswith("the sum of the changes was least with costs ")
    assert session.account()[1].endswith(f"{loss(best):.5g} by the sum, {loss(best):.5g} together")


def test_neighbours_mend_what_the_sum_misjudged():
    session, seen = walked(30, both=0.4)
    fits = [p for p in itertools.product(range(3), repeat=4) if cost(p) <= BUDGET]
    best = min(fits, key=lambda p: loss(p, 0.4))
    assert loss(seen[9], 0.4) > loss(best, 0.4)
    assert picks(session.best()) == best


def test_single_changes_may_be_open_together_and_their_sum_waits_for_all():
    session = begun()
    for _ in range(9):
        assert width_of(session) >= len(session._asked) + 1
        session.ask()
    assert width_of(session) == 1
    for uid in reversed(range(9)):
        session.tell(uid, loss(picks(session._vector(session._asked[uid]))))
    assert picks(session.ask().vector) == walked(10)[1][9]


def test_a_change_that_failed_counts_as_the_worst():
    session, seen = begun(), []
    for uid in range(10):
        seen.append(picks(session.ask().vector))
        if uid < 9 and seen[-1] != (1, 2, 2, 2):
            session.tell(uid, loss(seen[-1]))
    worst = max(HARM.max(), 0)
    fits = [p for p in itertools.product(range(3), repeat=4) if cost(p) <= BUDGET]
    assert seen[9] == min(fits, key=lambda p: loss(p) + (worst - HARM[0, 1] if p[0] == 1 else 0))


def test_what_it_cannot_do_is_said():
    with pytest.raises(ConfigError, match="this operator has none to share"):
        begun(space=SearchSpace((Box("z", 4),)))
    with pytest.raises(ConfigError, match=r"`search.num_trials` is 9, and searcher `additive` needs 10"):
        begun(9)
    tight = SearchSpace((Box("groups", 4, choices=Choices(FLOATS, COSTS, 3)),))
    with pytest.raises(ConfigError, match="the budget is 3, and the cheapest choice costs 4"):
        begun(space=tight, starts=())

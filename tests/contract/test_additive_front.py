"""The searcher `additive_front`: single changes first, then the front of their sums against one that counting finds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.pareto import pareto
from lcsc.core.registry import build
from lcsc.core.space import Box, Choices, SearchSpace
from lcsc.searchers.base import Start, Task, Weighing, width_of

COSTS, FLOATS = (1, 2, 4), (1.1, 1.5, 1.9)
LAYERS = 5
HARM = np.random.default_rng(3).random((LAYERS, 3)) * [1.0, 0.5, 0.0]
#: bytes of a layer by choice, which the costs do not tell: layers are of different sizes
BYTES = np.outer([5.0, 1.0, 2.0, 8.0, 3.0], [10.0, 19.0, 40.0])
CHOICES = Choices(FLOATS, COSTS, max(COSTS) * LAYERS)
SPACE = SearchSpace((Box("other", 1, 0.0, 4.0), Box("groups", LAYERS, 0.0, 1.0, choices=CHOICES)))
START = Start(np.array([3.0, *[0.5] * LAYERS]), 9.0, "start", "", {"bytes": 1.0})
ALL = list(itertools.product(range(3), repeat=LAYERS))
SINGLES = 1 + 2 * LAYERS


def begun(num=40, space=SPACE, starts=(START,), **settings):
    given = {"second": "bytes", **settings}
    return build("searcher", "additive_front", **given).start(Task(space, num, 0, starts))


def picks(vector):
    return tuple(FLOATS.index(x) for x in vector[1:])


def size(found):
    return 100.0 + sum(BYTES[layer, pick] for layer, pick in enumerate(found))


def loss(found, both=0.0):
    pairs = sum(a < 2 and b < 2 for a, b in itertools.pairwise(found))
    return 5.0 + sum(HARM[layer, pick] for layer, pick in enumerate(found)) + both * pairs


def walked(num, fails=(), both=0.0, **settings):
    session, seen = begun(num, **settings), []
    for uid in range(num):
        proposal = session.ask()
        assert (proposal.uid, proposal.vector[0], proposal.may_win) == (uid, 3.0, True)
        seen.append(picks(proposal.vector))
        session.weigh(uid, None if seen[-1] in fails else (size(seen[-1]),))
        session.tell(uid, 99.0 if seen[-1] in fails else loss(seen[-1], both))
    return session, seen


def front_of(found):
    pairs = np.array([(size(one), loss(one)) for one in found])
    return {one for one, kept in zip(found, pareto(*pairs.T), strict=True) if kept}


def test_single_changes_then_the_whole_front_of_sizes_that_no_cost_tells():
    front = front_of(ALL)
    session, seen = walked(SINGLES + len(front))
    assert isinstance(session, Weighing)
    assert sorted(seen[:SINGLES]) == sorted(one for one in ALL if sum(pick < 2 for pick in one) < 2)
    assert set(seen[SINGLES:]) == front
    assert [size(one) for one in seen[SINGLES:]] == sorted(map(size, front))
    assert {picks(vector) for _, vector in session.finalists(1000)} == front
    assert picks(session.best()) == (2,) * LAYERS
    assert session.account()[0] == f"{SINGLES} trials changed one layer at a time"
    assert f"nothing beats {len(front)} of " in session.account()[1]
    assert session.account()[2].startswith(f"{len(front)} sums of changes were scored, half of them within ")
    by_cost = {min((one for one in ALL if sum(COSTS[pick] for pick in one) <= most), key=loss) for most in range(5, 21)}
    assert by_cost - front  # sharing out the costs would have found what others beat


def test_few_trials_are_spread_over_the_front_and_the_rest_lie_beside_it():
    front = front_of(ALL)
    few = walked(SINGLES + 6)[1][SINGLES:]
    assert len(set(few)) == 6
    assert set(few) < front
    assert {min(few, key=size), max(few, key=size)} == {min(front, key=size), max(front, key=size)}
    many = walked(SINGLES + len(front) + 30)[1][SINGLES:]
    assert len(set(many)) == len(front) + 30
    near = set(many) - front
    others = set(ALL) - front - near

    def above(one):
        return loss(one) - min(loss(other) for other in front if size(other) <= size(one))

    assert np.mean([above(one) for one in near]) < 0.5 * np.mean([above(one) for one in others])
    last = walked(len(ALL) + SINGLES + 3)[1]
    beside = {one for one in ALL if any(sum(map(int.__ne__, one, other)) == 1 for other in front)}
    assert set(last) == front | beside | set(last[:SINGLES])
    assert set(last[-3:]) == {(2,) * LAYERS}  # nothing else is left


def test_a_limit_bounds_the_winner_and_a_failed_change_is_not_built_on():
    limit = 450.0
    session, seen = walked(60, at_most=limit)
    best = min((one for one in seen if size(one) <= limit), key=loss)
    assert picks(session.best()) == best
    assert max(size(picks(vector)) for _, vector in session.finalists(100)) <= limit
    failed = (2, 2, 2, 0, 2)
    later = walked(60, fails=[failed])[1][SINGLES : SINGLES + 20]
    assert all(one[3] != 0 for one in later)
    assert any(one[3] == 0 for one in walked(60)[1][SINGLES : SINGLES + 20])


def test_replay_is_bit_identical_and_singles_may_be_open_together():
    session, seen = begun(), walked(40, both=0.2)[1]
    for _ in range(SINGLES):
        assert width_of(session) >= len(session._asked) + 1
        session.ask()
    assert width_of(session) == 1
    for uid in reversed(range(SINGLES)):
        session.weigh(uid, (size(seen[uid]),))
        session.tell(uid, loss(seen[uid], 0.2))
    assert picks(session.ask().vector) == seen[SINGLES]
    assert walked(40, both=0.2)[1] == seen


def test_what_it_cannot_do_is_said():
    with pytest.raises(ConfigError, match="searcher `additive_front` shares a budget out among layers, and this"):
        begun(space=SearchSpace((Box("z", 4),)))
    with pytest.raises(ConfigError, match=r"`search.num_trials` is 11, and searcher `additive_front` needs 12"):
        begun(SINGLES)
    with pytest.raises(ConfigError, match=r"`searcher.second` is `size`, which no candidate here tells. Use one of by"):
        begun(second="size")
    tight = SearchSpace((Box("groups", LAYERS, choices=replace(CHOICES, budget=12)),))
    with pytest.raises(ConfigError, match=r"the operator's is 12 of 20. Raise it until nothing is left out"):
        begun(space=tight, starts=())
    session = begun()
    session.weigh(session.ask().uid, (float("nan"),))
    with pytest.raises(EvaluationError, match="`bytes` is nan; it must be finite"):
        session.tell(0, 1.0)

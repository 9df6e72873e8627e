"""The searcher `pareto`: two numbers at a time against the front that counting finds, replay, limits, failures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.pareto import pareto, thinned
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start, Task, Weighing

SPACE = SearchSpace((Box("groups", 5, 0.0, 1.0, scale=0.3),))
WORTH = np.array([8.0, 4.0, 2.0, 1.0, 0.5])


def heads(vector):
    return np.minimum((vector * 4).astype(int), 3) + 1


def loss(counts):
    return float((WORTH / counts).sum())


def cost(counts):
    return 64.0 * float(sum(counts))


def start(counts):
    vector = (np.array(counts) - 0.5) / 4
    return Start(vector, loss(np.array(counts)), "uniform", "", {"bytes": cost(counts), "other": 1.0})


STARTS = tuple(sorted((start([n] * 5) for n in (1, 2, 4)), key=lambda s: s.value))


def begun(seed=0, num=150, starts=STARTS, **settings):
    return build("searcher", "pareto", second="bytes", **settings).start(Task(SPACE, num, seed, starts))


def walk(session, num):
    seen = []
    for _ in range(num):
        proposal = session.ask()
        counts = heads(proposal.vector)
        session.weigh(proposal.uid, (cost(counts),))
        session.tell(proposal.uid, loss(counts))
        seen.append(proposal.vector)
    return np.array(seen)


def volume(points, corner=(64.0 * 20, 15.5)):
    """Area between a front and the corner, by counting columns."""
    cost_N, loss_N = np.array(points).T
    total = 0.0
    for level in range(64, 64 * 20, 64):
        reached = loss_N[cost_N <= level]
        total += 64 * max(0.0, corner[1] - reached.min()) if len(reached) else 0.0
    return total


def test_it_finds_most_of_the_front_and_more_than_chance_does():
    every = [(cost(c), loss(np.array(c))) for c in itertools.product(range(1, 5), repeat=5)]
    shares, chance = [], []
    for seed in range(3):
        found = walk(begun(seed), 150)
        shares.append(volume([(cost(heads(v)), loss(heads(v))) for v in found]) / volume(every))
        drawn = np.random.default_rng(seed).random((150, 5))
        chance.append(volume([(cost(heads(v)), loss(heads(v))) for v in drawn]) / volume(every))
    assert min(shares) > max(chance)
    assert np.mean(shares) > 0.95 > 0.93 > np.mean(chance)


def test_finalists_are_the_front_and_the_limit_holds():
    session = begun()
    assert isinstance(session, Weighing)
    found = walk(session, 120)
    pairs = np.array([(cost(heads(v)), loss(heads(v))) for v in found])
    front = {tuple(pair) for pair in pairs[pareto(*pairs.T)]}
    named = session.finalists(100)
    assert {(cost(heads(v)), loss(heads(v))) for _, v in named} == front
    assert named[0][0].endswith(f"bytes {min(front)[0]:g}")
    assert np.array_equal(session.best(), min(found, key=lambda v: loss(heads(v))))
    assert f"{len(front)} of 120 trials" in session.account()[0]
    few = session.finalists(3)
    assert [cost(heads(v)) for _, v in few][:: len(few) - 1] == [min(front)[0], max(front)[0]]

    bounded = begun(at_most=64.0 * 10)
    assert walk(bounded, 120).tobytes() == found.tobytes()  # a limit for the winner does not steer the search
    assert max(cost(heads(v)) for _, v in bounded.finalists(100)) <= 64 * 10
    assert cost(heads(bounded.best())) <= 64 * 10


def test_a_third_number_opens_the_front():
    def third(counts):
        return float(counts[0])  # what the first of five costs apart

    starts = tuple(Start(s.vector, s.value, "u", "", {**s.numbers, "third": third(heads(s.vector))}) for s in STARTS)
    session, points = begun(starts=starts, third="third"), []
    assert session.weighed == ("bytes", "third")
    for _ in range(150):
        proposal = session.ask()
        counts = heads(proposal.vector)
        session.weigh(proposal.uid, (cost(counts), third(counts)))
        session.tell(proposal.uid, loss(counts))
        points.append((cost(counts), third(counts), loss(counts)))
    front = {p for p in points if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)}
    named = session.finalists(1000)
    seen = {(cost(c), third(c), loss(c)) for c in (heads(vector) for _, vector in named)}
    assert seen == front
    assert len(front) > len({p for p in front if p[1] == min(q[1] for q in front)})
    assert named[0][0].endswith(f"bytes {min(front)[0]:g}, third {min(front)[1]:g}")
    assert "all 3 numbers: `bytes`" in session.account()[0]
    few = [heads(vector) for _, vector in session.finalists(6)]
    assert len(few) == 6
    for number in (cost, third, loss):
        assert min(map(number, few)) == min(map(number, (heads(vector) for _, vector in named)))


def test_replay_is_bit_identical_and_a_failure_counts_as_the_worst():
    def told(session, num, broken=True):
        seen = []
        for _ in range(num):
            proposal = session.ask()
            counts = heads(proposal.vector)
            fails = broken and proposal.uid % 5 == 2
            session.weigh(proposal.uid, None if fails else (cost(counts),))
            session.tell(proposal.uid, 99.0 if fails else loss(counts))
            seen.append(proposal.vector)
        return np.array(seen)

    session = begun()
    first = told(session, 80)
    assert first.tobytes() == told(begun(), 80).tobytes()
    assert first.tobytes() != told(begun(seed=1), 80).tobytes()
    assert first.tobytes() != told(begun(), 80, broken=False).tobytes()
    assert all(int(label.split()[1].rstrip(",")) % 5 != 2 for label, _ in session.finalists(100))


def test_without_starts_it_begins_in_the_middle_and_survives_a_first_failure():
    session = begun(starts=())
    proposal = session.ask()
    session.weigh(proposal.uid, None)
    session.tell(proposal.uid, 5.0)
    walk(session, 60)
    assert session.finalists(4)
    assert begun(starts=()).best().shape == (5,)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"`searcher.second` is `size`, which no candidate here tells. Use one of "):
        build("searcher", "pareto", second="size").start(Task(SPACE, 9, 0, STARTS))
    bare = (Start(np.full(5, 0.5), 1.0, "start"),)
    with pytest.raises(ConfigError, match="these candidates tell none"):
        build("searcher", "pareto").start(Task(SPACE, 9, 0, bare))
    with pytest.raises(ConfigError, match=r"`searcher.third` is `size`, which no candidate"):
        begun(third="size")
    with pytest.raises(ConfigError, match="`searcher.second` and `searcher.third` are both `bytes`"):
        begun(third="bytes")
    session = begun()
    session.weigh(session.ask().uid, (float("inf"),))
    with pytest.raises(EvaluationError, match="`bytes` is inf; it must be finite"):
        session.tell(0, 1.0)


def test_a_front_is_thinned_from_what_fills_it_least():
    cost_N, loss_N = np.array([4.0, 1.0, 2.0, 2.1, 8.0]), np.array([2.0, 9.0, 5.0, 4.9, 1.0])
    assert thinned(cost_N, loss_N, 9) == [1, 2, 3, 0, 4]
    assert thinned(cost_N, loss_N, 4) == [1, 2, 0, 4]  # 2.1 adds 1.9 x 0.1, 2.0 adds 0.1 x 4.0 of it
    assert thinned(cost_N, loss_N, 2) == [1, 4]
    assert thinned(cost_N, loss_N, 1) == [4]
    third_N2 = np.column_stack([cost_N, [1.0, 2.0, 0.0, 0.0, 3.0]])
    # crowding of 0: (8 - 2.1) / 7 + 1 / 3 + 3.9 / 8; of 3: 2 / 7 + 1 / 3 + 3 / 8; the others are ends
    assert thinned(third_N2, loss_N, 4) == [1, 2, 0, 4]
    assert thinned(third_N2, loss_N, 1) == [4]
    assert pareto(third_N2, loss_N).tolist() == [True] * 5
    again_N2, again_N = np.vstack([third_N2, third_N2[:1], [[9.0, 9.0]]]), np.append(loss_N, [2.0, 0.5])
    assert pareto(again_N2, again_N).tolist() == [True] * 5 + [False, True]

"""The ladder: which rungs it takes, on which noise, at which error rate, and how it spends its trials."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy import optimize, stats

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.space import Box, Natural, SearchSpace
from lcsc.searchers.base import Start, Task
from lcsc.searchers.ladder import TEST_BLOCKS
from lcsc.searchers.rungs import families, lines, next_t, paired_test

FAMILIES = ("last", "best_single", "uniform", "ema", "wsm")
SPACE = SearchSpace((Box("z", 6), Box("g", 3, level=1)))
FLAT = SearchSpace((Box("z", 6),))


class Quadratic:
    """|x - target|^2 and, in each block of noise, a random slope; block None is one fixed block."""

    def __init__(self, target, noise=0.0, seed=0):
        self.target, self.noise, self.seed = np.array(target, dtype=float), noise, seed

    def __call__(self, vector, block):
        tilt = np.random.default_rng([self.seed, 0 if block is None else block + 1]).normal(size=vector.size)
        miss = vector - self.target
        return float(miss @ miss + self.noise * tilt @ vector), 2 * miss + self.noise * tilt


def starts(loss, **vectors):
    rows = [Start(np.array(v, dtype=float), loss(np.array(v, dtype=float), None)[0], f, f) for f, v in vectors.items()]
    return tuple(sorted(rows, key=lambda start: start.value))


def begin(task_space=FLAT, num=300, found=(), gradient=True, seed=0, **settings):
    task = Task(task_space, num, seed, found, None if gradient else "there is none")
    return build("searcher", "ladder", **settings).start(task)


def answer(session, loss):
    proposal = session.ask()
    value, slope = loss(proposal.vector, proposal.block)
    session.tell(proposal.uid, value, slope if proposal.gradient else None)
    return proposal


def climb(loss, num=300, **settings):
    session = begin(num=num, **settings)
    return session, [answer(session, loss) for _ in range(num)]


def taken(session):
    return [line.split(":")[0] for line in session.account() if line.endswith(", taken")]


@pytest.mark.parametrize(("num", "blocks"), [(200, 6), (160, 4), (120, 3), (100, 0)])
def test_rungs_that_come_scored_share_fewer_blocks_where_trials_are_few(num, blocks):
    loss = Quadratic([5.0] * 6, noise=0.1)
    found = starts(loss, **{family: [place] * 6 for place, family in enumerate(FAMILIES)})
    session = begin(num=num, found=found)
    seen = [answer(session, loss) for _ in range(5 * blocks)]
    assert all(proposal.block >= TEST_BLOCKS for proposal in seen)
    assert len({(proposal.block, proposal.vector.tobytes()) for proposal in seen}) == 5 * blocks
    lines_told = session.account()
    assert sum("p " in line for line in lines_told) == (4 if blocks else 0)
    assert (f"on {blocks} blocks of noise instead of 6" in lines_told[0]) == (0 < blocks < 6)
    assert session.ask().vector.tobytes() not in {proposal.vector.tobytes() for proposal in seen}


def test_a_low_rank_that_is_the_whole_space_is_named():
    session = begin(num=40, found=starts(Quadratic([1.0] * 6), last=[0.0] * 6), rank=50)
    assert "low rank 50: no other than full, the space has no more coordinates" in session.account()


def test_too_few_images_are_refused_at_the_start():
    task = Task(FLAT, 300, 0, no_gradient=None, min_images=20)
    with pytest.raises(ConfigError, match=r"`searcher\.test_images` is 19: too few images .* at least 20\."):
        build("searcher", "ladder", test_images=19).start(task)
    build("searcher", "ladder", test_images=20).start(task)


def test_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    for gain in (-1.0, 0.0, 0.5, 2.0):
        champion_B = rng.normal(size=7)
        rival_B = champion_B - gain + rng.normal(size=7)
        found = paired_test(champion_B, rival_B)
        wanted = stats.ttest_rel(champion_B, rival_B, alternative="greater")
        assert found.p == pytest.approx(wanted.pvalue, rel=1e-12)
        assert found.gain / found.se == pytest.approx(wanted.statistic, rel=1e-12)
        gaps = np.append(rival_B, np.nan), np.append(champion_B, 3.0)
        assert paired_test(gaps[1], gaps[0]) == found
    ones = np.ones(4)
    assert [paired_test(ones, rival).p for rival in (ones / 2, ones, ones * 2)] == [0, 1, 1]
    assert paired_test(ones, np.array([0, np.nan, np.nan, np.nan])).p == 1


@pytest.mark.parametrize(("lowest", "known"), [(1.7, {0.0}), (-2.3, {0.0, -1.0}), (0.4, {0.0, 1.0})])
def test_a_parabola_is_solved_in_five_trials(lowest, known):
    points = {t: (t - lowest) ** 2 for t in known}
    for _ in range(5):
        t = next_t(points, 0.5)
        points[t] = (t - lowest) ** 2
    assert min(points, key=points.get) == pytest.approx(lowest, abs=1e-9)


def test_a_line_search_agrees_with_scipy_and_survives_failures():
    def curve(t):
        return np.exp(0.7 * t) - 2 * t + 0.3 * np.cos(t) if t < 4 else np.inf  # beyond 4 nothing can be scored

    wanted = optimize.minimize_scalar(curve, bounds=(-5, 3.9), method="bounded").x
    points = {0.0: curve(0)}
    for _ in range(25):
        t = next_t(points, 1.0)
        assert t not in points
        points[t] = curve(t)
    assert min(points, key=points.get) == pytest.approx(wanted, abs=2e-3)


def test_lines_are_those_of_the_papers():
    def start(family, label, value, *vector):
        return Start(np.array(vector, dtype=float), value, label, family)

    rows = [
        start("ema", "EMA half-life 50 steps", 1.0, 5, 1),
        start("ema", "EMA half-life 1.2e+03 steps", 2.0, 3, 1),
        start("ema", "EMA half-life 7 steps", 3.0, 6, 1),
        start("last", "step 40", 4.0, 8, 0),
        start("best_single", "step 40", 4.0, 8, 0),
        start("best_single", "step 9", 9.0, 1, 3),
    ]
    bema, merge, through = lines(rows)
    assert bema.origin.tolist() == [5, 1]
    assert bema.direction.tolist() == [7, -3]  # newest - oldest
    assert (merge.direction.tolist(), merge.known) == ([2, 0], {0: 1.0, -1: 2.0})  # longer -> shorter, beyond the best
    assert (through.direction.tolist(), through.known) == ([-3, 1], {0: 1.0, -1: 4.0})
    assert (through.origin - through.direction).tolist() == [8, 0]
    (pair,) = lines([rows[1], rows[0]])  # the best is the longest: the line points at the shorter one
    assert (pair.direction.tolist(), pair.known) == ([2, 0], {0: 2.0, 1: 1.0})
    assert lines(rows[3:]) == []


def test_families_are_nested_slices():
    natural = Natural(np.zeros(3), np.eye(3), np.eye(3))
    boxes = (
        Box("z", 3, -1, 2, scale=0.5, lengths=(3.0, 2.0, 1.0), natural=natural),
        Box("g", 2, level=1),
        Box("t", 1, 0, 1),
    )
    low, full, groups = families(SearchSpace(boxes), 2, {"low rank": 1, "full": 1, "groups": 1})
    assert [f.index.tolist() for f in (low, full, groups)] == [[0, 1, 5], [0, 1, 2, 5], [0, 1, 2, 3, 4, 5]]
    assert low.space.boxes == (Box("z", 2, -1, 2, scale=0.5, lengths=(3.0, 2.0)), boxes[2])
    assert full.space.boxes[0] is boxes[0]
    assert groups.space.boxes == boxes
    names = [f.name for f in families(SearchSpace(boxes[:1]), 3, {"low rank": 1, "full": 1})]
    assert names == ["full"]  # rank 3 of 3 is full, and nothing refines it


@pytest.mark.parametrize("gradient", [True, False])
def test_gain_ends_at_low_rank(gradient):
    seeds, extra = range(12 if gradient else 2), 0
    for seed in seeds:
        loss = Quadratic([2, -1, 0, 0, 0, 0], noise=0.3, seed=seed)
        session, _ = climb(loss, num=150, found=starts(loss, last=np.zeros(6)), gradient=gradient, rank=2, num_blocks=6)
        assert taken(session)[0] == "low rank 2"
        extra += "full" in taken(session)
        assert np.linalg.norm(session.best() - loss.target) < 0.5
        if "full" not in taken(session):
            assert not session.best()[2:].any()  # what is above the rank did not move
    assert extra <= stats.binom.ppf(0.999, len(seeds), 0.05)


def test_floats_of_several_boxes_move_together():
    space = SearchSpace((Box("g", 2, level=1), Box("z", 3), Box("t", 2)))
    loss = Quadratic([0, 0, 3, 0, 0, -2, 0], noise=0.1)
    session, _ = climb(loss, num=150, task_space=space, found=starts(loss, last=np.zeros(7)), rank=1)
    assert taken(session)[0] == "low rank 1"
    best = dict(session.finalists(9))["rung low rank 1"]
    assert np.abs(best - loss.target).max() < 0.3
    assert np.flatnonzero(best).tolist() == [2, 5]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_only_the_refinements_help(noise):
    loss = Quadratic([0, 0, 0, 0, 0, 0, 1, -2, 1], noise=noise)
    found = starts(loss, last=np.zeros(9))
    session, _ = climb(loss, task_space=SPACE, found=found, rank=2, give_up=3)
    assert taken(session) == ["groups"]
    assert np.linalg.norm(session.best() - loss.target) < 0.6
    session, proposals = climb(loss, task_space=SPACE, found=found, rank=2)
    assert session.account()[-1] == "groups: not tried after 2 rungs without a gain"
    assert all(proposal.vector.size == 9 and not proposal.vector[6:].any() for proposal in proposals)


def test_without_noise_each_rung_is_taken_that_is_lower_and_none_that_is_not():
    loss = Quadratic([1, 1, 1, 0, 0, 0])
    found = starts(loss, last=[0, 0, 0, 0, 0, 0], uniform=[-1, 0, 0, 0, 0, 0], ema=[0.5, 0, 0, 0, 0, 0])
    session, _ = climb(loss, found=found, rank=1)
    assert taken(session) == ["ema", "extrapolation (last through ema, t 1)", "full"]
    assert session.account()[:3] == [
        "last: where the ladder begins",
        "uniform: 3 +- 0 higher than last, p 1, not taken",
        "ema: 0.75 +- 0 lower than last, p 0, taken",
    ]
    assert session.account()[4].startswith("low rank 1")  # which begins at its minimum
    labels = [label for label, _ in session.finalists(20)]
    assert labels[0] == "rung full"
    assert labels.index("rung extrapolation, last through ema, t 1") < labels.index("rung full, last iterate")
    assert labels.index("rung full, last iterate") < labels.index("rung ema, ema")
    assert len({vector.tobytes() for _, vector in session.finalists(20)}) == len(labels)
    assert np.array_equal(session.finalists(1)[0][1], session.best())


def test_noise_blocks():
    loss = Quadratic([2, -2, 2, -2, 2, -2, 2, -2, 2], noise=0.3)
    found = starts(loss, last=np.zeros(9), uniform=np.full(9, 0.1), wsm=np.full(9, -0.1))
    _, proposals = climb(loss, task_space=SPACE, found=found, rank=2, test_images=77, num_blocks=5)
    tests = [p for p in proposals if p.block is not None and p.block >= TEST_BLOCKS]
    steps = [p.block for p in proposals if p.gradient]
    assert len(set(steps)) == len(steps)  # every step of every descent sees new noise
    assert max(steps) < 300
    assert [p.block for p in tests[:15]] == [*range(TEST_BLOCKS, TEST_BLOCKS + 5)] * 3  # three scored rungs
    rounds = [[p.block - TEST_BLOCKS for p in tests[i : i + 10]] for i in range(15, len(tests), 10)]
    assert rounds == [[*range(5 * k, 5 * k + 5)] * 2 for k in range(1, 5)]  # fresh for each of the four others
    assert {p.num_images for p in tests} == {77}
    assert {(p.block, p.num_images) for p in proposals if not p.gradient and p not in tests} == {(None, None)}


@pytest.mark.parametrize("gradient", [True, False])
def test_replay_to_the_bit(gradient):
    loss = Quadratic(np.linspace(-1, 1, 9), noise=0.2)
    found = starts(loss, last=np.zeros(9), uniform=np.full(9, 0.1), ema=np.full(9, 0.2))
    settings = {"task_space": SPACE, "found": found, "gradient": gradient, "rank": 2, "num_blocks": 3, "num": 120}

    def key(proposal):
        return proposal.uid, proposal.vector.tobytes(), proposal.block, proposal.gradient

    whole, proposals = climb(loss, **settings)
    for stop in (7, 70):
        session = begin(**settings)
        replayed = [key(answer(session, loss)) for _ in range(stop)]  # an interrupted run, replayed ...
        replayed += [key(answer(session, loss)) for _ in range(120 - stop)]  # ... and continued
        assert replayed == [key(proposal) for proposal in proposals]
        assert session.account() == whole.account()


def test_useless_rungs_are_taken_at_the_level_of_the_test():
    table, tests, climbs = np.random.default_rng(0).normal(size=2**16), 0, 0
    found = tuple(Start(np.full(6, x), 0.0, family, family) for x, family in ((0.0, "last"), (1.0, "uniform")))
    for seed in range(200):

        def loss(vector, block, seed=seed):  # nothing but noise, of its own for each point and block
            key = hashlib.blake2b(vector.tobytes() + repr((seed, block)).encode(), digest_size=2).digest()
            at = int.from_bytes(key, "big")
            return table[at], np.roll(table[:12], at % 12)[:6]

        session, _ = climb(loss, num=56, found=found, seed=seed, rank=2, num_blocks=4)
        tests += sum("p " in line for line in session.account())
        climbs += len(taken(session))
    assert tests == 600  # one scored rung, low rank, full
    assert stats.binom.ppf(0.001, tests, 0.05) <= climbs <= stats.binom.ppf(0.999, tests, 0.05)


def test_failed_trials_do_not_stop_the_climb():
    loss, worst = Quadratic([2, -1, 0, 0, 0, 0], noise=0.1), 50.0
    session = begin(num=200, found=starts(loss, last=np.zeros(6)), rank=2)
    for uid in range(200):
        proposal = session.ask()
        assert proposal.uid == uid
        value, slope = loss(proposal.vector, proposal.block)
        fails = uid in (0, 9, 10, 130)
        session.tell(uid, worst if fails else value, None if fails or not proposal.gradient else slope)
    assert taken(session) == ["low rank 2"]
    assert loss(session.best(), None)[0] < 1


def test_a_rival_that_cannot_be_scored_is_not_taken_and_silence_is_no_answer():
    session, seen = begin(num=100, rank=2, num_blocks=4), []
    for uid in range(100):  # nothing was ever scored, so nobody can be told anything
        proposal = session.ask()
        assert proposal.uid == uid
        seen.append(proposal)
    assert taken(session) == []
    assert not session.best().any()
    with pytest.raises(EvaluationError, match="waits for trial 99 and was told about 3"):
        session.tell(3, 1.0)


@pytest.mark.parametrize("num", [1, 2, 13, 35, 36, 37, 60, 100])
def test_every_budget_is_spent_to_the_last_trial(num):
    loss = Quadratic(np.ones(9))
    found = starts(loss, last=np.zeros(9), uniform=np.full(9, 0.1), ema=np.full(9, 0.2))
    session, proposals = climb(loss, num=num + 3, task_space=SPACE, found=found, rank=2)
    assert [proposal.uid for proposal in proposals] == list(range(num + 3))
    assert len(session.finalists(4)) <= 4
    session, _ = climb(loss, num=num, task_space=SPACE, found=found, rank=2)
    assert {line.split(":")[0].split(" ")[0] for line in session.account()} == {
        *("last", "uniform", "ema", "extrapolation", "low", "full", "groups")
    }
    if num < 36:
        assert taken(session) == []  # too few trials for a test; the select seeds will choose
        assert np.array_equal(session.best(), np.full(9, 0.2))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="declares nothing to search"):
        begin(SearchSpace())
    with pytest.raises(ConfigError, match="some boxes have bounds and some have none"):
        begin(SearchSpace((Box("a", 2, -5, 5), Box("b", 1, level=1))), gradient=False)
    for name, value in (("rank", 0), ("num_blocks", 1), ("line_trials", -1), ("give_up", 0)):
        with pytest.raises(ConfigError, match=f"`searcher.{name}` is {value}; it must be at least"):
            build("searcher", "ladder", **{name: value})
    with pytest.raises(ConfigError, match="`searcher.alpha` is 1.0"):
        build("searcher", "ladder", alpha=1.0)
    with pytest.raises(ConfigError, match="`searcher.test_images` is 0"):
        build("searcher", "ladder", test_images=0)

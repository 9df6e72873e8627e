"""The descent: noise per step, trust region, recovery from failures, averaging, and scale-free coordinates."""

from __future__ import annotations

import numpy as np
import pytest

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start, Task

TARGET = np.linspace(-1, 1, 4)


def start(space=None, num_trials=100, vector=None, **settings):
    starts = () if vector is None else (Start(vector, 1.0, "here"),)
    space = space or SearchSpace((Box("z", 4),))
    return build("searcher", "gradient", **settings).start(Task(space, num_trials, 0, starts, no_gradient=None))


def descend(session, num, noise=0.0, stretch=1.0, seed=0):
    rng, vectors = np.random.default_rng(seed), []
    for _ in range(num):
        proposal = session.ask()
        vectors.append(proposal.vector)
        miss = proposal.vector * stretch - TARGET
        session.tell(proposal.uid, float(miss @ miss), (2 * miss + noise * rng.normal(size=4)) * stretch)
    return np.array(vectors)


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"noise": "fresh"}, [0, 1, 2, 3]),
        ({"noise": "rotating", "num_blocks": 2}, [0, 1, 0, 1]),
        ({"noise": "common"}, [None] * 4),
    ],
)
def test_which_noise_a_step_sees(settings, blocks):
    session = start(**settings)
    found = []
    for _ in range(4):
        proposal = session.ask()
        assert proposal.gradient
        found.append(proposal.block)
        session.tell(proposal.uid, 1.0, np.ones(4))
    assert found == blocks


def test_averages_beat_iterates_under_noise():
    session = start(num_trials=400, hold=1.0)
    vectors = descend(session, 400, noise=3.0)
    last = np.linalg.norm(vectors[-100:] - TARGET, axis=1).mean()
    assert np.linalg.norm(session.best() - TARGET) < 0.5 * last
    names = [name for name, _ in session.finalists(10)]
    assert names == ["mean of 200 iterates", "mean of 100 iterates", "mean of 50 iterates", "last iterate"]
    assert len(session.finalists(2)) == 2


def test_noiseless_descent_arrives():
    session = start(num_trials=300)
    assert np.linalg.norm(descend(session, 300)[-1] - TARGET) < 0.05


def test_steps_are_as_long_in_any_coordinates():
    # the same problem in coordinates ten times as fine gives the same walk
    plain = descend(start(), 30)
    fine = descend(start(SearchSpace((Box("z", 4, lengths=(0.1,) * 4),))), 30, stretch=0.1)
    np.testing.assert_allclose(fine * 0.1, plain, rtol=1e-9, atol=1e-12)


def test_trust_region_and_boxes_hold():
    vectors = descend(start(radius=0.5, vector=np.full(4, 3.0)), 50)
    away = np.linalg.norm(vectors - 3.0, axis=1)
    assert away.max() == pytest.approx(0.5)
    boxed = descend(start(SearchSpace((Box("z", 4, -0.25, 0.25),))), 50)
    assert np.abs(boxed).max() == pytest.approx(0.25)


def test_a_broken_candidate_sends_it_back_with_half_the_step():
    session = start(hold=1.0)
    good = session.ask()
    session.tell(good.uid, 1.0, np.ones(4))
    bad = session.ask()
    np.testing.assert_allclose(bad.vector, good.vector - 0.3, rtol=1e-6)
    session.tell(bad.uid, 99.0, None)
    again = session.ask()
    assert np.array_equal(again.vector, good.vector)
    session.tell(again.uid, 1.0, np.ones(4))
    size = np.abs(session.ask().vector - good.vector)
    assert (size < 0.3 / 2 + 1e-9).all()
    assert (size > 0).all()


def test_nothing_told_recommends_the_start():
    session = start(vector=np.ones(4))
    assert np.array_equal(session.best(), np.ones(4))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step_size": 0.0}, "`searcher.step_size` is 0.0"),
        ({"radius": -1.0}, "`searcher.radius` -1.0; both must be above 0"),
        ({"noise": "pink"}, "`searcher.noise` is `pink`"),
        ({"hold": 1.5}, "`searcher.hold` is 1.5"),
        ({"reach": -1.0}, "`searcher.reach` is -1.0 and `step_images` None; the first must be at least 0"),
        ({"step_images": 0}, "`step_images` 0"),
    ],
)
def test_mistakes_are_named(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(**settings)


def test_an_empty_space_is_refused():
    with pytest.raises(ConfigError, match="declares nothing to search"):
        start(SearchSpace())


def test_images_of_steps_near_by_count_by_how_near():
    space = SearchSpace((Box("z", 4, lengths=(0.5,) * 4),))
    session = build("searcher", "gradient", reach=0.4, step_images=32).start(
        Task(space, 100, 0, no_gradient=None, no_memory=None)
    )
    first = session.ask()
    assert first.earlier == ()
    assert first.num_images == 32
    session.tell(0, 1.0, np.array([1.0, 0, 0, 0]))  # a step of 0.3 along one coordinate
    second = session.ask()
    assert [(past.block, past.vector.tolist()) for past in second.earlier] == [(0, first.vector.tolist())]
    moved = 0.5 * np.linalg.norm(second.vector - first.vector)
    assert moved == pytest.approx(0.3)
    assert second.earlier[0].weight == pytest.approx(np.exp(-((0.3 / 0.4) ** 2) / 2))
    session.tell(1, 9.0, None)  # it broke, and leaves no images
    assert [past.block for past in session.ask().earlier] == [0]
    for uid in range(2, 40):
        session.tell(uid, 1.0, np.array([1.0, 0, 0, 0]))
        last = session.ask().earlier
    assert min(past.weight for past in last) >= 0.01
    assert 0 not in [past.block for past in last]


def test_without_reach_nothing_is_remembered():
    session = start()
    descend(session, 3)
    assert session.ask().earlier == ()


def test_values_with_images_in_common_are_not_for_hybrid():
    with pytest.raises(ConfigError, match=r"`searcher.reach` is 0.5, but `hybrid` compares values, and needs"):
        build("searcher", "hybrid", reach=0.5)
    with pytest.raises(ConfigError, match=r"`searcher.reach` is 0.5, but counts for nothing with `searcher.noise` rot"):
        build("searcher", "gradient", reach=0.5, noise="rotating")


def test_small_steps_need_images_that_may_be_weighed_and_enough_of_them():
    space = SearchSpace((Box("z", 4),))
    small = build("searcher", "gradient_small")
    assert small.start(Task(space, 9, 0, no_gradient=None, no_memory=None)).ask().num_images == 32
    kernel = Task(space, 9, 0, no_gradient=None, no_memory="metric `kid` weighs all alike")
    with pytest.raises(ConfigError, match=r"`searcher.reach` is 1.0, but metric `kid` weighs all alike. Set it to 0"):
        small.start(kernel)
    assert build("searcher", "gradient_small", reach=0.0).start(kernel).ask().num_images == 32
    with pytest.raises(ConfigError, match=r"`searcher.step_images` is 32: too few images for this objective"):
        small.start(Task(space, 9, 0, (), None, min_images=40, no_memory=None))

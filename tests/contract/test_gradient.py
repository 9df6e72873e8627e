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


@pytest.mark.parametrize("name", ["gradient", "hybrid", "lbfgs"])
def test_a_radius_needs_coordinates_at_right_angles(name):
    boxes = (Box("z", 4), Box("z_up", 4, level=1))
    assert build("searcher", name, radius=3.0).start(Task(SearchSpace(boxes[:1]), 5, 0, no_gradient=None))
    assert build("searcher", name).start(Task(SearchSpace(boxes), 5, 0, no_gradient=None))
    with pytest.raises(ConfigError, match=r"`searcher\.radius` is 3\.0, but box `z_up` refines another one"):
        build("searcher", name, radius=3.0).start(Task(SearchSpace(boxes), 5, 0, no_gradient=None))


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
    ],
)
def test_mistakes_are_named(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(**settings)


def test_an_empty_space_is_refused():
    with pytest.raises(ConfigError, match="declares nothing to search"):
        start(SearchSpace())

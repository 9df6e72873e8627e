"""L-BFGS against scipy's: the same minima for as many evaluations; trust region, rotating noise, broken candidates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import LbfgsInvHessProduct, brentq, minimize, rosen, rosen_der

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start, Task
from lcsc.searchers.lbfgs import _Curvature, _Place

SIZE = 30
TARGET = np.linspace(-1, 1, SIZE)
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]


def quadratic(condition):
    matrix = TURN @ np.diag(np.geomspace(1, condition, SIZE)) @ TURN.T
    return lambda x: 0.5 * (x - TARGET) @ matrix @ (x - TARGET), lambda x: matrix @ (x - TARGET), matrix


def start(begin, bounds=(), lengths=None, **settings):
    space = SearchSpace((Box("z", len(begin), *bounds, lengths=lengths),))
    starts = (Start(np.asarray(begin, dtype=float), 1.0, "here"),)
    return build("searcher", "lbfgs", **settings).start(Task(space, 100, 0, starts, no_gradient=None))


def descend(session, value, slope, num):
    """Values of all trials."""
    values = []
    for _ in range(num):
        proposal = session.ask()
        values.append(float(value(proposal.vector)))
        session.tell(proposal.uid, values[-1], slope(proposal.vector))
    return values


def first_below(values, level):
    return next(place for place, value in enumerate(values, 1) if value < level)


def scipys(value, slope, begin, **settings):
    values = []
    options = {"ftol": 0, "gtol": 1e-10, "maxfun": 500, "maxiter": 500, "maxcor": 10}

    def scored(x):
        values.append(float(value(x)))
        return values[-1]

    found = minimize(scored, begin, jac=slope, method="L-BFGS-B", options=options, **settings)
    return found, values


@pytest.mark.parametrize("size", [2, 10, 40])
def test_rosenbrock(size):
    begin = np.tile([-1.2, 1.0], size // 2)
    session = start(begin)
    values = descend(session, rosen, rosen_der, 300)
    _, wanted = scipys(rosen, rosen_der, begin)
    assert first_below(values, 1e-8) < 1.3 * first_below(wanted, 1e-8)
    np.testing.assert_allclose(session.best(), np.ones(size), atol=1e-9)
    assert values[-1] == min(values)  # the minimum is proposed again


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_ill_conditioned_quadratic(condition):
    value, slope, _ = quadratic(condition)
    session = start(np.zeros(SIZE))
    values = descend(session, value, slope, 600)
    _, wanted = scipys(value, slope, np.zeros(SIZE))
    assert first_below(values, 1e-8) < 1.3 * first_below(wanted, 1e-8)
    np.testing.assert_allclose(session.best(), TARGET, atol=1e-4)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_boxes(condition):
    value, slope, _ = quadratic(condition)
    session = start(np.zeros(SIZE), bounds=(-0.3, 0.5))
    values = descend(session, value, slope, 150)
    found, wanted = scipys(value, slope, np.zeros(SIZE), bounds=[(-0.3, 0.5)] * SIZE)
    level = found.fun * (1 + 1e-8)
    assert first_below(values, level) < 1.3 * first_below(wanted, level)
    np.testing.assert_allclose(session.best(), found.x, atol=1e-6)
    assert np.abs(session.best() - 0.1).max() <= 0.4


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_trust_region(condition):
    value, slope, matrix = quadratic(condition)
    session = start(np.zeros(SIZE), radius=1.0)
    descend(session, value, slope, 80)

    def inside(multiplier):  # the exact solution, by Lagrange
        return np.linalg.solve(matrix + multiplier * np.eye(SIZE), matrix @ TARGET)

    wanted = inside(brentq(lambda multiplier: np.linalg.norm(inside(multiplier)) - 1, 0, 1e8))
    assert value(session.best()) == pytest.approx(value(wanted), rel=1e-9)
    assert np.linalg.norm(session.best()) <= 1 + 1e-12


def test_two_loops_are_the_inverse_hessian():
    rng, curvature = np.random.default_rng(1), _Curvature(memory=5)
    _, _, matrix = quadratic(10.0)
    moves = rng.normal(size=(8, SIZE))
    for move in moves:
        origin = _Place(np.zeros(SIZE), 0.0, np.zeros(SIZE))
        curvature.learn(origin, _Place(move, 0.0, matrix @ move))
        curvature.learn(origin, _Place(move, 0.0, -move))  # not convex: not kept
    assert curvature.shrink == pytest.approx(moves[-1] @ matrix @ moves[-1] / np.sum((matrix @ moves[-1]) ** 2))
    curvature.shrink = 1.0  # scipy's first matrix
    wanted = LbfgsInvHessProduct(moves[-5:], moves[-5:] @ matrix)
    slope = rng.normal(size=SIZE)
    np.testing.assert_allclose(curvature.newton(slope, np.ones(SIZE, bool)), wanted @ slope, rtol=1e-9)


def test_steps_are_as_long_in_any_coordinates():
    value, slope, _ = quadratic(100.0)
    fine = np.geomspace(0.1, 10, SIZE)
    plain, other = start(np.zeros(SIZE)), start(np.zeros(SIZE), lengths=tuple(fine))
    wanted = descend(plain, value, slope, 30)
    found = descend(other, lambda z: value(z * fine), lambda z: slope(z * fine) * fine, 30)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(other.best() * fine, plain.best(), rtol=1e-6)


def test_rotating_noise():
    session = start(np.zeros(3), noise="rotating", num_blocks=2, block_trials=4)
    targets, blocks, moves = np.array([[1.0, 2, 3], [3.0, 2, 1]]), [], []
    for _ in range(20):
        proposal = session.ask()
        blocks.append(proposal.block)
        miss = proposal.vector - targets[proposal.block]
        moves.append((proposal.vector, miss))
        session.tell(proposal.uid, float(miss @ miss), 2 * miss)
    changes = [place for place in range(1, 20) if blocks[place] != blocks[place - 1]]
    assert set(blocks) == {0, 1}
    assert len(changes) >= 4
    for place in changes[:4]:  # a block begins where the last one ended, and knows no curvature but the step's size
        np.testing.assert_allclose(moves[place][0], targets[1 - blocks[place]], atol=1e-9)
        (here, miss), (there, _) = moves[place : place + 2]
        np.testing.assert_allclose(there - here, -miss, atol=1e-9)  # a bowl's inverse Hessian, times the gradient
    labels = [label for label, _ in session.finalists(9)]
    assert labels[-1] == "last block end"
    assert all("block ends" in label for label in labels[:-1])
    assert np.abs(session.finalists(9)[0][1] - 2).max() < 1  # between the two minima


def test_finalists_on_common_noise_lie_along_the_path():
    session = start(np.tile([-1.2, 1.0], 2))
    assert [label for label, _ in session.finalists(3)] == ["start"]
    values = descend(session, rosen, rosen_der, 30)
    finalists = session.finalists(4)
    num = int(finalists[0][0].split()[-1])
    assert [label for label, _ in finalists] == [f"iterate {num - num * k // 4} of {num}" for k in range(4)]
    scores = [rosen(vector) for _, vector in finalists]
    assert scores == sorted(scores)
    assert scores[0] == min(values)
    assert np.array_equal(finalists[0][1], session.best())
    assert [label for label, _ in session.finalists(1)] == [f"iterate {num} of {num}"]


def test_new_noise_after_convergence():
    """Block b of the noise moves the bowl to `center + shift_b`; the common noise is unlike all of them."""
    center, shifts = np.array([1.0, -2.0, 0.5]), np.random.default_rng(3).normal(0, 0.5, size=(40, 3))
    session, seen = start(np.full(3, 3.0)), []
    for _ in range(60):
        proposal = session.ask()
        miss = proposal.vector - center - (0.7 if proposal.block is None else shifts[proposal.block])
        seen.append((proposal.block, proposal.vector.tobytes()))
        session.tell(proposal.uid, 1 + float((np.arange(1, 4) * miss**2).sum()), 2 * np.arange(1, 4) * miss)
    assert len(set(seen)) == 60  # no trial is spent twice
    blocks = [block for block, _ in seen]
    first = blocks.index(0)
    assert blocks[:first] == [None] * first
    used = [block for block in blocks if block is not None]
    assert used == sorted(used)
    assert set(used) == set(range(max(used) + 1))
    assert max(used) >= 5
    rows = dict(session.finalists(6))
    last = next(label for label in rows if label.startswith("iterate"))
    np.testing.assert_allclose(rows[last], center + 0.7, atol=1e-6)  # where the common noise led
    label = next(iter(rows))
    num = int(label.split()[2])  # the half of the ends, of which the last may not have come far
    assert label == f"mean of {num} block ends"
    ended = center + shifts[max(used) - num + 1 : max(used)]
    assert np.abs(rows[label] * num - ended.sum(0) - center).max() < 2
    assert len({vector.tobytes() for vector in rows.values()}) == len(rows)


@pytest.mark.parametrize("noise", ["common", "rotating"])
def test_a_start_that_stands_alone_is_left(noise):
    """The start is lower than all around it and higher than the minimum elsewhere, as in a truncated space."""
    begin, best = np.full(3, 3.0), math.inf
    session = start(begin, noise=noise)
    for _ in range(40):
        proposal = session.ask()
        alone = np.allclose(proposal.vector, begin, rtol=1e-9, atol=0)
        value = 10.0 if alone else float(proposal.vector @ proposal.vector) - 1
        best = min(best, value)
        session.tell(proposal.uid, value, 2 * proposal.vector)
    assert best == pytest.approx(-1)
    np.testing.assert_allclose(session.best(), 0, atol=1e-6)


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_few_tries_tell_that_a_start_stands_alone(size):
    """The start, and three or four ever shorter steps whose tangents lead back to another value than its own."""
    begin, tries = np.full(3, 3.0), 0
    session = start(begin, step_size=size)
    while tries < 40:
        proposal = session.ask()
        alone = np.allclose(proposal.vector, begin, rtol=1e-9, atol=0)
        value = 10.0 if alone else float(proposal.vector @ proposal.vector) - 1
        if value < 9.99:
            break
        session.tell(proposal.uid, value, 2 * proposal.vector)
        tries += 1
    assert tries <= 5  # without a look at the tangents 13


def test_a_broken_candidate_shrinks_the_step():
    value, slope, _ = quadratic(1.0)
    session = start(np.zeros(SIZE), step_size=2.0)
    begin = session.ask()
    session.tell(begin.uid, 9.0, None)  # even the start may break; there is nowhere to go back to
    again = session.ask()
    assert np.array_equal(again.vector, begin.vector)
    session.tell(again.uid, value(again.vector), slope(again.vector))
    lengths = []
    for _ in range(3):
        proposal = session.ask()
        lengths.append(np.linalg.norm(proposal.vector))
        session.tell(proposal.uid, 9.0, None)
    np.testing.assert_allclose(lengths, [2.0, 0.5, 0.125])
    assert np.array_equal(session.best(), begin.vector)
    descend(session, value, slope, 10)
    np.testing.assert_allclose(session.best(), TARGET, atol=1e-7)


def test_a_place_that_only_breaks_is_left_alone():
    session = start(np.zeros(2))
    session.tell(session.ask().uid, 1.0, np.ones(2))
    for _ in range(40):
        proposal = session.ask()
        session.tell(proposal.uid, *((1.0, np.ones(2)) if not proposal.vector.any() else (5.0, None)))
    assert not session.best().any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step_size": 0.0}, "`searcher.step_size` is 0.0"),
        ({"radius": -1.0}, "`searcher.radius` -1.0; both must be above 0"),
        ({"noise": "fresh"}, "`searcher.noise` is `fresh`; it must be one of common, rotating"),
        ({"memory": 0}, "`searcher.memory` is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_named(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(np.zeros(2), **settings)


def test_without_a_gradient_it_refuses():
    with pytest.raises(ConfigError, match="searcher `lbfgs` needs a derivative, and it is closed. Use searcher=cma"):
        build("searcher", "lbfgs").start(Task(SearchSpace((Box("z", 2),)), 5, 0, no_gradient="it is closed"))

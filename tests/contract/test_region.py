"""The trust region: distances of weights as the operators know them, and the nearest place as scipy finds it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start, Task
from lcsc.searchers.region import Region

DESCENTS = ("gradient", "hybrid", "lbfgs")


@pytest.fixture
def grouped(tiny_bank):
    """A bank, the operator by layer groups and its space with a sampler's times beside it."""
    bank = CheckpointBank.open(tiny_bank)
    operator = build("operator", "linear_grouped", groups={"down": "down_blocks", "up": "up_blocks"})
    return bank, operator, SearchSpace((*operator.space(bank).boxes, Box("times", 3, scale=0.5, level=1)))


def distance(bank, operator, space, one, other):
    """Of the weights of two vectors, in the unit of the space: what a unit step of the shared box moves, on average."""
    coef_GK = [operator.coefficients(bank, space.to_point(vector)) for vector in (one, other)]
    way_GK = coef_GK[0] - coef_GK[1]
    square = np.einsum("gk,gkl,gl->", way_GK, operator.distances(bank).gram_GKK, way_GK)
    first = np.zeros(space.size)
    first[0] = 1.0
    ends = [operator.coefficients(bank, space.to_point(vector)) for vector in (first, 0 * first)]
    step_GK = ends[0] - ends[1]
    step = np.einsum("gk,gkl,gl->", step_GK, operator.distances(bank).gram_GKK, step_GK)
    return np.sqrt(square / step) * space.lengths[0]


@pytest.mark.parametrize("name", DESCENTS)
def test_a_radius_needs_boxes_that_tell_how_far_they_move_the_weights(name):
    boxes = (Box("z", 4), Box("z_up", 4, level=1))
    assert build("searcher", name, radius=3.0).start(Task(SearchSpace(boxes[:1]), 5, 0, no_gradient=None))
    assert build("searcher", name).start(Task(SearchSpace(boxes), 5, 0, no_gradient=None))
    with pytest.raises(ConfigError, match=r"`searcher\.radius` is 3\.0, but box `z_up` refines another one"):
        build("searcher", name, radius=3.0).start(Task(SearchSpace(boxes), 5, 0, no_gradient=None))


def test_distances_are_those_of_the_weights_of_all_layer_groups(grouped):
    bank, operator, space = grouped
    rng = np.random.default_rng(0)
    begin, end = rng.normal(size=(2, space.size))
    region = Region.around(space, begin, 1.0)
    found = region.distance((end - begin) * space.step_lengths)
    assert found == pytest.approx(distance(bank, operator, space, end, begin), rel=1e-6)
    times = begin.copy()
    times[-3:] += 5.0
    assert region.distance((times - begin) * space.step_lengths) == pytest.approx(0, abs=1e-6)  # times move no weights


def test_the_nearest_place_is_scipys(grouped):
    _, _, space = grouped
    rng = np.random.default_rng(1)
    region = Region.around(space, rng.normal(size=space.size), 0.7)
    at = region.center + 2 * rng.normal(size=space.size)
    found = region.nearest(at)
    assert region.distance(found - region.center) == pytest.approx(0.7, rel=1e-9)
    limit = {
        "type": "ineq",
        "fun": lambda x: 0.7**2 - region.distance(x - region.center) ** 2,
        "jac": lambda x: -2 * region.outward(x - region.center),
    }
    wanted = minimize(
        lambda x: ((x - at) ** 2).sum(), region.center, jac=lambda x: 2 * (x - at), constraints=[limit], method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted.x, atol=1e-5)
    inside = region.center + 0.01 * (at - region.center)
    np.testing.assert_array_equal(region.nearest(inside), inside)


@pytest.mark.parametrize("name", DESCENTS)
def test_a_descent_by_layer_groups_stays_within_and_ends_where_scipy_does(grouped, name):
    bank, operator, space = grouped
    rng = np.random.default_rng(2)
    begin, target = rng.normal(size=(2, space.size))
    lengths = space.step_lengths
    region = Region.around(space, begin, 0.8)

    def value(vector):
        return float((((vector - target) * lengths) ** 2).sum())

    task = Task(space, 300, 0, (Start(begin, value(begin), "here"),), no_gradient=None)
    session = build("searcher", name, radius=0.8).start(task)
    for _ in range(300):
        proposal = session.ask()
        slope = 2 * (proposal.vector - target) * lengths**2 if proposal.gradient else None
        assert distance(bank, operator, space, proposal.vector, begin) <= 0.8 * (1 + 1e-6)
        session.tell(proposal.uid, value(proposal.vector), slope)
    lowest = region.vector(region.nearest(target * lengths))  # of a sum of squares in these coordinates
    assert value(session.best()) == pytest.approx(value(lowest), rel=1e-3)


def test_images_are_remembered_by_how_far_the_weights_are(grouped):
    """Groups that move back what all share leave the candidate where it was; times change it without moving weights."""
    bank, _, space = grouped
    session = build("searcher", "gradient_small").start(
        Task(space, 9, 0, (Start(np.zeros(space.size), 1.0, "here"),), no_gradient=None, no_memory=None)
    )
    move = np.random.default_rng(3).normal(size=bank.num_checkpoints - 1)
    axes = {box.name: box.natural for box in space.boxes if box.natural}
    back = {name: -axes[name].inverse @ (axes["z"].axes @ move) for name in axes if name != "z"}
    still = space.to_vector({"z": move, **back, "times": np.zeros(3)}) * space.step_lengths
    assert np.linalg.norm(still) > 1
    assert session.region.change(still) == pytest.approx(0, abs=1e-3)  # rounded short axes
    later = space.to_vector({**space.to_point(np.zeros(space.size)), "times": np.array([0.0, 1.5, 2.0])})
    assert session.region.change(later * space.step_lengths) == pytest.approx(5.0)  # in units of their scale, 0.5

"""The paper's evolution does what is published: first population, sums, crossover and mutation shares."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from lcsc.core.registry import build
from lcsc.core.space import Box, Natural, SearchSpace
from lcsc.searchers.base import Start, Task

FAMILIES = ("last", "best_single", "ema", "ema", "power_ema", "power_ema", "uniform", "wsm")


def plane(num, total=1.0):
    """Coefficients that sum to `total`, searched along an orthonormal basis."""
    axes = scipy.linalg.null_space(np.ones((1, num)))
    return SearchSpace((Box("z", num - 1, natural=Natural(np.full(num, total / num), axes, axes.T, total)),))


def begin(space, starts, num_trials=100, **settings):
    return build("searcher", "lcsc_evolution", **settings).start(Task(space, num_trials, 0, tuple(starts)))


def draw(session, space, num, value=99.0):
    natural = []
    for _ in range(num):
        proposal = session.ask()
        session.tell(proposal.uid, value)
        natural.append(space.to_natural(proposal.vector)[0])
    return np.array(natural)


def starts_of(space, families):
    rng = np.random.default_rng(0)
    coefs = rng.dirichlet(np.ones(space.size + 1), len(families))
    starts = [
        Start(space.from_natural([c]), float(i), f"{i}", f)
        for i, (c, f) in enumerate(zip(coefs, families, strict=True))
    ]
    return coefs, starts


@pytest.mark.parametrize(
    ("families", "wanted"), [(FAMILIES, [2, 3, 4, 5]), (("last", "uniform", "wsm"), [0, 1, 2])], ids=["ema", "others"]
)
def test_first_population(families, wanted):
    space = plane(6)
    coefs, starts = starts_of(space, families)
    session = begin(space, starts, crossover=0.0, mutation_scale=1e-9, num_children=200)
    assert np.array_equal(session.best(), starts[wanted[0]].vector)
    found = draw(session, space, 100)
    nearest = np.linalg.norm(found[:, None] - coefs[None], axis=2)
    assert nearest.min(1).max() < 1e-7  # every child is a parent, but for 1e-9 ...
    assert sorted(set(nearest.argmin(1).tolist())) == wanted  # ... and these are the parents


def test_only_the_best_breed():
    space = plane(6)
    coefs, starts = starts_of(space, ("ema",) * 6)
    session = begin(space, starts, crossover=0.0, mutation_scale=1e-9, num_parents=2, num_children=200)
    found = draw(session, space, 60)
    assert set(np.linalg.norm(found[:, None] - coefs[None], axis=2).argmin(1).tolist()) == {0, 1}


def test_coefficients_sum_to_one():
    space = plane(40)
    _, starts = starts_of(space, FAMILIES)
    found = draw(begin(space, starts, crossover=1.0, num_children=10), space, 100, value=0.0)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=0, atol=1e-12)


def test_a_quarter_of_the_coefficients_moves_by_the_published_deviation():
    space = plane(400)
    coefs, starts = starts_of(space, ("ema",))
    moves = draw(begin(space, starts, crossover=0.0, num_parents=1), space, 25) - coefs[0]
    shift = np.median(moves, axis=1, keepdims=True)  # three quarters move by the projection alone
    hit = np.abs(moves - shift) > 1e-9
    assert scipy.stats.binomtest(int(hit.sum()), hit.size, 0.25).pvalue > 1e-3
    noise = (moves - shift)[hit]  # before the projection
    low, high = scipy.stats.chi2.ppf([5e-4, 1 - 5e-4], noise.size)
    assert low < (noise**2).sum() / 0.065**2 < high
    assert scipy.stats.kstest(noise / 0.065, "norm").pvalue > 1e-3
    np.testing.assert_allclose(shift[:, 0], -(moves - shift).sum(1) / 400, rtol=1e-6)  # additive, over all of them


def test_at_least_one_coefficient_moves():
    space = SearchSpace((Box("z", 50),))
    session = begin(space, [Start(np.zeros(50), 1.0, "s", "ema")], crossover=0.0, mutation=0.0, num_parents=1)
    assert (np.count_nonzero(draw(session, space, 30), axis=1) == 1).all()


def test_sixty_percent_come_from_the_first_parent():
    space = SearchSpace((Box("z", 400),))
    starts = [Start(np.zeros(400), 1.0, "a", "ema"), Start(np.ones(400), 2.0, "b", "ema")]
    settings = {"mutation": 0.0, "mutation_scale": 1e-9, "num_children": 400}  # one generation

    def shares(num, **more):
        children = draw(begin(space, starts, 400, **settings, **more), space, num).round(6)
        assert set(np.unique(np.abs(children))) == {0.0, 1.0}  # each number is one parent's or the other's
        share = children.mean(1)
        return share[(share > 0) & (share < 1)]

    mixed = shares(80, crossover=1.0)
    assert scipy.stats.binomtest(len(mixed), 80, 0.5).pvalue > 1e-3  # two parents may be the same one
    first = np.maximum(mixed, 1 - mixed) * 400
    assert scipy.stats.binomtest(round(first.sum()), 400 * len(first), 0.6).pvalue > 1e-3
    assert {share > 0.5 for share in mixed} == {True, False}  # either parent is the first one at times
    assert scipy.stats.binomtest(len(shares(400)), 400, 0.3 / 2).pvalue > 1e-3  # three in ten are crossed

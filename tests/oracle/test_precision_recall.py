"""Improved precision and recall against scipy's neighbour search and in cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.metrics import precision_recall
from lcsc.metrics.bootstrap import bootstrap

PRECISION, RECALL = build("metric", "precision_pixels"), build("metric", "recall_pixels")


def features_of(seed, num, dim=5, shift=0.0, scale=1.0):
    values = np.random.default_rng(seed).standard_normal((num, dim)) * scale + shift
    return torch.from_numpy(values.astype(np.float32))


def state_of(metric, features_ND):
    return metric.update(metric.zeros(), features_ND)


def both(fake, real):
    return [m.compute(state_of(m, fake), m.reference(state_of(m, real))) for m in (PRECISION, RECALL)]


def share_inside(points, centers):
    """Eq. 1 of arXiv:1904.06991 with k = 3: share of `points` in a ball around a center to its 3rd nearest other."""
    points, centers = points.double().numpy(), centers.double().numpy()
    radii = cKDTree(centers).query(centers, k=4)[0][:, 3]
    inside = [np.linalg.norm(centers - point, axis=1) <= radii for point in points]
    return float(np.mean([row.any() for row in inside]))


@pytest.mark.parametrize(("num_fake", "num_real", "dim"), [(120, 90, 5), (4, 50, 3), (60, 200, 20)])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 0.7), (1.0, 1.0), (1.0, 1.5)])
def test_equals_the_formula_with_scipys_neighbours(num_fake, num_real, dim, shift, scale):
    fake, real = features_of(1, num_fake, dim, shift, scale), features_of(2, num_real, dim)
    assert both(fake, real) == [share_inside(fake, real), share_inside(real, fake)]


def test_the_cases_are_not_all_trivial():
    fake, real = features_of(1, 120, 5, 1.0, 1.0), features_of(2, 90, 5)
    assert all(0.2 < value < 0.9 for value in both(fake, real))


def test_equal_sets_score_one_and_distant_ones_zero():
    real = features_of(3, 40)
    assert both(real, real) == [1.0, 1.0]
    assert both(real + 100, real) == [0.0, 0.0]


def test_mode_dropping_costs_recall_and_noise_costs_precision():
    """Two clusters: made of one alone, all images look real and half of the real ones are missed."""
    left, right = features_of(4, 50, shift=-20), features_of(5, 50, shift=20)
    real = torch.cat([left, right])
    assert both(left, real) == [1.0, 0.5]
    assert both(torch.cat([real, features_of(6, 100, shift=500)]), real) == [0.5, 1.0]


def test_copies_are_equal_points_also_far_from_the_origin():
    """Four copies make a ball of radius 0, and the point itself lies in it, where matrix products may round it out."""
    copies = features_of(7, 3, 64, shift=1e4).repeat(4, 1)
    assert both(copies, copies) == [1.0, 1.0]
    moved = copies.clone()
    moved[:, 0] += 1.0
    assert both(moved, copies) == [0.0, 0.0]


def test_chunked_distances(monkeypatch):
    fake, real = features_of(8, 50, shift=0.5), features_of(9, 70)
    whole = both(fake, real)
    monkeypatch.setattr(precision_recall, "CHUNK_ROWS", 7)
    assert both(fake, real) == whole


@pytest.mark.parametrize("metric", [PRECISION, RECALL])
def test_chunks_and_merges_do_not_matter(metric):
    fake, reference = features_of(10, 31, shift=0.3), metric.reference(state_of(metric, features_of(11, 40)))
    merged = metric.zeros()
    for chunk in fake.split(6):
        merged = metric.merge(merged, state_of(metric, chunk))
    assert merged.count == 31
    assert merged.features().dtype == torch.float32
    assert metric.compute(merged, reference) == metric.compute(state_of(metric, fake), reference)


@pytest.mark.parametrize("metric", [PRECISION, RECALL])
def test_one_of_each_block_is_the_whole(metric):
    states = [state_of(metric, chunk) for chunk in features_of(12, 35, shift=0.5).split(10)]
    whole = state_of(metric, features_of(12, 35, shift=0.5))
    reference = metric.reference(state_of(metric, features_of(13, 60)))
    one, less = metric.compute_resampled(states, reference, [[1, 1, 1, 1], [2, 2, 0, 0]])
    assert one == pytest.approx(metric.compute(whole, reference), rel=1e-12)
    assert 0 < less < 1


def test_precision_of_resamples_equals_merging():
    states = [state_of(PRECISION, chunk) for chunk in features_of(12, 35, shift=0.5).split(10)]
    reference = PRECISION.reference(state_of(PRECISION, features_of(13, 60)))
    merged = PRECISION.merge(PRECISION.merge(states[1], states[1]), states[3])
    (got,) = PRECISION.compute_resampled(states, reference, [[0, 2, 0, 1]])
    assert got == pytest.approx(PRECISION.compute(merged, reference), rel=1e-12)


@pytest.mark.parametrize("metric", [PRECISION, RECALL])
def test_standard_error_meets_the_scatter_of_fresh_samples(metric):
    """Within 35 %: 60 fresh sets tell the scatter to 9 %, and a set of 300 varies by itself."""
    reference = metric.reference(state_of(metric, features_of(14, 300, 3)))
    fresh = [metric.compute(state_of(metric, features_of(100 + i, 300, 3, 0.8)), reference) for i in range(60)]
    blocks = [
        [state_of(metric, chunk) for chunk in features_of(200 + i, 300, 3, 0.8).tensor_split(20)] for i in range(4)
    ]
    errors = [bootstrap(metric, states, reference, rng=np.random.default_rng(i))[0] for i, states in enumerate(blocks)]
    assert np.mean(errors) == pytest.approx(np.std(fresh, ddof=1), rel=0.35)


@pytest.mark.parametrize("metric", [PRECISION, RECALL])
def test_bad_input(metric):
    reference = metric.reference(state_of(metric, features_of(15, 9)))
    with pytest.raises(EvaluationError, match=rf"^`{metric.name}` needs at least 4 images, got 3"):
        metric.compute(state_of(metric, features_of(15, 3)), reference)
    with pytest.raises(EvaluationError, match=rf"^`{metric.name}` needs at least 4 images, got 2"):
        metric.reference(state_of(metric, features_of(15, 2)))
    with pytest.raises(EvaluationError, match="4 and 5 features"):
        metric.compute(state_of(metric, features_of(14, 5, 4)), reference)
    with pytest.raises(EvaluationError, match=r"\(5, 4\); want \(N, 5\)"):
        metric.update(state_of(metric, features_of(14, 5)), features_of(14, 5, 4))
    broken = features_of(15, 5)
    broken[0, 0] = torch.inf
    with pytest.raises(EvaluationError, match=r"^1 of 25 features are NaN or Inf"):
        state_of(metric, broken)


def test_names_and_direction():
    for name in ("precision", "recall", "precision_digits", "recall_digits", "precision_pixels", "recall_pixels"):
        metric = build("metric", name)
        assert (metric.name, metric.higher_is_better) == (name, True)


def test_an_objective_is_not_made_of_what_should_rise():
    parts = {
        "model": build("model", "direct"),
        "sampler": build("sampler", "heun"),
        "dataset": build("dataset", "gaussian"),
    }
    with pytest.raises(ConfigError, match="`metric` is `recall_pixels`, which is better when higher"):
        build("objective", "sample_quality", metric=RECALL, **parts)

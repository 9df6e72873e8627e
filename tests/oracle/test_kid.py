"""The kernel distance against torchmetrics, the definition written out, and a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from lcsc.core.errors import EvaluationError
from lcsc.core.registry import build
from lcsc.metrics import kid
from lcsc.metrics.features import FeatureState
from lcsc.metrics.kid import KernelDistance

METRIC = KernelDistance(detector="pixels")


class Passthrough(torch.nn.Module):
    """Float64 features that are the images, so that torchmetrics works in float64 too."""

    num_features = 16

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW.flatten(1).double()


def features_of(seed: int, num: int, dim: int = 16, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32) + np.float32(shift)
    )


def state_of(features_ND: torch.Tensor) -> FeatureState:
    return METRIC.update(METRIC.zeros(), features_ND)


def distance(fake: torch.Tensor, real: torch.Tensor) -> float:
    return METRIC.compute(state_of(fake), METRIC.reference(state_of(real)))


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    """MMD_u^2 of arXiv:1801.01401, Eq. 4, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(m) for j in range(n)) / (m * n)
    return xx + yy - 2 * xy


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_equals_torchmetrics(shift: float) -> None:
    real, fake = features_of(1, 120), features_of(2, 120, shift=shift)
    oracle = KernelInceptionDistance(feature=Passthrough().eval(), subsets=1, subset_size=120, normalize=True)
    oracle.update(real[:, None, :, None], real=True)
    oracle.update(fake[:, None, :, None], real=False)
    assert distance(fake, real) == pytest.approx(float(oracle.compute()[0]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("num_fake", "num_real"), [(2, 2), (5, 9), (13, 6)])
def test_equals_the_double_loop(num_fake: int, num_real: int) -> None:
    fake, real = features_of(3, num_fake, 4, 0.5), features_of(4, num_real, 4)
    assert distance(fake, real) == pytest.approx(brute_force(fake.double().numpy(), real.double().numpy()), rel=1e-12)


def test_chunked_kernel_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, real = features_of(5, 50), features_of(6, 70)
    whole = distance(fake, real)
    monkeypatch.setattr(kid, "CHUNK_ROWS", 7)
    assert distance(fake, real) == pytest.approx(whole, rel=1e-12)


def test_unbiased() -> None:
    """One-dimensional x ~ N(0,1), y ~ N(m,1): E k = 1 + 3 a b + 3 a2 b2 + a3 b3 with the raw moments of each side.

    The moments of N(m,1) are m, m^2 + 1, m^3 + 3 m, so the expected score is 3 m^2 + 3 m^4 + (m^3 + 3 m)^2.
    The mean of many small estimates must meet it; a V-statistic would be off by far more than the tolerance.
    """
    shift, repeats = 0.7, 4000
    expected = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    rng = np.random.default_rng(7)
    draws = torch.from_numpy(rng.standard_normal((repeats, 2, 12, 1)))
    values = np.array([distance(fake + shift, real) for fake, real in draws])
    error = values.std(ddof=1) / np.sqrt(repeats)
    assert abs(values.mean() - expected) < 3 * error
    assert 3 * error < 0.2 * expected


def test_equal_distributions_can_score_below_zero() -> None:
    values = [distance(features_of(seed, 40), features_of(100 + seed, 40)) for seed in range(30)]
    assert min(values) < 0 < max(values)


def test_chunks_and_merges_do_not_matter() -> None:
    fake, reference = features_of(8, 31), METRIC.reference(state_of(features_of(9, 40)))
    merged = METRIC.zeros()
    for chunk in fake.split(6):
        merged = METRIC.merge(merged, state_of(chunk))
    assert METRIC.compute(merged, reference) == METRIC.compute(state_of(fake), reference)
    assert merged.count == 31


def test_resamples_equal_merging() -> None:
    states = [state_of(chunk) for chunk in features_of(10, 35).split(10)]  # the last block is smaller
    reference = METRIC.reference(state_of(features_of(11, 40)))
    counts = [[1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 0, 4], [3, 1, 0, 0]]
    expected = []
    for row in counts:
        merged = METRIC.zeros()
        for state, times in zip(states, row, strict=True):
            for _ in range(times):
                merged = METRIC.merge(merged, state)
        expected.append(METRIC.compute(merged, reference))
    assert METRIC.compute_resampled(states, reference, counts) == pytest.approx(expected, rel=1e-10)


def test_bad_input() -> None:
    reference = METRIC.reference(state_of(features_of(12, 9)))
    with pytest.raises(EvaluationError, match=r"^`kid_pixels` needs at least 2 images, got 1"):
        METRIC.compute(state_of(features_of(12, 1)), reference)
    broken = features_of(13, 2)
    broken[0, :3] = torch.nan
    with pytest.raises(EvaluationError, match=r"^3 of 32 features are NaN or Inf"):
        state_of(broken)
    with pytest.raises(EvaluationError, match="4 and 16 features"):
        METRIC.compute(state_of(features_of(14, 5, 4)), reference)
    with pytest.raises(EvaluationError, match=r"\(5, 4\); want \(N, 16\)"):
        METRIC.update(state_of(features_of(14, 5)), features_of(14, 5, 4))


def test_names() -> None:
    assert [build("metric", name).name for name in ("kid", "kid_digits", "kid_pixels")] == [
        "kid",
        "kid_digits",
        "kid_pixels",
    ]
    assert build("metric", "kid", detector="digits").name == "kid_digits"

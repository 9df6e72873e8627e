"""The Fréchet distance against scipy, torchmetrics and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from lcsc.core.errors import EvaluationError
from lcsc.core.registry import build
from lcsc.metrics.frechet import FrechetDistance, FrechetState

METRIC = FrechetDistance(detector="pixels")


class Passthrough(torch.nn.Module):
    """Features that are the images: lets torchmetrics score features made here."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW.flatten(1)


def gaussian_features(seed: int, num: int, dim: int, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) / np.sqrt(dim) + np.eye(dim)
    return torch.from_numpy(
        (rng.standard_normal((num, dim)) @ mixing + shift + rng.standard_normal(dim)).astype(np.float32)
    )


def random_cov(seed: int, dim: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((dim, 2 * dim))
    return factor @ factor.T / dim


def state_of(features_ND: torch.Tensor) -> FrechetState:
    return METRIC.update(METRIC.zeros(), features_ND)


def state_of_moments(mean_D: np.ndarray, cov_DD: np.ndarray, count: int = 1000) -> FrechetState:
    """The state whose mean and unbiased covariance are exactly these."""
    outer = (count - 1) * cov_DD + count * np.outer(mean_D, mean_D)
    return FrechetState(
        torch.tensor(float(count), dtype=torch.float64), torch.tensor(count * mean_D), torch.tensor(outer)
    )


def distance(a: FrechetState, b: FrechetState) -> float:
    return METRIC.compute(a, METRIC.reference(b))


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize(("dim", "num"), [(2, 50), (8, 200), (64, 500), (200, 900)])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_equals_scipy_sqrtm(dim: int, num: int, shift: float) -> None:
    a, b = gaussian_features(1, num, dim, shift), gaussian_features(2, num + 17, dim, shift)
    expected = scipy_frechet(a.double().numpy(), b.double().numpy())
    assert distance(state_of(a), state_of(b)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("dim", "num"), [(4, 100), (64, 400)])
def test_equals_torchmetrics(dim: int, num: int) -> None:
    real, fake = gaussian_features(3, num, dim), gaussian_features(4, num - 9, dim, 0.5)
    oracle = FrechetInceptionDistance(feature=Passthrough(dim).eval(), normalize=True, input_img_size=(1, dim, 1))
    oracle.update(real[:, None, :, None], real=True)
    oracle.update(fake[:, None, :, None], real=False)
    assert distance(state_of(fake), state_of(real)) == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_closed_form_commuting() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2 (Dowson and Landau, 1982)."""
    rng = np.random.default_rng(5)
    mean_a, mean_b = rng.standard_normal((2, 12))
    std_a, std_b = rng.uniform(0.1, 3, (2, 12))
    got = distance(state_of_moments(mean_a, np.diag(std_a**2)), state_of_moments(mean_b, np.diag(std_b**2)))
    assert got == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum(), rel=1e-10)


def test_closed_form_non_commuting() -> None:
    """2x2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = S1 S2, which do not commute here."""
    cov_a, cov_b = random_cov(6, 2), random_cov(7, 2)
    assert not np.allclose(cov_a @ cov_b, cov_b @ cov_a, rtol=1e-2)
    product = cov_a @ cov_b
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    got = distance(state_of_moments(np.array([1.0, 2.0]), cov_a), state_of_moments(np.array([-1.0, 2.5]), cov_b))
    assert got == pytest.approx(4.25 + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, rel=1e-10)


def test_closed_form_linear_transport() -> None:
    """S2 = A S1 A with A symmetric positive: the optimal map is A, so the distance is tr (A - I) S1 (A - I)."""
    cov, transport = random_cov(8, 40), random_cov(9, 40)
    zero = np.zeros(40)
    step = transport - np.eye(40)
    got = distance(state_of_moments(zero, transport @ cov @ transport), state_of_moments(zero, cov))
    assert got == pytest.approx(np.trace(step @ cov @ step), rel=1e-8)


@pytest.mark.parametrize(("dim", "num"), [(3, 40), (64, 300), (64, 20)])
def test_distance_to_itself_is_zero(dim: int, num: int) -> None:
    state = state_of(gaussian_features(10, num, dim))
    assert 0 <= distance(state, state) < 1e-6


def nuclear_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Singular covariances too: tr sqrt(S1 S2) is the nuclear norm of the centred Gram matrix."""
    centred_a, centred_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    cross = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(gap + (centred_a**2).sum() + (centred_b**2).sum() - 2 * cross)


@pytest.mark.parametrize(("num_a", "num_b"), [(20, 30), (20, 300), (300, 20)])
def test_fewer_images_than_features(num_a: int, num_b: int) -> None:
    a, b = gaussian_features(11, num_a, 100), gaussian_features(12, num_b, 100)
    expected = nuclear_frechet(a.double().numpy(), b.double().numpy())
    assert distance(state_of(a), state_of(b)) == pytest.approx(expected, rel=1e-8)


def test_nearly_singular_features() -> None:
    """A detector's features: variances over twelve decades, several exactly zero, means far from zero."""
    scale = np.concatenate([np.zeros(10), np.logspace(-6, 1.4, 54)])
    mixing = np.linalg.qr(np.random.default_rng(23).standard_normal((54, 54)))[0]
    a, b = (np.random.default_rng(seed).standard_normal((num, 64)) * scale for seed, num in ((24, 700), (25, 500)))
    a[:, 10:], b[:, 10:] = a[:, 10:] @ mixing + 5, b[:, 10:] @ mixing + 5
    states = [state_of(torch.from_numpy(x)) for x in (a, b)]
    assert distance(*states) == pytest.approx(nuclear_frechet(a, b), rel=1e-8)
    assert distance(states[0], states[0]) < 1e-6


def test_symmetric_in_its_arguments() -> None:
    a, b = state_of(gaussian_features(13, 300, 30)), state_of(gaussian_features(14, 200, 30))
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


@pytest.mark.parametrize("sizes", [[1] * 60, [7, 50, 3], [60]])
def test_chunks_and_merges_do_not_matter(sizes: list[int]) -> None:
    features = gaussian_features(15, 60, 10)
    reference = METRIC.reference(state_of(gaussian_features(16, 100, 10)))
    running, merged = METRIC.zeros(), METRIC.zeros()
    for chunk in features.split(sizes):
        running = METRIC.update(running, chunk)
        merged = METRIC.merge(state_of(chunk), merged)
    whole = METRIC.compute(state_of(features), reference)
    assert METRIC.compute(running, reference) == pytest.approx(whole, rel=1e-10)
    assert METRIC.compute(merged, reference) == pytest.approx(whole, rel=1e-10)
    assert float(merged.count) == 60


def test_states_are_float64_and_values() -> None:
    state = state_of(gaussian_features(17, 20, 5))
    before = state.outer_DD.clone()
    METRIC.update(state, gaussian_features(18, 20, 5).half())
    METRIC.compute(state, METRIC.reference(state))
    assert {state.count.dtype, state.sum_D.dtype, state.outer_DD.dtype} == {torch.float64}
    assert torch.equal(state.outer_DD, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused(bad: float) -> None:
    features = gaussian_features(19, 10, 4)
    features[3, 1] = features[7, 2] = bad
    with pytest.raises(EvaluationError, match=r"^2 of 40 features are NaN or Inf;"):
        state_of(features)


def test_overflow_is_an_error_not_a_score() -> None:
    reference = METRIC.reference(state_of(gaussian_features(20, 50, 4)))
    huge = gaussian_features(20, 50, 4).double() * 1e160
    with pytest.raises(EvaluationError, match="overflow"):
        METRIC.compute(state_of(huge), reference)


def test_too_few_images() -> None:
    one = state_of(gaussian_features(21, 1, 4))
    reference = METRIC.reference(state_of(gaussian_features(21, 9, 4)))
    with pytest.raises(
        EvaluationError, match=r"^`fid_pixels` needs at least 2 images, got 1. Raise the number of images.$"
    ):
        METRIC.compute(one, reference)
    with pytest.raises(EvaluationError, match="got 0"):
        METRIC.reference(METRIC.zeros())


def test_widths_must_agree() -> None:
    four, five = state_of(gaussian_features(22, 9, 4)), state_of(gaussian_features(22, 9, 5))
    for attempt in (
        lambda: METRIC.merge(four, five),
        lambda: METRIC.update(four, gaussian_features(22, 9, 5)),
        lambda: METRIC.compute(four, METRIC.reference(five)),
    ):
        with pytest.raises(EvaluationError, match="4"):
            attempt()


def test_names() -> None:
    assert [build("metric", name).name for name in ("fid", "fid_digits", "fid_pixels")] == [
        "fid",
        "fid_digits",
        "fid_pixels",
    ]
    assert build("metric", "fid", detector="digits").name == "fid_digits"  # never plain FID
    assert not METRIC.higher_is_better


def test_rank_deficient() -> None:
    metric = build("metric", "fid_digits")
    assert metric.rank_deficient(64)
    assert not metric.rank_deficient(65)
    assert METRIC.rank_deficient(16, num_features=16)
    assert not METRIC.rank_deficient(2)

"""Post-hoc EMA against numerical integration, a constrained solver, ema-pytorch, and EMAs that were really tracked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ema_pytorch import post_hoc_ema
from scipy.integrate import quad
from scipy.optimize import minimize

from lcsc.core.errors import ConfigError
from lcsc.operators import profiles
from lcsc.operators.posthoc import inner_products, reconstruct


def profile(tau, t, gamma):
    """arXiv:2312.02696, Sec. 3.1: the weight of the parameters at time tau in the average read at time t."""
    return (gamma + 1) * tau**gamma / t ** (gamma + 1) if tau <= t else 0.0


@pytest.mark.parametrize("a", [(1.0, 6.94), (3.5, 0.3), (2.0, 16.97)])
@pytest.mark.parametrize("b", [(1.0, 6.94), (2.0, 2.1), (4.0, 0.0)])
def test_inner_products_are_integrals(a, b):
    wanted = quad(lambda tau: profile(tau, *a) * profile(tau, *b), 0, min(a[0], b[0]), epsabs=1e-13)[0]
    assert inner_products([a[0]], [a[1]], [b[0]], [b[1]])[0, 0] == pytest.approx(wanted, rel=1e-9)


def test_inner_products_neither_overflow_nor_depend_on_the_unit_of_time():
    far = inner_products([1.0], [400.0], [1e9], [400.0])
    assert far[0, 0] == 0.0
    one, other = inner_products([1.0], [5.0], [2.0], [3.0]), inner_products([1e6], [5.0], [2e6], [3.0])
    np.testing.assert_allclose(other * 1e6, one, rtol=1e-13)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.25, 0.288])
def test_exponent_gives_the_width(sigma_rel):
    gamma = profiles.exponent(sigma_rel)
    mean = quad(lambda tau: tau * profile(tau, 1.0, gamma), 0, 1)[0]
    variance = quad(lambda tau: (tau - mean) ** 2 * profile(tau, 1.0, gamma), 0, 1)[0]
    assert np.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-6)
    assert profiles.relative_width(gamma) == pytest.approx(sigma_rel, rel=1e-10)


STEPS = [step for step in range(100, 2001, 100) for _ in range(2)]
WIDTHS = [0.05, 0.10] * 20


@pytest.mark.parametrize("sigma_rel", [0.03, 0.06, 0.075, 0.09, 0.15, 0.2])
def test_coefficients_sum_to_one_and_are_near_the_libraries(sigma_rel):
    def row(values):
        return torch.tensor(values, dtype=torch.float64)

    gammas = [post_hoc_ema.sigma_rel_to_gamma(width) for width in WIDTHS]
    free_K = post_hoc_ema.solve_weights(
        row(STEPS), row(gammas), row([2000]), row([post_hoc_ema.sigma_rel_to_gamma(sigma_rel)])
    )[:, 0].numpy()
    found = reconstruct(STEPS, WIDTHS, sigma_rel=sigma_rel)
    assert found.coef_K.sum() == pytest.approx(1, abs=1e-12)
    # theirs sum to one only nearly; the constraint moves ours by no more than a few times that
    np.testing.assert_allclose(found.coef_K, free_K, atol=1e-8 + 3 * abs(free_K.sum() - 1))


def test_coefficients_are_the_constrained_optimum():
    steps, widths, gamma = [1, 1, 2, 2], [0.08, 0.2, 0.08, 0.2], profiles.exponent(0.14)
    gammas = [profiles.exponent(width) for width in widths]

    def misfit(coef_K):
        def square(tau):
            have = sum(c * profile(tau, t, g) for c, t, g in zip(coef_K, steps, gammas, strict=True))
            return (have - profile(tau, 2, gamma)) ** 2

        return quad(square, 0, 1, epsabs=1e-12)[0] + quad(square, 1, 2, epsabs=1e-12)[0]

    found = reconstruct(steps, widths, sigma_rel=0.14)
    best = minimize(
        misfit, np.full(4, 0.25), constraints={"type": "eq", "fun": lambda c: c.sum() - 1}, options={"ftol": 1e-12}
    )
    np.testing.assert_allclose(found.coef_K, best.x, atol=2e-3)
    assert misfit(found.coef_K) <= best.fun + 1e-10
    length = np.sqrt(quad(lambda tau: profile(tau, 2, gamma) ** 2, 0, 2)[0])
    assert found.residual == pytest.approx(np.sqrt(misfit(found.coef_K)) / length, rel=1e-4)
    scale = np.sqrt(np.diag(inner_products(steps, gammas, steps, gammas)))
    wanted = np.linalg.cond(inner_products(steps, gammas, steps, gammas) / scale / scale[:, None])
    assert found.condition == pytest.approx(wanted, rel=1e-6)


def test_a_tracked_profile_is_found_exactly():
    found = reconstruct(STEPS, WIDTHS, sigma_rel=0.10)
    assert found.coef_K.tolist() == [0.0] * 39 + [1.0]
    earlier = reconstruct(STEPS, WIDTHS, sigma_rel=0.05, step=1500)
    assert np.flatnonzero(earlier.coef_K).tolist() == [28]
    assert found.residual == earlier.residual == 0.0


def track(theta_TP, sigma_rel):
    """A power-function EMA of every step, ema <- beta ema + (1 - beta) theta with beta = (1 - 1/t)^(gamma + 1)."""
    gamma, ema_P, rows = profiles.exponent(sigma_rel), np.zeros(theta_TP.shape[1]), []
    for t, theta_P in enumerate(theta_TP, 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        ema_P = beta * ema_P + (1 - beta) * theta_P
        rows.append(ema_P)
    return np.array(rows)


@pytest.mark.parametrize(("sigma_rel", "share"), [(0.06, 0.02), (0.075, 0.02), (0.15, 0.02), (0.04, 0.1)])
def test_an_ema_that_was_not_tracked_is_reconstructed(sigma_rel, share):
    """On a random walk, whose EMAs differ at every lag; the error is the misfit of the profiles, no more."""
    theta_TP = np.cumsum(np.random.default_rng(0).standard_normal((2000, 64)), axis=0)
    tracked = {width: track(theta_TP, width) for width in (0.05, 0.10)}
    rows_KP = np.array([tracked[width][step - 1] for step, width in zip(STEPS, WIDTHS, strict=True)])
    found = reconstruct(STEPS, WIDTHS, sigma_rel=sigma_rel)
    truth_P = track(theta_TP, sigma_rel)[-1]
    error = np.linalg.norm(found.coef_K @ rows_KP - truth_P)
    nearest = min(np.linalg.norm(tracked[width][-1] - truth_P) for width in tracked)
    assert error < share * nearest
    # what the recursion really averages with, from the same recursion on unit vectors
    weight_KT = np.array([track(np.eye(2000), width)[-1] for width in (0.05, 0.10)])
    np.testing.assert_allclose(weight_KT @ theta_TP, rows_KP[-2:], rtol=1e-8, atol=1e-8)
    middle = np.arange(1, 2001) - 0.5
    continuous = np.array([[profile(t, 2000.0, profiles.exponent(w)) for t in middle] for w in (0.05, 0.10)])
    np.testing.assert_allclose(weight_KT, continuous, atol=2e-4)


def test_outside_the_tracked_widths_it_warns_with_the_coefficients_size():
    inside, outside = (reconstruct(STEPS, WIDTHS, sigma_rel=s) for s in (0.07, 0.02))
    assert inside.warning is None
    assert inside.residual < outside.residual / 5
    size = np.abs(outside.coef_K).sum()
    assert size > 10 * np.abs(inside.coef_K).sum()
    assert f"sigma_rel 0.02 lies outside the tracked 0.05 to 0.1: it is extrapolated with sum|c| {size:.3g}" in (
        outside.warning or ""
    )


def test_the_snapshot_of_the_start_is_left_out():
    found = reconstruct([0, 0, *STEPS], [0.05, 0.10, *WIDTHS], sigma_rel=0.07)
    assert found.coef_K[:2].tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(found.coef_K[2:], reconstruct(STEPS, WIDTHS, sigma_rel=0.07).coef_K)


def test_mistakes():
    with pytest.raises(ConfigError, match="stands twice"):
        reconstruct([100, 100], [0.05, 0.05], sigma_rel=0.07)
    with pytest.raises(ConfigError, match="`sigma_rel` is 0.9999; it must lie between 0 and 0.289"):
        reconstruct([100, 200], [0.9999, 0.9999], sigma_rel=0.07)
    with pytest.raises(ConfigError, match="later than step 0"):
        reconstruct([0], [0.05], sigma_rel=0.07)
    with pytest.raises(ConfigError, match="step 300 is later than the last snapshot, of step 200"):
        reconstruct([100, 200], [0.05, 0.05], sigma_rel=0.07, step=300)
    with pytest.raises(ConfigError, match="the last step is 0"):
        profiles.power_ema([0], 0.1)
    with pytest.raises(ConfigError, match="`window` is 6; it must lie between 1 and 5"):
        profiles.uniform(5, 6)
    with pytest.raises(ConfigError, match="`window` is 0"):
        profiles.minus_sqrt(5, 0)

"""A power-function EMA of any length from tracked ones. K = snapshots of tracked EMAs.

A power-function EMA of exponent gamma, read at time t, averages the weights of training with the profile
p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (arXiv:2312.02696, Sec. 3.1). A combination of
snapshots averages with the same combination of their profiles, so the coefficients that come closest to a wanted
profile are a least-squares problem that needs the profiles alone (Sec. 3.2 and App. C.3; derived here from the
equations, in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.operators.profiles import exponent, one_hot

#: eigenvalues of the scaled system below this share of the largest are left out: they are rounding noise
SMALLEST = 1e-14


@dataclass(frozen=True)
class Reconstruction:
    """Coefficients of the snapshots, and how much to trust them.

    Args:
        coef_K: float64, sum one.
        condition: condition number of the system, its rows and columns scaled to profiles of unit length.
        residual: distance of the combined profile from the wanted one, as a share of the wanted one's length.
        warning: one sentence when the wanted width lies outside the tracked ones, else None.
    """

    coef_K: np.ndarray
    condition: float
    residual: float
    warning: str | None


def inner_products(t_A: np.ndarray, gamma_A: np.ndarray, t_B: np.ndarray, gamma_B: np.ndarray) -> np.ndarray:
    """Integrals of p(tau; t_a, gamma_a) p(tau; t_b, gamma_b) over tau, float64, shape (A, B).

    Both profiles live on [0, min(t_a, t_b)], where their product is a power of tau:

        (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * (t_min / t_max)^gamma_of_the_later / t_max

    Args:
        t_A: times above 0, shape (A,).
        gamma_A: exponents above -1/2, shape (A,).
        t_B: times above 0, shape (B,).
        gamma_B: exponents above -1/2, shape (B,).
    """
    ta, tb = np.asarray(t_A, np.float64)[:, None], np.asarray(t_B, np.float64)[None, :]
    ga, gb = np.asarray(gamma_A, np.float64)[:, None], np.asarray(gamma_B, np.float64)[None, :]
    later = np.maximum(ta, tb)
    shrink = (np.minimum(ta, tb) / later) ** np.where(ta < tb, gb, ga)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * shrink / later


def reconstruct(
    steps: Sequence[int], sigma_rels: Sequence[float], *, sigma_rel: float, step: int | None = None
) -> Reconstruction:
    """Coefficients of tracked snapshots that make the power-function EMA of width `sigma_rel`.

    Minimizes the squared distance between the profiles among all coefficients that sum to one. The sum is a
    constraint of the minimization (a Lagrange multiplier), not a division afterwards: every profile integrates to one,
    so a sum of one keeps the weights' scale, and dividing would move all coefficients although the misfit is local.

    Args:
        steps: training step at which each snapshot was taken, counted from the start of training, shape (K,).
        sigma_rels: width of each snapshot's EMA, shape (K,).
        sigma_rel: wanted width.
        step: step at which the wanted EMA is read; None means the last.

    Raises:
        ConfigError: widths outside (0, sqrt(1/12)), a snapshot given twice, none after step 0, none as late as `step`.
    """
    t_K, width_K = np.asarray(steps, np.float64), np.asarray(sigma_rels, np.float64)
    at = float(max(steps) if step is None else step)
    if len(set(zip(t_K, width_K, strict=True))) < len(t_K):
        raise ConfigError("a tracked EMA stands twice at one step. Give each snapshot once.")
    gamma_K = np.array([exponent(width) for width in width_K])
    gamma = exponent(sigma_rel)
    alive = t_K > 0  # the snapshot at step 0 is the initial network alone, which no later profile contains
    if not alive.any() or not at > 0:
        raise ConfigError("no snapshot of the tracked EMAs is later than step 0, the start of training.")
    if at > t_K.max():
        raise ConfigError(f"step {at:g} is later than the last snapshot, of step {t_K.max():g}. Choose one up to it.")
    gram = inner_products(t_K[alive], gamma_K[alive], t_K[alive], gamma_K[alive])
    wanted = inner_products(t_K[alive], gamma_K[alive], np.array([at]), np.array([gamma]))[:, 0]
    length2 = float(inner_products(np.array([at]), np.array([gamma]), np.array([at]), np.array([gamma]))[0, 0])
    found, condition = _solve(gram, wanted)
    tracked = np.flatnonzero((t_K == at) & (width_K == sigma_rel))
    if len(tracked):  # it was tracked: no need to solve, and no rounding
        return Reconstruction(one_hot(len(t_K), int(tracked[0])), condition, 0.0, None)
    coef_K = np.zeros(len(t_K))
    coef_K[alive] = found
    residual2 = (length2 - 2 * found @ wanted + found @ gram @ found) / length2
    residual = float(np.sqrt(max(residual2, 0.0)))
    return Reconstruction(coef_K, condition, residual, _warning(coef_K, width_K, sigma_rel, residual))


def _solve(gram_KK: np.ndarray, wanted_K: np.ndarray) -> tuple[np.ndarray, float]:
    """min x^T G x - 2 x^T b subject to sum(x) = 1, and the condition number of G scaled to a unit diagonal."""
    scale_K = 1 / np.sqrt(np.diag(gram_KK))
    value_Z, basis_KZ = np.linalg.eigh(gram_KK * scale_K[:, None] * scale_K)
    condition = float(value_Z[-1] / max(value_Z[0], np.finfo(float).tiny))
    keep = value_Z > SMALLEST * value_Z[-1]
    value_Z, basis_KZ = value_Z[keep], basis_KZ[:, keep]

    def inverse(right_K: np.ndarray) -> np.ndarray:
        return basis_KZ @ ((basis_KZ.T @ right_K) / value_Z)

    free_K, ones_K = inverse(scale_K * wanted_K), inverse(scale_K)  # without the constraint, and its direction
    x_K = scale_K * (free_K + ones_K * ((1 - scale_K @ free_K) / (scale_K @ ones_K)))
    return x_K, condition


def _warning(coef_K: np.ndarray, width_K: np.ndarray, sigma_rel: float, residual: float) -> str | None:
    if width_K.min() <= sigma_rel <= width_K.max():
        return None
    return (
        f"sigma_rel {sigma_rel:g} lies outside the tracked {width_K.min():g} to {width_K.max():g}: it is extrapolated "
        f"with sum|c| {np.abs(coef_K).sum():.3g}, and misses the wanted profile by {residual:.2%}"
    )

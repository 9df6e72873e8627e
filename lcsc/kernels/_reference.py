"""The definition of the kernels: float64 and plain. Tests and benchmarks hold the fast paths to it, bit for bit.

Coefficients keep 29 significant bits. A float32, bfloat16 or float16 weight has at most 24, so their product has at
most 53 and is exact in float64. The products are added in float64 in the order of the rows; the sum starts from -0.0,
so that a single term keeps its sign of zero, and leaves out terms whose coefficient is zero. It is rounded to float32
once. Rounding a coefficient moves a candidate by at most 2^-30 of that row, less than float32 resolves.
"""

from __future__ import annotations

import math

import numpy as np

#: significant bits of a coefficient: 53 of float64 less 24 of float32
COEF_BITS = 29


def round_coef(coef: np.ndarray) -> np.ndarray:
    """The nearest float64 with 29 significant bits, ties to even; a contiguous array of the same shape."""
    mantissa, exponent = np.frexp(np.asarray(coef, dtype=np.float64))
    return np.ascontiguousarray(np.ldexp(np.rint(np.ldexp(mantissa, COEF_BITS)), exponent - COEF_BITS))


def sum_coef(coef: np.ndarray) -> np.ndarray:
    """Sums over the last axis without rounding errors: the coefficients of the anchor of a delta bank."""
    flat = np.asarray(coef, dtype=np.float64).reshape(-1, coef.shape[-1])
    return np.array([math.fsum(row) if np.isfinite(row).all() else np.nan for row in flat]).reshape(coef.shape[:-1])


def combine(coef_K: np.ndarray, W_KP: np.ndarray, anchor_P: np.ndarray | None = None) -> np.ndarray:
    """theta_P = sum_k coef_k W_kP as float32; with an anchor, (sum_k coef_k) anchor_P comes first."""
    theta_P = np.full(W_KP.shape[1], -0.0)
    terms = list(zip(round_coef(coef_K), W_KP, strict=True))
    if anchor_P is not None:
        terms.insert(0, (round_coef(sum_coef(round_coef(coef_K))), anchor_P))
    for coef, row_P in terms:
        if coef != 0:
            theta_P += coef * row_P.astype(np.float64)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, and the caller is told
        return theta_P.astype(np.float32)


def project(grad_P: np.ndarray, W_KP: np.ndarray, anchor_P: np.ndarray | None = None) -> np.ndarray:
    """grad_k = sum_p W_kp grad_p in float64 to the last bit; with an anchor, sum_p (W_kp + anchor_p) grad_p."""
    grad_P = grad_P.astype(np.float64)
    more = [] if anchor_P is None else list(anchor_P.astype(np.float64) * grad_P)
    return np.array([math.fsum([*(row_P.astype(np.float64) * grad_P), *more]) for row_P in W_KP])

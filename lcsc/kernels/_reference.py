"""The definition of the kernels: float64 and plain. Tests and benchmarks hold the fast paths to it."""

from __future__ import annotations

import numpy as np


def combine(coef_K: np.ndarray, W_KP: np.ndarray) -> np.ndarray:
    """theta_P = sum_k coef_k W_kP in float64."""
    theta_P = np.zeros(W_KP.shape[1], dtype=np.float64)
    for coef, row_P in zip(coef_K, W_KP, strict=True):
        theta_P += np.float64(coef) * row_P.astype(np.float64)
    return theta_P


def project(grad_P: np.ndarray, W_KP: np.ndarray) -> np.ndarray:
    """grad_k = sum_p W_kp grad_p in float64."""
    return np.array([np.dot(row_P.astype(np.float64), grad_P.astype(np.float64)) for row_P in W_KP])

"""Coefficients that people choose without a search. K = checkpoints; every vector is float64 and sums to one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcsc.core.errors import ConfigError


def one_hot(num_checkpoints: int, index: int) -> np.ndarray:
    """The checkpoint at `index` alone, shape (K,)."""
    coef_K = np.zeros(num_checkpoints)
    coef_K[index] = 1.0
    return coef_K


def ema(steps: Sequence[int], halflife: float) -> np.ndarray:
    """Exponential moving average over the saved steps, shape (K,).

    With g = 2 ** (-1 / halflife) per step: coef_1 = g^(n_K - n_1) and coef_i = g^(n_K - n_i) (1 - g^(n_i - n_(i-1))).
    This is the recursion `ema = g^gap * ema + (1 - g^gap) * theta` started at the first checkpoint.

    Args:
        steps: increasing training steps.
        halflife: optimizer steps after which a checkpoint counts half.
    """
    if not halflife > 0:
        raise ConfigError(f"`halflife` is {halflife}; it must be above 0 optimizer steps.")
    n = np.asarray(steps, dtype=np.float64)
    age = np.exp2(-(n[-1] - n) / halflife)
    return age * np.concatenate([[1.0], 1 - np.exp2(-np.diff(n) / halflife)])


def exponent(sigma_rel: float) -> float:
    """Exponent gamma of the averaging density (gamma + 1) t^gamma on [0, 1] whose standard deviation is `sigma_rel`.

    The density's variance is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (arXiv:2312.02696, App. C.1), so gamma is the
    real root above -1 of gamma^3 + 7 gamma^2 + (16 - t) gamma + 12 - t = 0 with t = 1 / sigma_rel^2. Wide densities
    (`sigma_rel` near sqrt(1/12), the uniform one) have gamma near 0.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ConfigError(f"`sigma_rel` is {sigma_rel}; it must lie between 0 and {12**-0.5:.3f}.")
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def relative_width(gamma: float) -> float:
    """Standard deviation of the density (gamma + 1) t^gamma on [0, 1]; the inverse of `exponent`."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def power_ema(steps: Sequence[int], sigma_rel: float) -> np.ndarray:
    """Power-function EMA of relative width `sigma_rel` over raw checkpoints, shape (K,).

    The averaging density t^c on [0, n_K] (arXiv:2312.02696, Eq. 2 and App. C.1) is integrated between the saved
    steps; c is `exponent(sigma_rel)`.

    Args:
        steps: increasing training steps, counted from the start of training.
        sigma_rel: width of the profile as a share of training; EDM2 uses 0.05 to 0.25, the limit is sqrt(1/12).
    """
    c = exponent(sigma_rel)
    if not steps[-1] > 0:
        raise ConfigError(f"the last step is {steps[-1]}; a power-function EMA needs steps counted from 0, the start.")
    n = np.asarray(steps, dtype=np.float64) / steps[-1]
    return np.diff(np.concatenate([[0.0], n ** (c + 1)]))


def uniform(num_checkpoints: int, window: int) -> np.ndarray:
    """Mean of the last `window` checkpoints (LAWA, arXiv:2306.03241), shape (K,).

    Raises:
        ConfigError: `window` is below 1 or above `num_checkpoints`.
    """
    _check_window(num_checkpoints, window)
    coef_K = np.zeros(num_checkpoints)
    coef_K[-window:] = 1.0 / window
    return coef_K


def minus_sqrt(num_checkpoints: int, window: int) -> np.ndarray:
    """Merge of the last `window` checkpoints that imitates a 1-sqrt learning-rate decay (WSM, arXiv:2507.17634).

    With decay w_j = 1 - sqrt(j / M) after checkpoint j of M, an update made before checkpoint j keeps the share w_j;
    the coefficients are the differences of neighbouring shares. Shape (K,).

    Raises:
        ConfigError: `window` is below 1 or above `num_checkpoints`.
    """
    _check_window(num_checkpoints, window)
    shares = 1 - np.sqrt(np.arange(window + 1) / window)
    coef_K = np.zeros(num_checkpoints)
    coef_K[-window:] = -np.diff(shares)
    return coef_K


def _check_window(num_checkpoints: int, window: int) -> None:
    if not 1 <= window <= num_checkpoints:
        raise ConfigError(
            f"`window` is {window}; it must lie between 1 and {num_checkpoints}, the checkpoints there are."
        )

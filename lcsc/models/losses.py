"""Losses that denoisers and consistency functions are trained with; shared by the trainers and the objectives."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.models.base import Model, per_image


def denoising_loss(
    net: nn.Module, model: Model, images_NCHW: Tensor, noise_NCHW: Tensor, sigma_N: Tensor, sigma_data: float
) -> Tensor:
    """EDM's weighted mean squared error of each image, shape (N,): arXiv:2206.00364, Eq. 8, the mean over pixels.

    The weight is lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Table 1 there).

    Args:
        images_NCHW: clean images.
        noise_NCHW: unit normal.
        sigma_N: noise level of each image.
        sigma_data: standard deviation of the images.
    """
    denoised_NCHW = model.denoise(net, images_NCHW + per_image(sigma_N) * noise_NCHW, sigma_N)
    weight_N = (sigma_N**2 + sigma_data**2) / (sigma_N * sigma_data) ** 2
    return weight_N * (denoised_NCHW - images_NCHW).square().flatten(1).mean(1)


def consistency_loss(
    net: nn.Module,
    model: Model,
    images_NCHW: Tensor,
    noise_NCHW: Tensor,
    sigmas: tuple[Tensor, Tensor],
    huber: float,
    target_learns: bool = False,
) -> Tensor:
    """Pseudo-Huber distance of a consistency function's outputs at two noise levels over their gap, shape (N,).

    Table 1 of arXiv:2310.14189: weight 1 / (sigma_{i+1} - sigma_i) and c = huber sqrt(d), d the numbers of an image.

    Args:
        images_NCHW: clean images.
        noise_NCHW: unit normal, the same at both levels.
        sigmas: the larger level and the next smaller one, (N,) each.
        huber: c / sqrt(d).
        target_learns: whether the output at the smaller level passes derivatives on; in training it does not.
    """
    above_N, below_N = sigmas
    with torch.set_grad_enabled(target_learns and torch.is_grad_enabled()):
        target_NCHW = model.denoise(net, images_NCHW + per_image(below_N) * noise_NCHW, below_N)
    output_NCHW = model.denoise(net, images_NCHW + per_image(above_N) * noise_NCHW, above_N)
    c = huber * math.sqrt(images_NCHW[0].numel())
    squared_N = (output_NCHW - target_NCHW).square().flatten(1).sum(1)
    return ((squared_N + c**2).sqrt() - c) / (above_N - below_N)


@lru_cache(maxsize=16)
def noise_grid(
    intervals: int, sigma_min: float, sigma_max: float, rho: float, p_mean: float, p_std: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ascending noise levels, float32 (intervals + 1,), and the cumulative probabilities of the intervals (intervals,).

    Levels as in arXiv:2206.00364, Eq. 5; probabilities as in Table 1 of arXiv:2310.14189, the mass that a normal
    distribution of ln(sigma) puts between two neighbours.
    """
    from scipy.special import ndtr

    ramp = np.linspace(0, 1, intervals + 1)
    grid = (sigma_min ** (1 / rho) + ramp * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho
    mass = np.diff(ndtr((np.log(grid) - p_mean) / p_std))
    cumulative = np.cumsum(mass / mass.sum())
    return grid.astype(np.float32), cumulative


def neighbours(uniform_N: np.ndarray, grid: np.ndarray, cumulative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The larger and the smaller end, float32 (N,) each, of the interval of `noise_grid` at each uniform number."""
    below_N = np.minimum(np.searchsorted(cumulative, uniform_N, side="right"), len(cumulative) - 1)
    return grid[below_N + 1], grid[below_N]

"""Noise schedules shared by samplers."""

from __future__ import annotations

from torch import Tensor

from lcsc.samplers.base import Level


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """`num_steps` noise levels falling from `sigma_max` to `sigma_min`, then 0 (arXiv:2206.00364, Eq. 5).

    The ends are exact. One step goes from `sigma_max` straight to 0.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    inner = [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(1, num_steps - 1)]
    return [sigma_max, *inner, *([sigma_min] if num_steps > 1 else []), 0.0]


def weight_like(weight: Level, x_NCHW: Tensor) -> Level:
    """A number as `torch.lerp` takes it: tensors in the dtype and on the device of the images."""
    return weight.to(x_NCHW) if isinstance(weight, Tensor) else weight

"""One-step and multistep consistency sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise


@register("sampler", "consistency", source="arXiv:2303.01469, Algorithm 1")
@dataclass(frozen=True)
class ConsistencySampler:
    """One network call per noise level: jump to the clean image, add fresh noise, jump again.

    Args:
        sigmas: falling noise levels; one level is one-step generation.
        sigma_min: level at which the consistency function is the identity (epsilon in the paper).
    """

    sigmas: list[float] = field(default_factory=lambda: [80.0])
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        levels = [*self.sigmas, self.sigma_min, 0.0]
        if not self.sigmas or any(not a > b for a, b in pairwise(levels)):
            raise ConfigError(
                f"sampler `consistency` has `sigmas` {list(self.sigmas)} and `sigma_min` {self.sigma_min}; it needs "
                "at least one level, each below the one before it and above sigma_min > 0. [80.0] is one step."
            )

    def nfe(self) -> int:
        """Number of network calls per image."""
        return len(self.sigmas)

    @property
    def sigma_max(self) -> float:
        """First noise level."""
        return float(self.sigmas[0])

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images of shape and dtype of `noise_NCHW`; level i > 0 takes its noise from stream i of `rng`.

        Raises:
            ConfigError: more than one level and no `rng`.
        """
        x_NCHW = denoise(noise_NCHW * self.sigma_max, self.sigma_max, labels_N)
        for i, sigma in enumerate(self.sigmas[1:], start=1):
            if rng is None:
                raise ConfigError(
                    f"sampler `consistency` with {len(self.sigmas)} levels needs fresh noise and got none; "
                    "pass `rng`, or give one level in `sigmas`."
                )
            fresh_NCHW = torch.from_numpy(rng.normal(tuple(noise_NCHW.shape[1:]), stream=i)).to(noise_NCHW)
            x_NCHW = denoise(x_NCHW + math.sqrt(sigma**2 - self.sigma_min**2) * fresh_NCHW, sigma, labels_N)
        return x_NCHW

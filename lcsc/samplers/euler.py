"""First-order sampler on the EDM schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise, Level
from lcsc.samplers.schedule import check_karras, karras_sigmas, weight_like


@register("sampler", "euler", source="arXiv:2206.00364, Algorithm 1 without the correction")
@dataclass(frozen=True)
class Euler:
    """Euler steps of the probability-flow ODE, order 1; one network call a step.

    Args:
        num_steps: steps, the last of which ends at sigma 0.
        sigma_min, sigma_max, rho: EDM schedule (Eq. 5).
        search_times: whether a search varies the levels below `sigma_max` along with its coefficients.
    """

    num_steps: int = 5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    search_times: bool = False

    def __post_init__(self) -> None:
        check_karras("euler", self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    @property
    def level_floor(self) -> float:
        """What every level stays above."""
        return 0.0

    def nfe(self) -> int:
        """Number of network calls per image."""
        return self.num_steps

    def levels(self) -> list[float]:
        """Its own noise levels, from `sigma_max` on; the last step ends at 0."""
        return karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)[:-1]

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images of shape and dtype of `noise_NCHW`; `rng` is not used."""
        return self.run(self.levels(), denoise, noise_NCHW, labels_N)

    def run(
        self,
        levels: Sequence[Level],
        denoise: Denoise,
        noise_NCHW: Tensor,
        labels_N: Tensor | None = None,
        *,
        rng: ImageNoise | None = None,
    ) -> Tensor:
        """See `Timed.run`; `rng` is not used."""
        x_NCHW = noise_NCHW * levels[0]
        for sigma, sigma_next in pairwise([*levels, 0.0]):
            # x + (sigma_next - sigma) (x - D) / sigma, written so that sigma_next = 0 gives D to the bit
            x_NCHW = torch.lerp(denoise(x_NCHW, sigma, labels_N), x_NCHW, weight_like(sigma_next / sigma, x_NCHW))
        return x_NCHW

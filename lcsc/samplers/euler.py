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
from lcsc.samplers.karras import KarrasSteps
from lcsc.samplers.schedule import weight_like


@register("sampler", "euler", source="arXiv:2206.00364, Algorithm 1 without the correction")
@dataclass(frozen=True)
class Euler(KarrasSteps):
    """Euler steps of the probability-flow ODE, order 1; one network call a step."""

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

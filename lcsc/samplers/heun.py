"""Second-order sampler on the EDM schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise, Level
from lcsc.samplers.karras import KarrasSteps


@register("sampler", "heun", source="arXiv:2206.00364, Algorithm 1")
@dataclass(frozen=True)
class Heun(KarrasSteps):
    """Heun steps of the probability-flow ODE, order 2; two network calls a step, one in the last."""

    num_steps: int = 3

    def nfe(self) -> int:
        """Number of network calls per image."""
        return 2 * self.num_steps - 1

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
            denoised_NCHW = denoise(x_NCHW, sigma, labels_N)
            if sigma_next == 0:  # the slope is undefined there: an Euler step, which lands on D
                return denoised_NCHW
            slope_NCHW = (x_NCHW - denoised_NCHW) / sigma
            guess_NCHW = x_NCHW + (sigma_next - sigma) * slope_NCHW
            slope_next_NCHW = (guess_NCHW - denoise(guess_NCHW, sigma_next, labels_N)) / sigma_next
            x_NCHW = x_NCHW + (sigma_next - sigma) * (slope_NCHW + slope_next_NCHW) / 2
        raise AssertionError("the last step ends at 0")

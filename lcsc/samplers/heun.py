"""Second-order sampler on the EDM schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise, Level
from lcsc.samplers.schedule import check_karras, karras_sigmas


@register("sampler", "heun", source="arXiv:2206.00364, Algorithm 1")
@dataclass(frozen=True)
class Heun:
    """Heun steps of the probability-flow ODE, order 2; two network calls a step, one in the last.

    Args:
        num_steps: steps, the last of which ends at sigma 0.
        sigma_min, sigma_max, rho: EDM schedule (Eq. 5).
        search_times: whether a search varies the levels below `sigma_max` along with its coefficients.
    """

    num_steps: int = 3
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    search_times: bool = False

    def __post_init__(self) -> None:
        check_karras("heun", self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    @property
    def level_floor(self) -> float:
        """What every level stays above."""
        return 0.0

    def nfe(self) -> int:
        """Number of network calls per image."""
        return 2 * self.num_steps - 1

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
            denoised_NCHW = denoise(x_NCHW, sigma, labels_N)
            if sigma_next == 0:  # the slope is undefined there: an Euler step, which lands on D
                return denoised_NCHW
            slope_NCHW = (x_NCHW - denoised_NCHW) / sigma
            guess_NCHW = x_NCHW + (sigma_next - sigma) * slope_NCHW
            slope_next_NCHW = (guess_NCHW - denoise(guess_NCHW, sigma_next, labels_N)) / sigma_next
            x_NCHW = x_NCHW + (sigma_next - sigma) * (slope_NCHW + slope_next_NCHW) / 2
        raise AssertionError("the last step ends at 0")

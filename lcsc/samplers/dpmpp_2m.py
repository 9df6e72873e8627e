"""DPM-Solver++ (2M) on the EDM schedule, through diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise, Level
from lcsc.samplers.schedule import check_karras, karras_sigmas


@register("sampler", "dpmpp_2m", source="arXiv:2211.01095, Algorithm 2 (diffusers EDMDPMSolverMultistepScheduler)")
@dataclass(frozen=True)
class DPMpp2M:
    """Two-step multistep solver in log sigma, order 2 at one network call a step.

    Args:
        num_steps: steps, the last of which ends at sigma 0 (first order, as is the first).
        sigma_min, sigma_max, rho: EDM schedule (arXiv:2206.00364, Eq. 5).
        search_times: whether a search varies the levels below `sigma_max` along with its coefficients.
    """

    num_steps: int = 5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    search_times: bool = False

    def __post_init__(self) -> None:
        check_karras("dpmpp_2m", self.num_steps, self.sigma_min, self.sigma_max, self.rho)

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
        scheduler = _scheduler(levels)
        x_NCHW = noise_NCHW * levels[0]
        for sigma, timestep in zip(levels, scheduler.timesteps, strict=True):
            denoised_NCHW = denoise(x_NCHW, sigma, labels_N)
            x_NCHW = scheduler.step(denoised_NCHW, timestep, x_NCHW).prev_sample
        return x_NCHW


def _scheduler(levels: Sequence[Level]) -> Any:
    """A new scheduler (it keeps the last denoised image) that takes D where it expects the raw output."""
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler: Any = EDMDPMSolverMultistepScheduler()
    # It would precondition the output itself, with one sigma_data and one form; D has all that behind it.
    scheduler.convert_model_output = lambda model_output, sample: model_output
    scheduler.set_timesteps(len(levels))
    scheduler.set_begin_index(0)
    # The same levels as the other EDM samplers to the bit: its own are float32, off by 1e-6 at sigma_max.
    scheduler.sigmas = torch.stack([torch.as_tensor(level, dtype=torch.float64) for level in (*levels, 0.0)])
    return scheduler

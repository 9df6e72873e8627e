"""DPM-Solver++ (2M) on the EDM schedule, through diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise
from lcsc.samplers.schedule import check_karras, karras_sigmas


@register("sampler", "dpmpp_2m", source="arXiv:2211.01095, Algorithm 2 (diffusers EDMDPMSolverMultistepScheduler)")
@dataclass(frozen=True)
class DPMpp2M:
    """Two-step multistep solver in log sigma, order 2 at one network call a step.

    Args:
        num_steps: steps, the last of which ends at sigma 0 (first order, as is the first).
        sigma_min, sigma_max, rho: EDM schedule (arXiv:2206.00364, Eq. 5).
    """

    num_steps: int = 5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_karras("dpmpp_2m", self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    def nfe(self) -> int:
        """Number of network calls per image."""
        return self.num_steps

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images of shape and dtype of `noise_NCHW`; `rng` is not used."""
        scheduler = self._scheduler()
        x_NCHW = noise_NCHW * self.sigma_max
        for sigma, timestep in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
            denoised_NCHW = denoise(x_NCHW, sigma, labels_N)
            x_NCHW = scheduler.step(denoised_NCHW, timestep, x_NCHW).prev_sample
        return x_NCHW

    def _scheduler(self) -> Any:
        """A new scheduler (it keeps the last denoised image) that takes D where it expects the raw output."""
        from diffusers import EDMDPMSolverMultistepScheduler

        scheduler: Any = EDMDPMSolverMultistepScheduler()
        # It would precondition the output itself, with one sigma_data and one form; D has all that behind it.
        scheduler.convert_model_output = lambda model_output, sample: model_output
        scheduler.set_timesteps(self.num_steps)
        scheduler.set_begin_index(0)
        # The same levels as the other EDM samplers to the bit: its own are float32, off by 1e-6 at sigma_max.
        scheduler.sigmas = torch.tensor(
            karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho), dtype=torch.float64
        )
        return scheduler

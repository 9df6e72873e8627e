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
from lcsc.samplers.karras import KarrasSteps


@register("sampler", "dpmpp_2m", source="arXiv:2211.01095, Algorithm 2 (diffusers EDMDPMSolverMultistepScheduler)")
@dataclass(frozen=True)
class DPMpp2M(KarrasSteps):
    """Two-step multistep solver in log sigma, order 2 at one network call a step, but for both ends."""

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

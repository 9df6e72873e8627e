"""DDIM on a variance-preserving schedule, through diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@register("sampler", "ddim", source="arXiv:2010.02502, Eq. 12 with eta = 0 (diffusers DDIMScheduler)")
@dataclass(frozen=True)
class DDIM:
    """Deterministic DDIM, order 1; one network call a step.

    DDIM moves x_vp = sqrt(alpha_bar) x_ve, where x_ve = clean + sigma * unit normal is what the denoiser takes and
    sigma = sqrt((1 - alpha_bar) / alpha_bar). Timesteps are spaced "trailing" (arXiv:2305.08891, Table 2), so the first
    is the noisiest; the last step ends at sigma 0. The defaults (the DDPM schedule) start at sigma 157.4.

    Args:
        num_steps: steps; must divide `num_train_timesteps`, or diffusers would step beside the timesteps it lists.
        num_train_timesteps: length of the beta schedule.
        beta_start, beta_end: first and last beta; alpha_bar is the running product of 1 - beta. Not used by
            squaredcos_cap_v2.
        beta_schedule: linear (arXiv:2006.11239), scaled_linear (linear in sqrt(beta), arXiv:2112.10752) or
            squaredcos_cap_v2 (arXiv:2102.09672).
    """

    num_steps: int = 5
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"

    def __post_init__(self) -> None:
        steps, train_steps = self.num_steps, self.num_train_timesteps
        if steps < 1:
            raise ConfigError(f"sampler `ddim` has `num_steps` {steps}; it needs at least 1. 5 is usual here.")
        if train_steps < 1 or train_steps % steps:
            near = max(1, round(train_steps / steps)) * steps
            raise ConfigError(
                f"sampler `ddim` has `num_steps` {steps} and `num_train_timesteps` {train_steps}; the first must "
                f"divide the second. Set `num_train_timesteps` to {near}, or choose another `num_steps`."
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"sampler `ddim` has `beta_start` {self.beta_start} and `beta_end` {self.beta_end}; they must satisfy "
                "0 < beta_start <= beta_end < 1. 0.0001 and 0.02 are usual."
            )
        if self.beta_schedule not in BETA_SCHEDULES:
            hint = did_you_mean(self.beta_schedule, BETA_SCHEDULES)
            raise ConfigError(f"sampler `ddim` has no `beta_schedule` named `{self.beta_schedule}`.{hint}")

    def nfe(self) -> int:
        """Number of network calls per image."""
        return self.num_steps

    @property
    def sigma_max(self) -> float:
        """Noise level of the first step, as the beta schedule has it."""
        alpha_bar = self._alpha_bar(int(self._scheduler.timesteps[0]))
        return math.sqrt((1 - alpha_bar) / alpha_bar)

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images of shape and dtype of `noise_NCHW`; `rng` is not used."""
        timesteps = self._scheduler.timesteps.tolist()
        x_NCHW = noise_NCHW * math.sqrt(1 - self._alpha_bar(timesteps[0]))  # sigma_max * noise, in x_vp
        for timestep in timesteps:
            alpha_bar = self._alpha_bar(timestep)
            sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
            denoised_NCHW = denoise(x_NCHW / math.sqrt(alpha_bar), sigma, labels_N)
            x_NCHW = self._scheduler.step(denoised_NCHW, timestep, x_NCHW, eta=0.0).prev_sample
        return x_NCHW  # alpha_bar is 1 here: x_vp = x_ve

    def _alpha_bar(self, timestep: int) -> float:
        return float(self._scheduler.alphas_cumprod[timestep])

    @cached_property
    def _scheduler(self) -> Any:
        """Safe to keep: DDIM's step has no memory."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=self.beta_schedule,
            prediction_type="sample",
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
        )
        scheduler.set_timesteps(self.num_steps)
        return scheduler

"""Denoising score matching with EDM's noise distribution and weighting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.datasets.base import Dataset
from lcsc.models.base import Model
from lcsc.models.losses import denoising_loss
from lcsc.training.base import Speed
from lcsc.training.loop import check_numbers, fit


@register("trainer", "diffusion", source="arXiv:2206.00364, Eq. 8 and Table 1")
@dataclass(frozen=True)
class Diffusion(Speed):
    """Trains a denoiser with EDM's loss and AdamW at a constant rate; raw weights, no average, are saved.

    ln(sigma) ~ N(p_mean, p_std^2), and the squared error is weighted with
    lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    Args:
        num_steps: optimizer steps.
        batch_size: images a step, over all processes.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        save_every: steps between checkpoints.
        p_mean, p_std: mean and standard deviation of ln(sigma).
        sigma_data: standard deviation of the images; must be the model's, where the model has one.
    """

    num_steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    save_every: int = 25
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self)
        if not (self.p_std > 0 and self.sigma_data > 0 and math.isfinite(self.p_mean)):
            raise ConfigError(
                f"`p_mean`, `p_std`, `sigma_data` are {self.p_mean}, {self.p_std}, {self.sigma_data}; "
                "the first must be finite, the others above 0."
            )

    def train(
        self,
        *,
        arch: Mapping[str, Any],
        model: Model,
        dataset: Dataset,
        out: Path,
        seed: int,
        progress: bool | None = None,
    ) -> Path:
        """Fill the bank `out`, or continue; see `lcsc.training.base.Trainer.train`."""
        return fit(self, arch=arch, model=model, dataset=dataset, out=out, seed=seed, progress=progress)

    def check(self, model: Model) -> None:
        """Refuse a model with another `sigma_data` (`ConfigError`)."""
        theirs = getattr(model, "sigma_data", self.sigma_data)
        if theirs != self.sigma_data:
            raise ConfigError(
                f"trainer `diffusion` has `sigma_data` {self.sigma_data}, the model has {theirs}. Give both the same."
            )

    def draw(self, rng: np.random.Generator, step: int, shape_NCHW: tuple[int, ...]) -> dict[str, np.ndarray]:
        """`sigma` (N,) and unit normal `noise` (N, C, H, W), float32."""
        sigma_N = np.exp(self.p_mean + self.p_std * rng.standard_normal(shape_NCHW[0]))
        noise_NCHW = rng.standard_normal(shape_NCHW, dtype=np.float32)
        return {"sigma": sigma_N.astype(np.float32), "noise": noise_NCHW}

    def loss(self, net: nn.Module, model: Model, images_NCHW: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Weighted mean squared error of each image, shape (N,): Eq. 8 with the mean over pixels."""
        return denoising_loss(net, model, images_NCHW, draws["noise"], draws["sigma"], self.sigma_data)

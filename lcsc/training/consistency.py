"""Consistency training from scratch, without a teacher."""

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
from lcsc.models.losses import consistency_loss, neighbours, noise_grid
from lcsc.training.base import Speed
from lcsc.training.loop import check_numbers, fit


@register("trainer", "consistency", source="arXiv:2310.14189, Table 1")
@dataclass(frozen=True)
class ConsistencyTraining(Speed):
    """Improved consistency training with AdamW at a constant rate; raw weights, no average, are saved.

    Two neighbouring noise levels get the same noise; the network at the larger one learns the output at the
    smaller one, which gives no gradient and is not averaged.

    Args:
        num_steps: optimizer steps.
        batch_size: images a step, over all processes.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        save_every: steps between checkpoints.
        p_mean, p_std: mean and standard deviation of ln(sigma) before it is put on the grid.
        min_intervals, max_intervals: noise intervals of the grid at the start, and the most there may be (s0, s1);
            their number doubles at equal distances in between.
        sigma_min: the smallest noise level; must be the model's.
        sigma_max: the largest noise level; one-step sampling starts there.
        rho: curvature of the grid of noise levels.
        huber: c / sqrt(d) of the pseudo-Huber loss, d the numbers of an image.
    """

    num_steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    save_every: int = 25
    p_mean: float = -1.1
    p_std: float = 2.0
    min_intervals: int = 10
    max_intervals: int = 80
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    huber: float = 0.00054

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 1 <= self.min_intervals <= self.max_intervals:
            raise ConfigError(
                f"`min_intervals` {self.min_intervals} and `max_intervals` {self.max_intervals}: "
                "both must be at least 1, and the first not above the second."
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"`sigma_min` {self.sigma_min} and `sigma_max` {self.sigma_max}: the first must be above 0 and "
                "below the second."
            )
        for name in ("p_std", "rho", "huber"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it must be above 0 and finite.")

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
        """Refuse a model that is not the identity at `sigma_min` (`ConfigError`)."""
        theirs = getattr(model, "sigma_min", None)
        if theirs != self.sigma_min:
            what = f"has `sigma_min` {theirs}" if theirs is not None else f"`{type(model).__name__}` has no `sigma_min`"
            raise ConfigError(
                f"trainer `consistency` has `sigma_min` {self.sigma_min}, the model {what}. "
                "Use the model `consistency` with the same value."
            )

    def num_intervals(self, step: int) -> int:
        """Noise intervals in use at `step` (from 1): N(k) - 1 of Table 1, arXiv:2310.14189."""
        stages = math.log2(self.max_intervals / self.min_intervals) + 1
        length = max(1, math.floor(self.num_steps / stages))
        doublings = min((step - 1) // length, 64)
        return min(self.min_intervals * 2**doublings, self.max_intervals)

    def draw(self, rng: np.random.Generator, step: int, shape_NCHW: tuple[int, ...]) -> dict[str, np.ndarray]:
        """`sigma` and the next smaller `sigma_below`, (N,), and unit normal `noise` (N, C, H, W), float32."""
        intervals = self.num_intervals(step)
        grid, cumulative = noise_grid(intervals, self.sigma_min, self.sigma_max, self.rho, self.p_mean, self.p_std)
        above_N, below_N = neighbours(rng.random(shape_NCHW[0]), grid, cumulative)
        noise_NCHW = rng.standard_normal(shape_NCHW, dtype=np.float32)
        return {"sigma": above_N, "sigma_below": below_N, "noise": noise_NCHW}

    def loss(self, net: nn.Module, model: Model, images_NCHW: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Pseudo-Huber distance of the two outputs over the gap of their noise levels, shape (N,).

        Table 1 of arXiv:2310.14189; see `lcsc.models.losses.consistency_loss`.
        """
        sigmas = draws["sigma"], draws["sigma_below"]
        return consistency_loss(net, model, images_NCHW, draws["noise"], sigmas, self.huber)

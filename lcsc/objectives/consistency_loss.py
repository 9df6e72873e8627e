"""The loss of consistency training on held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.models.losses import consistency_loss, neighbours, noise_grid
from lcsc.objectives.denoising_loss import HeldOutLoss


@register("objective", "consistency_loss", source="arXiv:2310.14189, Table 1")
@dataclass(frozen=True)
class ConsistencyLoss(HeldOutLoss):
    """How far a consistency model's outputs at neighbouring noise levels lie apart, on held-out images.

    The pseudo-Huber distance of improved consistency training on its finest grid, with the candidate's own weights at
    both levels. The derivative is that of this number, so it passes through both outputs; in training the smaller level
    gives none. Two network calls an image. A model can be consistent and still make worse images.

    Args:
        p_mean, p_std: mean and standard deviation of ln(sigma) before it is put on the grid.
        intervals: noise intervals of the grid (s1 of the training).
        sigma_min: the smallest noise level; must be the model's.
        sigma_max: the largest noise level.
        rho: curvature of the grid of noise levels.
        huber: c / sqrt(d) of the pseudo-Huber loss, d the numbers of an image.
    """

    p_mean: float = -1.1
    p_std: float = 2.0
    intervals: int = 80
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    huber: float = 0.00054

    name: ClassVar[str] = "consistency_loss"
    forwards: ClassVar[tuple[int, int]] = (2, 6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervals < 1:
            raise ConfigError(f"`objective.intervals` is {self.intervals}; it must be at least 1.")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"`objective.sigma_min` is {self.sigma_min} and `sigma_max` {self.sigma_max}; the first must be above "
                "0 and below the second."
            )
        for name in ("p_std", "rho", "huber"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"`objective.{name}` is {getattr(self, name)}; it must be above 0 and finite.")
        if not math.isfinite(self.p_mean):
            raise ConfigError(f"`objective.p_mean` is {self.p_mean}; it must be finite.")
        theirs = getattr(self.model, "sigma_min", None)
        if theirs != self.sigma_min:
            what = f"has `sigma_min` {theirs}" if theirs is not None else f"`{type(self.model).__name__}` has none"
            raise ConfigError(
                f"`objective.sigma_min` is {self.sigma_min}, the model {what}; use model `consistency` with the same."
            )

    def draw_levels(self, uniform_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The larger and the smaller of two neighbouring noise levels."""
        grid = noise_grid(self.intervals, self.sigma_min, self.sigma_max, self.rho, self.p_mean, self.p_std)
        return neighbours(uniform_N, *grid)

    def losses(self, net: nn.Module, images_NCHW: Tensor, noise_NCHW: Tensor, sigmas: tuple[Tensor, ...]) -> Tensor:
        """See `lcsc.models.losses.consistency_loss`."""
        above_N, below_N = sigmas
        pair = (above_N, below_N)
        return consistency_loss(net, self.model, images_NCHW, noise_NCHW, pair, self.huber, target_learns=True)

    def settings(self) -> dict[str, Any]:
        """The grid of noise levels, its probabilities and the distance."""
        names = ("p_mean", "p_std", "intervals", "sigma_min", "sigma_max", "rho", "huber")
        return {name: getattr(self, name) for name in names}

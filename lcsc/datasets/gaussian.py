"""Gaussian images: the toy whose denoiser, sampler and Fréchet distance are closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange


@register("dataset", "gaussian", source="lcsc")
@dataclass(frozen=True)
class Gaussian:
    """Independent pixels; pixel i (in CHW order) is N(0.3 cos i, (0.1 + 0.04 sin i)^2).

    [-1, 1] is at least 5 standard deviations away, so nothing is clamped and the closed forms hold.

    Args:
        shape: C, H, W.
        num_images: images drawn.
        seed: of the draw.
    """

    shape: list[int] = field(default_factory=lambda: [1, 2, 2])
    num_images: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ConfigError(
                f"dataset `gaussian` has `shape` {list(self.shape)}; give channels, height, width, all >= 1."
            )
        if self.num_images < 1:
            raise ConfigError(f"dataset `gaussian` has `num_images` {self.num_images}; it needs at least 1.")

    @property
    def name(self) -> str:
        """Short name for tables and titles."""
        return "gaussian"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.shape
        return (channels, height, width)

    @property
    def mean_CHW(self) -> Tensor:
        """True mean of every pixel, float32."""
        return (0.3 * self._index_CHW.cos()).float()

    @property
    def std_CHW(self) -> Tensor:
        """True standard deviation of every pixel, float32."""
        return (0.1 + 0.04 * self._index_CHW.sin()).float()

    def images(self) -> Tensor:
        """The draws, shape (num_images, C, H, W), float32."""
        return self._images

    def labels(self) -> None:
        """None: the draws have no classes."""
        return

    @property
    def _index_CHW(self) -> Tensor:
        return torch.arange(math.prod(self.shape), dtype=torch.float64).reshape(self.image_shape)

    @cached_property
    def _images(self) -> Tensor:
        # Stream 1: stream 0 of this purpose splits the images into halves.
        unit = SeedRange(self.seed, Purpose.SPLIT).normal(range(self.num_images), self.image_shape, stream=1)
        return self.mean_CHW + self.std_CHW * torch.from_numpy(unit)

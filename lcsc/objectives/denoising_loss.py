"""Losses on real images that are held out, and the first of them: the denoising loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import Dataset, need_images
from lcsc.datasets.content import data_digest
from lcsc.models.base import Model
from lcsc.models.flat import LiveModel
from lcsc.models.losses import denoising_loss
from lcsc.objectives.mean_loss import MeanLoss
from lcsc.objectives.shared import KeptLive, halves_of

#: Streams of a purpose: the noise of an image, its noise level; a third one is the order of the images.
NOISE, LEVEL = 0, 1


@dataclass(frozen=True)
class HeldOutLoss(MeanLoss):
    """A mean of losses of single real images; a subclass says what the loss of an image is.

    The images are cut into a search half and a report half as for `sample_quality`. Image i of (seed, purpose) is a
    real image with noise and a noise level that depend on (seed, purpose, i) alone; every real image of the half comes
    up once before any comes up again.

    Args:
        model: how the network becomes a denoiser.
        dataset: the real images.
        batch_size: images per network call.
        split_seed: of the cut of the images.
        device: torch device; `auto` takes the GPU where there is one.
    """

    model: Model = field(metadata={"internal": True})
    dataset: Dataset = field(metadata={"internal": True})
    batch_size: int = 500
    split_seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        need_images(self.dataset, f"objective `{self.name}`")
        if self.batch_size < 1:
            raise ConfigError(f"`objective.batch_size` is {self.batch_size}; it must be at least 1.")
        self.__dict__["_kept"] = KeptLive()

    def draw_levels(self, uniform_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """Noise levels, float32 (N,) each, at uniform numbers in [0, 1), shape (N,)."""
        raise NotImplementedError

    def losses(self, net: nn.Module, images_NCHW: Tensor, noise_NCHW: Tensor, sigmas: tuple[Tensor, ...]) -> Tensor:
        """Loss of each image, shape (N,), differentiable by the network's weights; `sigmas` are `draw_levels`'."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Plain values that the loss of an image depends on, beside model and images."""
        raise NotImplementedError

    def circumstances(self) -> dict[str, Any]:
        """Loss, images and model; `detector` is what turns an image into a number here."""
        settings = self.settings()
        return {
            "metric": self.name,
            "detector": self.name,
            "detector_digest": value_digest({"name": self.name, "model": repr(self.model), **settings}),
            "nfe": self.forwards[0],
            "model": repr(self.model),
            "dataset": repr(self.dataset),
            "data_digest": self._data_digest,
            "split_seed": self.split_seed,
            **settings,
        }

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        rows_N, real_NCHW = self._rows(seed, purpose, images), self.dataset.images()
        noise_NCHW, uniform_N = _draws(SeedRange(seed, purpose), images, tuple(self.dataset.image_shape))
        levels = [torch.from_numpy(level_N) for level_N in self.draw_levels(uniform_N)]
        for start in range(0, len(images), self.batch_size):
            here = slice(start, start + self.batch_size)
            drawn = (
                real_NCHW[torch.from_numpy(rows_N[here])],
                noise_NCHW[here],
                *(level_N[here] for level_N in levels),
            )
            clean_NCHW, noise, *sigmas = (tensor.to(live.theta_P.device) for tensor in drawn)
            yield self.losses(live.net, clean_NCHW, noise, tuple(sigmas))

    def half(self, purpose: Purpose) -> np.ndarray:
        """See `MeanLoss.half`."""
        return self._halves[purpose is Purpose.REPORT]

    @functools.cached_property
    def _data_digest(self) -> str:
        return data_digest(self.dataset)

    @functools.cached_property
    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        return halves_of(self.dataset, self.split_seed)


@register("objective", "denoising_loss", source="arXiv:2206.00364, Eq. 2, 8 and Table 1")
@dataclass(frozen=True)
class DenoisingLoss(HeldOutLoss):
    """EDM's weighted denoising loss on held-out images: no sampling, no detector, one network call an image.

    ln(sigma) ~ N(p_mean, p_std^2), and the squared error is weighted with
    lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. The loss is smooth and cheap, but a lower loss is
    no promise of better images.

    Args:
        p_mean, p_std: mean and standard deviation of ln(sigma).
        sigma_data: standard deviation of the images; must be the model's, where the model has one.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5

    name: ClassVar[str] = "denoising_loss"
    forwards: ClassVar[tuple[int, int]] = (1, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.p_std < math.inf and 0 < self.sigma_data < math.inf and math.isfinite(self.p_mean)):
            raise ConfigError(
                f"`objective.p_mean`, `p_std` and `sigma_data` are {self.p_mean}, {self.p_std}, {self.sigma_data}; "
                "the first must be finite, the others above 0 and finite."
            )
        theirs = getattr(self.model, "sigma_data", self.sigma_data)
        if theirs != self.sigma_data:
            raise ConfigError(
                f"`objective.sigma_data` is {self.sigma_data}, the model has {theirs}; give both the same."
            )

    def draw_levels(self, uniform_N: np.ndarray) -> tuple[np.ndarray]:
        """Log-normal noise levels."""
        from scipy.special import ndtri

        return (np.exp(self.p_mean + self.p_std * ndtri(uniform_N)).astype(np.float32),)

    def losses(self, net: nn.Module, images_NCHW: Tensor, noise_NCHW: Tensor, sigmas: tuple[Tensor, ...]) -> Tensor:
        """See `lcsc.models.losses.denoising_loss`."""
        return denoising_loss(net, self.model, images_NCHW, noise_NCHW, sigmas[0], self.sigma_data)

    def settings(self) -> dict[str, Any]:
        """Distribution of the noise levels and the weight's `sigma_data`."""
        return {"p_mean": self.p_mean, "p_std": self.p_std, "sigma_data": self.sigma_data}


@functools.lru_cache(maxsize=4)
def _draws(seeds: SeedRange, images: range, shape: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
    """Unit normal noise (N, C, H, W), and a uniform number in (0, 1) an image, float64 (N,)."""
    # the middle of one of 2^52 cells is never 0 or 1, where a normal quantile is infinite
    uniform_N = np.array([(int(seeds.generator(i, LEVEL).integers(2**52)) + 0.5) / 2**52 for i in images])
    return torch.from_numpy(seeds.normal(images, shape, NOISE)), uniform_N

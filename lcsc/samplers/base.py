"""What a sampler is: a rule that makes images of noise with a declared number of network calls."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lcsc.core.seeds import ImageNoise


class Denoise(Protocol):
    """D(x; sigma): the clean image expected behind `x_NCHW` = clean + sigma * unit normal; same shape."""

    def __call__(self, x_NCHW: Tensor, sigma: float, labels_N: Tensor | None) -> Tensor: ...


class Sampler(Protocol):
    """Makes images; deterministic given its arguments and differentiable in the denoiser's parameters."""

    @property
    def sigma_max(self) -> float:
        """First noise level, by which the unit noise is multiplied."""
        ...

    def nfe(self) -> int:
        """Number of network calls per image; what is called is what is declared."""
        ...

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images, same shape and dtype as the unit normal `noise_NCHW`, not clamped.

        `rng` gives fresh noise to samplers that need it, from stream 1 on (stream 0 made `noise_NCHW`).
        """
        ...

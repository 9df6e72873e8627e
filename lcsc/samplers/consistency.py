"""One-step and multistep consistency sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise, Level
from lcsc.samplers.schedule import karras_sigmas

#: Exponent of the schedule that `with_nfe` takes its levels from (arXiv:2303.01469, Sec. 6 uses it for training).
RHO = 7.0


@register("sampler", "consistency", source="arXiv:2303.01469, Algorithm 1")
@dataclass(frozen=True)
class ConsistencySampler:
    """One network call per noise level: jump to the clean image, add fresh noise, jump again.

    Args:
        sigmas: falling noise levels; one level is one-step generation.
        sigma_min: level at which the consistency function is the identity (epsilon in the paper).
        search_times: whether a search varies the levels below the first along with its coefficients.
    """

    sigmas: list[float] = field(default_factory=lambda: [80.0])
    sigma_min: float = 0.002
    search_times: bool = False

    def __post_init__(self) -> None:
        levels = [*self.sigmas, self.sigma_min, 0.0]
        if not self.sigmas or any(not a > b for a, b in pairwise(levels)):
            raise ConfigError(
                f"sampler `consistency` has `sigmas` {list(self.sigmas)} and `sigma_min` {self.sigma_min}; it needs "
                "at least one level, each below the one before it and above sigma_min > 0. [80.0] is one step."
            )

    def nfe(self) -> int:
        """Number of network calls per image."""
        return len(self.sigmas)

    @property
    def sigma_max(self) -> float:
        """First noise level."""
        return float(self.sigmas[0])

    @property
    def level_floor(self) -> float:
        """What every level stays above."""
        return self.sigma_min

    def levels(self) -> list[float]:
        """Its own noise levels."""
        return [float(sigma) for sigma in self.sigmas]

    def with_nfe(self, nfe: int) -> ConsistencySampler:
        """The same with `nfe` levels: those of the EDM schedule with rho 7 from the first level down to `sigma_min`.

        The schedule's last level, `sigma_min`, is left out: the function is the identity there.
        """
        return replace(self, sigmas=karras_sigmas(nfe + 1, self.sigma_min, self.sigma_max, RHO)[:nfe])

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images of shape and dtype of `noise_NCHW`; level i > 0 takes its noise from stream i of `rng`.

        Raises:
            ConfigError: more than one level and no `rng`.
        """
        return self.run(self.levels(), denoise, noise_NCHW, labels_N, rng=rng)

    def run(
        self,
        levels: Sequence[Level],
        denoise: Denoise,
        noise_NCHW: Tensor,
        labels_N: Tensor | None = None,
        *,
        rng: ImageNoise | None = None,
    ) -> Tensor:
        """See `Timed.run`; raises ConfigError for more than one level and no `rng`."""
        x_NCHW = denoise(noise_NCHW * levels[0], levels[0], labels_N)
        for i, sigma in enumerate(levels[1:], start=1):
            if rng is None:
                raise ConfigError(
                    f"sampler `consistency` with {len(levels)} levels needs fresh noise and got none; "
                    "pass `rng`, or give one level in `sigmas`."
                )
            fresh_NCHW = torch.from_numpy(rng.normal(tuple(noise_NCHW.shape[1:]), stream=i)).to(noise_NCHW)
            x_NCHW = denoise(x_NCHW + _root(sigma**2 - self.sigma_min**2) * fresh_NCHW, sigma, labels_N)
        return x_NCHW


def _root(square: Level) -> Level:
    return square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)

"""A sampler's noise levels as something to search: unbounded offsets around its own schedule. T = levels.

With gaps g_i = ln(s_(i-1) - low) - ln(s_i - low) between the schedule's levels s_0 > ... > s_(T-1) > low, offsets
o_1 ... o_(T-1) stretch each gap by exp(o): s'_i - low = (s_0 - low) exp(-sum_(j<=i) g_j exp(o_j)). Levels fall whatever
the offsets are, s_0 stays (it scales the noise), and zero offsets are the schedule to the bit. Stretches saturate at
`NARROWEST` and `WIDEST`, so that two levels never meet in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import describe
from lcsc.core.seeds import ImageNoise
from lcsc.core.space import Box
from lcsc.samplers.base import Denoise, Timed

#: Least and greatest factor of a gap in log sigma. EDM's schedule ends so low that at few steps gaps mostly shrink.
NARROWEST, WIDEST = 1 / 8, 2.0
#: Typical move of an offset: gaps change by a quarter.
SCALE = 0.25
#: Where stretches have long saturated; no need to go on to numbers that overflow.
FLAT = 1e3
#: Share of the first level by which every level must lie above the low end, or stretched ones would meet in float64.
CLOSEST = 1e-7


@dataclass(frozen=True, eq=False)
class Warp:
    """Offsets -> noise levels around one schedule.

    Args:
        schedule_T: the levels at zero offsets, falling, float64, shape (T,).
        low: what every level stays above.

    Raises:
        ConfigError: the levels do not fall, or come too close to `low`.
    """

    schedule_T: np.ndarray
    low: float = 0.0

    def __post_init__(self) -> None:
        s_T = self.schedule_T
        if s_T.ndim != 1 or not s_T.size or not (np.diff(s_T) < 0).all() or not s_T[-1] > self.low >= 0:
            raise ConfigError(f"noise levels {s_T.tolist()} do not fall, or not above {self.low}; they must.")
        if self.low > 0 and s_T[-1] - self.low < CLOSEST * s_T[0]:
            raise ConfigError(
                f"the last noise level is {s_T[-1]}, too close to {self.low} to be searched; raise it to "
                f"{self.low + CLOSEST * s_T[0]:.9g} or more, or set `sampler.search_times` to false."
            )

    @property
    def size(self) -> int:
        """Number of offsets, T - 1."""
        return len(self.schedule_T) - 1

    def levels(self, offsets: np.ndarray) -> np.ndarray:
        """The levels, falling strictly, float64, shape (T,); `offsets` has shape (T - 1,) and may be any numbers."""
        shrink_T = self._shrink(offsets)
        moved_T = self.low + (self.schedule_T - self.low) * shrink_T
        return np.where(shrink_T == 1, self.schedule_T, moved_T)  # low + (s - low) is s only up to rounding

    def jacobian(self, offsets: np.ndarray) -> np.ndarray:
        """Derivative of `levels` by the offsets, shape (T, T - 1), zero above the diagonal's neighbour."""
        stretch, slope = _stretch(offsets)
        reach_T = (self.schedule_T - self.low) * self._shrink(offsets)
        table = -reach_T[1:, None] * (self._gaps() * stretch * slope)
        return np.vstack([np.zeros(self.size), np.tril(table)])

    def _gaps(self) -> np.ndarray:
        return -np.diff(np.log(self.schedule_T - self.low))

    def _shrink(self, offsets: np.ndarray) -> np.ndarray:
        """(new level - low) / (old level - low), shape (T,); exactly 1 where no offset acts."""
        stretch, _ = _stretch(offsets)
        return np.exp(-np.concatenate([[0.0], np.cumsum(self._gaps() * (stretch - 1))]))


def _stretch(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the gaps, and the derivative of their logarithms by the offsets, which is 1 at zero."""
    offsets = np.clip(np.asarray(offsets, dtype=np.float64), -FLAT, FLAT)
    limit = np.where(offsets > 0, math.log(WIDEST), -math.log(NARROWEST))
    bent = np.tanh(offsets / limit)
    return np.exp(limit * bent), 1 - bent**2


@dataclass(frozen=True, eq=False)
class Retimed:
    """A sampler on levels that offsets moved; a `Sampler` itself.

    Args:
        sampler: a `Timed` sampler.
        offsets: shape (T - 1,).
    """

    sampler: Any
    offsets: np.ndarray

    @property
    def sigma_max(self) -> float:
        """First noise level, the sampler's own."""
        return float(self.sampler.sigma_max)

    def nfe(self) -> int:
        """Number of network calls per image, the sampler's own."""
        return int(self.sampler.nfe())

    def levels(self) -> list[float]:
        """The levels it runs on."""
        return warp_of(self.sampler).levels(self.offsets).tolist()

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """See `Sampler.__call__`; inside `collecting`, differentiable by the levels too."""
        leaf_T = self.__dict__.get("_leaf")
        levels = self.levels() if leaf_T is None else list(leaf_T.unbind())
        return self.sampler.run(levels, denoise, noise_NCHW, labels_N, rng=rng)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[np.ndarray]:
        """Inside, backward passes add up; what is yielded holds the derivative by the offsets once outside."""
        warp = warp_of(self.sampler)
        leaf_T = torch.from_numpy(warp.levels(self.offsets)).requires_grad_()
        gradient = np.zeros(warp.size)
        self.__dict__["_leaf"] = leaf_T
        try:
            yield gradient
            if leaf_T.grad is not None:
                gradient += leaf_T.grad.numpy() @ warp.jacobian(self.offsets)
        finally:
            del self.__dict__["_leaf"]


def warp_of(sampler: Any) -> Warp:
    """The warp around a sampler's own schedule.

    Raises:
        ConfigError: the sampler cannot work on other levels than its own.
    """
    if not isinstance(sampler, Timed):
        raise ConfigError(
            f"sampler `{describe('sampler', sampler)['name']}` works on its own noise levels only, so its times cannot "
            "be searched. Choose euler (ddim is the same rule), heun, dpmpp_2m or consistency."
        )
    return Warp(np.array(sampler.levels(), dtype=np.float64), sampler.level_floor)


def times_box(sampler: Any, name: str = "times") -> Box | None:
    """The box of offsets that a sampler asks to be searched by its `search_times`.

    None when it does not ask, or has one level only, which is where the noise starts. Zero is the sampler's own
    schedule, so the box refines others (level 1).
    """
    if not getattr(sampler, "search_times", False):
        return None
    size = warp_of(sampler).size
    return Box(name, size, scale=SCALE, level=1) if size else None

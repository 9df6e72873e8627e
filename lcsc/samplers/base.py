"""What a sampler is: a rule that makes images of noise with a declared number of network calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import describe
from lcsc.core.seeds import ImageNoise

#: A noise level: a number, or a 0-dim tensor where a derivative by it is wanted.
Level: TypeAlias = float | Tensor


class Denoise(Protocol):
    """D(x; sigma): the clean image expected behind `x_NCHW` = clean + sigma * unit normal; same shape."""

    def __call__(self, x_NCHW: Tensor, sigma: Level, labels_N: Tensor | None) -> Tensor: ...


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


@runtime_checkable
class Timed(Protocol):
    """What a sampler offers beside `Sampler` when it can work on other noise levels than its schedule's."""

    @property
    def level_floor(self) -> float:
        """What every level stays above."""
        ...

    def levels(self) -> list[float]:
        """Its own noise levels, falling from `sigma_max`, without the end of the last step."""
        ...

    def run(
        self,
        levels: Sequence[Level],
        denoise: Denoise,
        noise_NCHW: Tensor,
        labels_N: Tensor | None = None,
        *,
        rng: ImageNoise | None = None,
    ) -> Tensor:
        """Images as `Sampler.__call__` makes them, on the given levels, falling and as many as `levels()` has.

        Levels may be 0-dim float64 tensors; the images are then differentiable by them.
        """
        ...


def with_nfe(sampler: Any, nfe: int) -> Any:
    """The sampler with as many steps or levels as make `nfe` network calls an image, all else the same.

    Raises:
        ConfigError: it has no such setting; names the nearest numbers of calls that it does have.
    """
    if nfe < 1:
        raise ConfigError(f"a sampler cannot make images with {nfe} network calls; the number must be at least 1.")
    if sampler.nfe() == nfe:
        return sampler
    if hasattr(sampler, "with_nfe"):
        return sampler.with_nfe(nfe)
    possible = {found.nfe(): found for found in _by_num_steps(sampler, 2 * nfe + 1)}
    possible.setdefault(sampler.nfe(), sampler)
    if nfe not in possible:
        below, above = [n for n in possible if n < nfe], [n for n in possible if n > nfe]
        near = [str(n) for n in (max(below, default=None), min(above, default=None)) if n is not None]
        raise ConfigError(
            f"sampler `{describe('sampler', sampler)['name']}` cannot make images with {nfe} network calls; the "
            f"nearest it can do with is {' and '.join(near)}. Ask for one of these, or choose another sampler."
        )
    return possible[nfe]


def _by_num_steps(sampler: Any, most: int) -> list[Any]:
    """The sampler with 1 to `most` steps, where it has such a field and takes the value."""
    if "num_steps" not in {field.name for field in dataclasses.fields(sampler)}:
        return []
    found = []
    for num_steps in range(1, most + 1):
        try:
            found.append(dataclasses.replace(sampler, num_steps=num_steps))
        except ConfigError:  # such as a number that does not divide ddim's timesteps
            continue
    return found

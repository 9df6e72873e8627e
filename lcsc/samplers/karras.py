"""What the samplers on EDM's schedule share: its settings, its levels, and a pass along them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import describe
from lcsc.core.seeds import ImageNoise
from lcsc.samplers.base import Denoise, Level
from lcsc.samplers.schedule import karras_sigmas


@dataclass(frozen=True)
class KarrasSteps:
    """Steps along falling noise levels, of which the last ends at sigma 0.

    Args:
        num_steps: steps, the last of which ends at sigma 0.
        sigma_min, sigma_max, rho: EDM schedule (arXiv:2206.00364, Eq. 5).
        search_times: whether a search varies the levels below `sigma_max` along with its coefficients.

    Raises:
        ConfigError: settings that give no schedule.
    """

    num_steps: int = 5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    search_times: bool = False

    def __post_init__(self) -> None:
        name = describe("sampler", self)["name"]
        if self.num_steps < 1:
            raise ConfigError(
                f"sampler `{name}` has `num_steps` {self.num_steps}; it needs at least 1. 5 is usual here."
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"sampler `{name}` has `sigma_min` {self.sigma_min} and `sigma_max` {self.sigma_max}; they must "
                "satisfy 0 < sigma_min < sigma_max. 0.002 and 80 are usual."
            )
        if not self.rho > 0:
            raise ConfigError(f"sampler `{name}` has `rho` {self.rho}; it must be above 0. 7 is usual.")

    @property
    def level_floor(self) -> float:
        """What every level stays above."""
        return 0.0

    def nfe(self) -> int:
        """Number of network calls per image."""
        return self.num_steps

    def levels(self) -> list[float]:
        """Its own noise levels, from `sigma_max` on; the last step ends at 0."""
        return karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)[:-1]

    def __call__(
        self, denoise: Denoise, noise_NCHW: Tensor, labels_N: Tensor | None = None, *, rng: ImageNoise | None = None
    ) -> Tensor:
        """Images of shape and dtype of `noise_NCHW`; `rng` is not used."""
        return self.run(self.levels(), denoise, noise_NCHW, labels_N)

    @abstractmethod
    def run(
        self,
        levels: Sequence[Level],
        denoise: Denoise,
        noise_NCHW: Tensor,
        labels_N: Tensor | None = None,
        *,
        rng: ImageNoise | None = None,
    ) -> Tensor:
        """See `Timed.run`; `rng` is not used."""

"""Consistency parametrisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.models.base import call_network, per_image, sigma_per_image


@register("model", "consistency", source="arXiv:2303.01469, Eq. 5 and App. C")
@dataclass(frozen=True)
class Consistency:
    """Consistency function of Song et al. (2023): EDM's with f(x, sigma_min) = x exactly.

    Args:
        sigma_data: standard deviation of the training images, in pixel units of [-1, 1].
        sigma_min: noise level at which f is the identity (epsilon in the paper).
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ConfigError(
                f"model `consistency` has `sigma_data` {self.sigma_data}; it must be above 0. 0.5 is usual."
            )
        if not self.sigma_min > 0:
            raise ConfigError(
                f"model `consistency` has `sigma_min` {self.sigma_min}; it must be above 0. 0.002 is usual."
            )

    def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: float | Tensor, labels_N: Tensor | None = None) -> Tensor:
        """f(x, sigma), same shape and dtype as `x_NCHW`; the network sees ln(sigma) / 4 as its time."""
        sigma_N = sigma_per_image(sigma, x_NCHW)
        gap_N = sigma_N - self.sigma_min
        scale_N = (sigma_N**2 + self.sigma_data**2).rsqrt()
        c_skip_N = self.sigma_data**2 / (gap_N**2 + self.sigma_data**2)
        c_out_N = self.sigma_data * gap_N * scale_N
        output_NCHW = call_network(net, per_image(scale_N) * x_NCHW, sigma_N.log() / 4, labels_N)
        return (per_image(c_skip_N) * x_NCHW + per_image(c_out_N) * output_NCHW).to(x_NCHW.dtype)

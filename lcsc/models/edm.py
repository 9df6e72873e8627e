"""EDM preconditioning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.models.base import call_network, per_image, sigma_per_image


@register("model", "edm", source="arXiv:2206.00364, Eq. 7 and Table 1")
@dataclass(frozen=True)
class EDM:
    """Denoiser of Karras et al. (2022): D = c_skip x + c_out F(c_in x, c_noise).

    Args:
        sigma_data: standard deviation of the training images, in pixel units of [-1, 1].
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ConfigError(f"model `edm` has `sigma_data` {self.sigma_data}; it must be above 0. 0.5 is usual.")

    def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: float | Tensor, labels_N: Tensor | None = None) -> Tensor:
        """D(x; sigma), same shape and dtype as `x_NCHW`; the network sees ln(sigma) / 4 as its time."""
        sigma_N = sigma_per_image(sigma, x_NCHW)
        total_N = sigma_N**2 + self.sigma_data**2
        c_skip_N = self.sigma_data**2 / total_N
        c_out_N = sigma_N * self.sigma_data * total_N.rsqrt()
        output_NCHW = call_network(net, per_image(total_N.rsqrt()) * x_NCHW, sigma_N.log() / 4, labels_N)
        return (per_image(c_skip_N) * x_NCHW + per_image(c_out_N) * output_NCHW).to(x_NCHW.dtype)

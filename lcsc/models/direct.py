"""Networks that are denoisers already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lcsc.core.registry import register
from lcsc.models.base import call_network, sigma_per_image


@register("model", "direct", source="lcsc")
@dataclass(frozen=True)
class Direct:
    """The network's output is the denoised image; it sees sigma itself as its time."""

    def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: float | Tensor, labels_N: Tensor | None = None) -> Tensor:
        """`net(x, sigma).sample`, same shape and dtype as `x_NCHW`."""
        return call_network(net, x_NCHW, sigma_per_image(sigma, x_NCHW), labels_N)

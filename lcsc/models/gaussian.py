"""The ideal denoiser of Gaussian images, kept in the layout of diffusers: the toy on which everything is known.

It is none of diffusers' classes, as importing those takes longer than searching the toy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcsc.models.own_files import OwnFiles


class GaussianDenoiserOutput(NamedTuple):
    """`sample`: denoised images, shape (N, C, H, W)."""

    sample: Tensor


class GaussianDenoiser(OwnFiles, nn.Module):
    """E[clean | x] for clean ~ N(mean, diag(std^2)) and x = clean + sigma * unit normal.

    D(x; sigma) = mean + std^2 / (std^2 + sigma^2) (x - mean), linear-Gaussian regression (Bishop 2006, Eq. 2.116).

    Parameters `mean_CHW` and `std_CHW` (float32; only std^2 matters) start at 0 and 1. The network takes sigma
    itself as its time, so it belongs with the model `direct`.

    Args:
        shape: (C, H, W) of an image.
    """

    def __init__(self, shape: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__()
        self.shape = list(shape)
        self.mean_CHW = nn.Parameter(torch.zeros(*shape))
        self.std_CHW = nn.Parameter(torch.ones(*shape))

    @property
    def settings(self) -> dict[str, Any]:
        """See `OwnFiles.settings`."""
        return {"shape": self.shape}

    def forward(
        self, x_NCHW: Tensor, sigma: float | Tensor, class_labels: Tensor | None = None
    ) -> GaussianDenoiserOutput:
        """Denoise; `sigma` is one number or (N,). `class_labels` changes nothing: all classes are alike."""
        sigma_N111 = torch.as_tensor(sigma, dtype=x_NCHW.dtype, device=x_NCHW.device).reshape(-1, 1, 1, 1)
        variance_CHW = self.std_CHW**2
        gain_NCHW = variance_CHW / (variance_CHW + sigma_N111**2)
        return GaussianDenoiserOutput(sample=self.mean_CHW + gain_NCHW * (x_NCHW - self.mean_CHW))

"""What a model is: the rule that makes a denoiser of a network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from lcsc.core.errors import EvaluationError


class Model(Protocol):
    """Wraps a raw network into D(x; sigma), the estimate of the clean image."""

    def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: float | Tensor, labels_N: Tensor | None = None) -> Tensor:
        """Clean images, same shape and dtype as `x_NCHW` = clean + sigma * unit normal; `sigma` is a number or (N,)."""
        ...


def sigma_per_image(sigma: float | Tensor, x_NCHW: Tensor) -> Tensor:
    """`sigma` as a tensor of shape (N,), at least float32, on the images' device."""
    dtype = torch.promote_types(x_NCHW.dtype, torch.float32)
    return torch.as_tensor(sigma, dtype=dtype, device=x_NCHW.device).expand(len(x_NCHW))


def per_image(value_N: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1), to multiply images with."""
    return value_N.reshape(-1, 1, 1, 1)


def call_network(net: nn.Module, x_NCHW: Tensor, condition_N: Tensor, labels_N: Tensor | None) -> Tensor:
    """`net(x, condition).sample` in the network's own dtype, given back in the dtype of `x_NCHW`.

    Labels are passed as `class_labels`, and only when there are some: diffusers networks without a class
    embedding refuse the argument.

    Raises:
        EvaluationError: the network's output has another shape than its input.
    """
    dtype = getattr(net, "dtype", x_NCHW.dtype)
    labels = {} if labels_N is None else {"class_labels": labels_N}
    sample_NCHW = net(x_NCHW.to(dtype), condition_N, **labels).sample
    if sample_NCHW.shape != x_NCHW.shape:
        raise EvaluationError(
            f"network `{type(net).__name__}` returned shape {tuple(sample_NCHW.shape)} for images of shape "
            f"{tuple(x_NCHW.shape)}; a denoiser keeps the shape. Set its `out_channels` and `in_channels` alike."
        )
    return sample_NCHW.to(x_NCHW.dtype)

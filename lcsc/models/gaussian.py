"""The ideal denoiser of Gaussian images, kept in the layout of diffusers: the toy on which everything is known.

It is none of diffusers' classes, as importing those takes longer than searching the toy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

#: Name of the files of weights, as diffusers gives it; `suffix` numbers shards.
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"


class GaussianDenoiserOutput(NamedTuple):
    """`sample`: denoised images, shape (N, C, H, W)."""

    sample: Tensor


class GaussianDenoiser(nn.Module):
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

    def forward(
        self, x_NCHW: Tensor, sigma: float | Tensor, class_labels: Tensor | None = None
    ) -> GaussianDenoiserOutput:
        """Denoise; `sigma` is one number or (N,). `class_labels` changes nothing: all classes are alike."""
        sigma_N111 = torch.as_tensor(sigma, dtype=x_NCHW.dtype, device=x_NCHW.device).reshape(-1, 1, 1, 1)
        variance_CHW = self.std_CHW**2
        gain_NCHW = variance_CHW / (variance_CHW + sigma_N111**2)
        return GaussianDenoiserOutput(sample=self.mean_CHW + gain_NCHW * (x_NCHW - self.mean_CHW))

    def save_pretrained(self, folder: str, *, max_shard_size: str = "5GB", **_: Any) -> None:
        """Write config.json and safetensors shards into `folder`, as a network of diffusers does."""
        from huggingface_hub import save_torch_state_dict

        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, "shape": self.shape}
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_torch_state_dict(self.state_dict(), folder, filename_pattern=WEIGHTS, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, folder: str, *, output_loading_info: bool = False, **_: Any) -> Any:
        """The network in `folder`, in eval mode; in a pair with the missing and unexpected keys where these are wanted.

        Raises:
            OSError: no files of weights.
            Exception: what safetensors and torch raise for damaged ones, and for tensors of other shapes.
        """
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        net = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
        files = sorted(Path(folder).glob(WEIGHTS.format(suffix="*")))
        if not files:
            raise OSError(f"no {WEIGHTS.format(suffix='')}")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        missing, unexpected = net.load_state_dict(tensors, strict=False)
        info = {"missing_keys": missing, "unexpected_keys": unexpected}
        return (net.eval(), info) if output_loading_info else net.eval()

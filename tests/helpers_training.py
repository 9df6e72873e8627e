"""What the tests of the trainers share: a tiny network and training, and banks read back."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lcsc.datasets.gaussian import Gaussian
from lcsc.models.edm import EDM
from lcsc.training.diffusion import Diffusion

UNET: dict[str, Any] = {
    "class": "UNet2DModel",
    "config": {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [4, 4],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 2,
        "add_attention": False,
        "dropout": 0.1,
    },
}
TOY: dict[str, Any] = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
IMAGES = Gaussian(shape=[1, 4, 4], num_images=64)
SMALL = Diffusion(num_steps=12, batch_size=4, save_every=4)


def train(trainer: Any, out: Path, **changes: Any) -> Path:
    given = {"arch": UNET, "model": EDM(), "dataset": IMAGES, "seed": 3, "progress": False} | changes
    return trainer.train(out=out, **given)


def checkpoints(bank: Path) -> dict[str, dict[str, Tensor]]:
    files = sorted(bank.glob("checkpoint-*/unet/diffusion_pytorch_model.safetensors"))
    return {file.parts[-3]: load_file(file) for file in files}


def assert_same_bits(left: Path, right: Path) -> None:
    a, b = checkpoints(left), checkpoints(right)
    assert list(a) == list(b)
    assert len(a) > 0
    for name in a:
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    assert (left / "train_log.jsonl").read_bytes() == (right / "train_log.jsonl").read_bytes()


def tree(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.rglob("*")}


@dataclass(frozen=True)
class Raising(EDM):
    """Calls `action` in the n-th call of the network."""

    def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: Any, labels_N: Tensor | None = None) -> Tensor:
        CALLS.append(1)
        if len(CALLS) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return super().denoise(net, x_NCHW, sigma, labels_N)


CALLS: list[int] = []

"""Features of small grey images: a tiny classifier of handwritten digits whose weights ship with lcsc."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.metrics.base import require_images

#: The weights that `scripts/make_digits_detector.py` made.
WEIGHTS_PATH = Path(__file__).parent / "weights" / "digits.safetensors"
#: Scores from other weights do not compare, so nothing else is loaded.
WEIGHTS_SHA256 = "a3db0cdbe315e805d4d1a1b7c0a9b8f8f25e31e7d4132b794e9e3d2cb8179894"


class DigitsNet(nn.Module):
    """Classifier of 8x8 grey digits, 22,954 parameters, with 64 rectified features before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(128, 64)
        self.out = nn.Linear(64, 10)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Features, shape (N, 64), of images (N, 1, 8, 8) in [-1, 1]."""
        x = images_NCHW
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits of the ten digits, shape (N, 10)."""
        logits: Tensor = self.out(self.features(images_NCHW))
        return logits


def load_digits_net(path: Path = WEIGHTS_PATH, sha256: str = WEIGHTS_SHA256) -> DigitsNet:
    """The classifier with its shipped weights, frozen, in evaluation mode.

    Raises:
        ConfigError: the file is absent or is not the one with that SHA-256.
    """
    if not path.is_file():
        raise ConfigError(f"detector weights `{path}` are absent; they ship with lcsc. Install lcsc again.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ConfigError(
            f"detector weights `{path}` have SHA-256 {found}, not {sha256}: the file was altered, and its scores "
            "would not compare with anyone's. Install lcsc again."
        )
    net = DigitsNet()
    net.load_state_dict(safetensors.torch.load(data))
    return net.eval().requires_grad_(False)


@register("detector", "digits", source="lcsc, scripts/make_digits_detector.py")
@dataclass(frozen=True)
class DigitsDetector:
    """64 features of a small digit classifier shipped with lcsc, for grey 8x8 images."""

    name: ClassVar[str] = "digits"
    differentiable: ClassVar[bool] = True
    num_features: ClassVar[int] = 64

    @property
    def digest(self) -> str:
        """SHA-256 of the weights file; any other file is refused."""
        return WEIGHTS_SHA256

    @functools.cached_property
    def _net(self) -> DigitsNet:
        return load_digits_net()

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Shape (N, 64), float32; images are clamped to [-1, 1] first, as writing them to a file would.

        Raises:
            EvaluationError: not (N, 1, 8, 8), or NaN or Inf among the pixels.
            ConfigError: the shipped weights are absent or altered.
        """
        require_images(images_NCHW, self.name, "(N, 1, 8, 8)", tuple(images_NCHW.shape[1:]) == (1, 8, 8))
        return self._net.to(images_NCHW.device).features(images_NCHW.float().clamp(-1, 1))

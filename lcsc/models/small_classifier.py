"""A classifier of images so small that another network can write its weights. N = images, C = classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from lcsc.models.own_files import OwnFiles


class SmallClassifierOutput(NamedTuple):
    """`logits`: shape (N, C)."""

    logits: Tensor


class SmallClassifier(OwnFiles, nn.Module):
    """Linear layers with ReLU between them, on images averaged over squares of `pool` pixels.

    Args:
        shape: (channels, H, W) of an image.
        pool: side of a square; 1 takes the pixels as they are.
        hidden: units of each hidden layer; empty makes a linear softmax classifier.
        classes: C.
    """

    def __init__(
        self, shape: Sequence[int] = (1, 8, 8), pool: int = 2, hidden: Sequence[int] = (), classes: int = 10
    ) -> None:
        super().__init__()
        self.shape, self.pool, self.hidden, self.classes = list(shape), pool, list(hidden), classes
        channels, height, width = shape
        sizes = [channels * (height // pool) * (width // pool), *hidden, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    @property
    def settings(self) -> dict[str, Any]:
        """See `OwnFiles.settings`."""
        return {"shape": self.shape, "pool": self.pool, "hidden": self.hidden, "classes": self.classes}

    def features(self, x_NCHW: Tensor) -> Tensor:
        """What the first layer reads, shape (N, F)."""
        return nn.functional.avg_pool2d(x_NCHW, self.pool).flatten(1)

    def forward(self, x_NCHW: Tensor) -> SmallClassifierOutput:
        """Logits of images in [-1, 1]."""
        x = self.features(x_NCHW)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else nn.functional.relu(x))
        return SmallClassifierOutput(x)

"""The state of a metric that needs the features themselves, not sums of them. N images, D features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureState:
    """Features in the chunks they came in, each of shape (n, D), in the metric's dtype."""

    chunks: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(chunk.shape[0] for chunk in self.chunks)

    @property
    def width(self) -> int | None:
        """D; None before the first image."""
        return self.chunks[0].shape[1] if self.chunks else None

    def features(self) -> Tensor:
        """All features, shape (N, D)."""
        return torch.cat(self.chunks)

"""Pixels as features: for data whose distance is known in closed form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lcsc.core.registry import register
from lcsc.metrics.base import require_images


@register("detector", "pixels", source="lcsc")
@dataclass(frozen=True)
class PixelDetector:
    """The pixels themselves, flattened and not clamped; exact on Gaussian data, no measure of image quality."""

    name: ClassVar[str] = "pixels"
    differentiable: ClassVar[bool] = True
    #: C*H*W of whatever images come.
    num_features: ClassVar[int] = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the name: there are no weights."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Shape (N, C*H*W), float32.

        Raises:
            EvaluationError: not NCHW, or NaN or Inf among the pixels.
        """
        require_images(images_NCHW, self.name, "(N, C, H, W)", images_NCHW.ndim == 4)
        return images_NCHW.flatten(1).float()

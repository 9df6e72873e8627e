"""Scans of handwritten digits that come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcsc.core.registry import register


@register("dataset", "digits", source="scikit-learn load_digits; Alpaydin and Kaynak 1998, doi:10.24432/C50P49")
@dataclass(frozen=True)
class Digits:
    """1,797 real 8x8 grey scans, inside the scikit-learn wheel."""

    @property
    def name(self) -> str:
        """Short name for tables and titles."""
        return "digits"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (1, 8, 8)

    def images(self) -> Tensor:
        """All scans, shape (1797, 1, 8, 8), float32 in [-1, 1]: the 17 grey levels 0..16 over 8, minus 1."""
        return self._scans[0]

    def labels(self) -> Tensor:
        """The digit on each scan, shape (1797,), int64."""
        return self._scans[1]

    @cached_property
    def _scans(self) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        data = load_digits()
        return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target).long()

"""What a dataset is: named images of one shape."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Dataset(Protocol):
    """Images in memory, in a fixed order."""

    @property
    def name(self) -> str:
        """Short name for tables and titles."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def images(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1]; made once, not to be written to."""
        ...

    def labels(self) -> Tensor | None:
        """Class of each image, shape (N,), int64; None when the data set has none."""
        ...

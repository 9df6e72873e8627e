"""What the data sets that read files share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from lcsc.datasets.images import check_resize


@dataclass(frozen=True)
class FileDataset:
    """Images under `path`, read once when they are first asked for; a subclass writes `read`.

    Args:
        path: the file or folder.
        resize: side of the square images to make (centre crop, antialiased), or None to keep the size.
    """

    path: str
    resize: int | None = None

    #: name the subclass is registered under, for messages
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_resize(self.resize, self.kind)

    @property
    def name(self) -> str:
        """Short name for tables and titles: the file's."""
        return Path(self.path).stem

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); reads the files."""
        channels, height, width = self._all[0].shape[1:]
        return (channels, height, width)

    def images(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1]; raises what `read` raises."""
        return self._all[0]

    def labels(self) -> Tensor | None:
        """Class of each image, shape (N,), int64; None where there are none, and the reference is cut at random."""
        return self._all[1]

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Read all images, shape (N, C, H, W), float32 in [-1, 1], and their classes, shape (N,), int64, or None."""
        raise NotImplementedError

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor | None]:
        return self.read()

"""Images from a folder of files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lcsc.core.registry import register
from lcsc.datasets.images import check_resize, decode, existing

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


@register("dataset", "image_folder", source="Pillow")
@dataclass(frozen=True)
class ImageFolder:
    """Every image file under a folder, subfolders included, in the order of the sorted relative names.

    Args:
        path: the folder.
        resize: side of the square images to make (centre crop, antialiased), or None if all have one size.
    """

    path: str
    resize: int | None = None

    def __post_init__(self) -> None:
        check_resize(self.resize, "image_folder")

    @property
    def name(self) -> str:
        """Short name for tables and titles: the folder's."""
        return Path(self.path).name

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); reads the files."""
        channels, height, width = self._images.shape[1:]
        return (channels, height, width)

    def images(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1].

        Raises:
            ConfigError: no such folder, no image in it, an unreadable file, or sizes that differ without `resize`.
        """
        return self._images

    def labels(self) -> None:
        """None: labels are not read, so the reference is cut at random."""
        return

    @cached_property
    def _images(self) -> Tensor:
        folder = existing(self.path, "image_folder", folder=True)
        files = sorted(
            (f.relative_to(folder).as_posix(), f)
            for f in folder.rglob("*")
            if f.suffix.lower() in SUFFIXES and f.is_file()
        )
        return decode(files, self.resize, "image_folder")

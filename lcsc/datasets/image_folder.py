"""Images from a folder of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lcsc.core.registry import register
from lcsc.datasets.files import FileDataset
from lcsc.datasets.images import decode, existing

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


@register("dataset", "image_folder", source="Pillow")
@dataclass(frozen=True)
class ImageFolder(FileDataset):
    """Every image file under a folder, subfolders included, in the order of the sorted relative names.

    Args:
        path: the folder.
        resize: side of the square images to make (centre crop, antialiased), or None if all have one size.
    """

    kind: ClassVar[str] = "image_folder"

    def read(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1].

        Raises:
            ConfigError: no such folder, no image in it, an unreadable file, or sizes that differ without `resize`.
        """
        folder = existing(self.path, "image_folder", folder=True)
        files = sorted(
            (f.relative_to(folder).as_posix(), f)
            for f in folder.rglob("*")
            if f.suffix.lower() in SUFFIXES and f.is_file()
        )
        return decode(files, self.resize, "image_folder")

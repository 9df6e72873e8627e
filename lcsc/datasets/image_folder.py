"""Images from a folder of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from lcsc.core.registry import register
from lcsc.datasets.files import FileDataset
from lcsc.datasets.images import decode, existing
from lcsc.datasets.labels import class_numbers

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


@register("dataset", "image_folder", source="Pillow")
@dataclass(frozen=True)
class ImageFolder(FileDataset):
    """Every image file under a folder, subfolders included, in the order of the sorted relative names.

    Args:
        path: the folder.
        resize: side of the square images to make (centre crop, antialiased), or None if all have one size.
        subfolder_labels: whether the first subfolder an image lies in is its class; that needs at least two of them
            and no image beside them.
    """

    subfolder_labels: bool = True

    kind: ClassVar[str] = "image_folder"

    def read(self) -> tuple[Tensor, Tensor | None]:
        """All images, shape (N, C, H, W), float32 in [-1, 1], and their classes, numbered in the folders' sorted order.

        Raises:
            ConfigError: no such folder, no image in it, an unreadable file, or sizes that differ without `resize`.
        """
        folder = existing(self.path, "image_folder", folder=True)
        files = sorted(
            (f.relative_to(folder).as_posix(), f)
            for f in folder.rglob("*")
            if f.suffix.lower() in SUFFIXES and f.is_file()
        )
        images_NCHW = decode(files, self.resize, "image_folder")
        parents = [name.split("/")[0] if "/" in name else "" for name, _ in files]
        if not self.subfolder_labels or "" in parents or len(set(parents)) < 2:
            return images_NCHW, None
        return images_NCHW, class_numbers(np.array(parents), len(files), f"`{folder}`")

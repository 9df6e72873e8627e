"""Images from a numpy archive."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.datasets.files import FileDataset
from lcsc.datasets.images import existing, resize_square, to_nchw, to_unit_range
from lcsc.datasets.labels import AUTO, choose_images, choose_labels, class_numbers

#: What numpy and zipfile raise for archives that are damaged, encrypted, packed in a way they do not know, or none.
FAULTS = (OSError, ValueError, AttributeError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@register("dataset", "npz", source="numpy .npz, NEP 1")
@dataclass(frozen=True)
class Npz(FileDataset):
    """One array of an .npz file, uint8 or floats in [0, 1] or [-1, 1], NHW, NHWC or NCHW, with labels if it has some.

    Args:
        path: the file.
        resize: side of the square images to make (centre crop, antialiased), or None to keep the size.
        key: name of the array of images; `auto` takes `images`, or else the only array with 3 or 4 axes.
        labels_key: name of the array of labels, (N,); `auto` takes the one with a usual name, None reads none.
    """

    key: str = AUTO
    labels_key: str | None = AUTO

    kind: ClassVar[str] = "npz"

    def read(self) -> tuple[Tensor, Tensor | None]:
        """All images, shape (N, C, H, W), float32 in [-1, 1], and their classes, shape (N,), int64, or None.

        Raises:
            ConfigError: no such file or key, an array that is no image array, or labels that do not fit the images.
        """
        path = existing(self.path, "npz")
        try:
            with np.load(path, allow_pickle=False) as archive:
                # whatever else lies in the archive, such as a readme, is no array
                names = [name.removesuffix(".npy") for name in archive.zip.namelist() if name.endswith(".npy")]
                fitting = ["images"] if "images" in names else [n for n in names if _num_axes(archive, n) in (3, 4)]
                key = choose_images(self.key, names, fitting, what="array", setting="key", where=f"`{path}`")
                rest = [name for name in names if name != key]
                labels_key = choose_labels(self.labels_key, rest, what="array", setting="labels_key", where=f"`{path}`")
                array = archive[key]
                labels = None if labels_key is None else archive[labels_key]
        except ConfigError:
            raise
        except FAULTS as error:
            raise ConfigError(f"cannot read `{path}` as an .npz archive: {error}. Save it with numpy.savez.") from error
        where = f"array `{key}` of `{path}`"
        images_NCHW = to_nchw(to_unit_range(array, where), where)
        if self.resize is not None:
            images_NCHW = resize_square(images_NCHW, self.resize)
        if labels is None:
            return images_NCHW, None
        return images_NCHW, class_numbers(labels, len(images_NCHW), f"array `{labels_key}` of `{path}`")


def _num_axes(archive: np.lib.npyio.NpzFile, name: str) -> int | None:
    """Axes of an array by its header alone; None for headers of numpy's version 3 (structured types)."""
    with archive.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            return len(np.lib.format.read_array_header_1_0(member)[0])
        return len(np.lib.format.read_array_header_2_0(member)[0]) if version == (2, 0) else None

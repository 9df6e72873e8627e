"""Images from a numpy archive."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.datasets.files import FileDataset
from lcsc.datasets.images import existing, resize_square, to_nchw, to_unit_range


@register("dataset", "npz", source="numpy .npz, NEP 1")
@dataclass(frozen=True)
class Npz(FileDataset):
    """One array of an .npz file: uint8, or floats in [0, 1] or [-1, 1]; NHW, NHWC or NCHW.

    Args:
        path: the file.
        key: name of the array in it.
        resize: side of the square images to make (centre crop, antialiased), or None to keep the size.
    """

    key: str = "images"

    kind: ClassVar[str] = "npz"

    def read(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1].

        Raises:
            ConfigError: no such file or key, or an array that is no image array.
        """
        path = existing(self.path, "npz")
        try:
            with np.load(path, allow_pickle=False) as archive:
                if self.key not in archive.files:
                    raise ConfigError(f"`{path}` has no array `{self.key}`.{did_you_mean(self.key, archive.files)}")
                array = archive[self.key]
        except ConfigError:
            raise
        except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"cannot read `{path}` as an .npz archive: {error}. Save it with numpy.savez.") from error
        where = f"array `{self.key}` of `{path}`"
        images_NCHW = to_nchw(to_unit_range(array, where), where)
        return images_NCHW if self.resize is None else resize_square(images_NCHW, self.resize)

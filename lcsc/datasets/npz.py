"""Images from a numpy archive."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.datasets.images import check_resize, existing, resize_square, to_nchw, to_unit_range


@register("dataset", "npz", source="numpy .npz, NEP 1")
@dataclass(frozen=True)
class Npz:
    """One array of an .npz file: uint8, or floats in [0, 1] or [-1, 1]; NHW, NHWC or NCHW.

    Args:
        path: the file.
        key: name of the array in it.
        resize: side of the square images to make (centre crop, antialiased), or None to keep the size.
    """

    path: str
    key: str = "images"
    resize: int | None = None

    def __post_init__(self) -> None:
        check_resize(self.resize, "npz")

    @property
    def name(self) -> str:
        """Short name for tables and titles: the file's."""
        return Path(self.path).stem

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); reads the file."""
        channels, height, width = self._images.shape[1:]
        return (channels, height, width)

    def images(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1].

        Raises:
            ConfigError: no such file or key, or an array that is no image array.
        """
        return self._images

    def labels(self) -> None:
        """None: labels are not read, so the reference is cut at random."""
        return

    @cached_property
    def _images(self) -> Tensor:
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

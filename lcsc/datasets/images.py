"""From arrays and encoded files to float32 NCHW in [-1, 1]; shared by the datasets that read files."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lcsc.core.errors import ConfigError

CHANNELS = (1, 3, 4)


def existing(path: str, dataset: str, *, folder: bool = False) -> Path:
    """`path` as a Path, `~` expanded; raises `ConfigError` if it is not a file (or a folder)."""
    found = Path(path).expanduser()
    if not (found.is_dir() if folder else found.is_file()):
        kind = "folder" if folder else "file"
        raise ConfigError(f"dataset `{dataset}` found no {kind} `{path}`. Give the path of a {kind} in `dataset.path`.")
    return found


def check_resize(resize: int | None, dataset: str) -> None:
    """Raise `ConfigError` unless `resize` is None or a positive side length."""
    if resize is not None and resize < 1:
        raise ConfigError(f"dataset `{dataset}` has `resize` {resize}; give a side of at least 1 pixel, or null.")


def to_unit_range(array: np.ndarray, where: str) -> Tensor:
    """Pixels as float32 in [-1, 1], same shape.

    uint8 is mapped linearly (0 -> -1, 255 -> 1). Floats without a negative value must lie in [0, 1] and are mapped
    likewise; floats with one must lie in [-1, 1] and are kept.

    Raises:
        ConfigError: another dtype, NaN or values outside.
    """
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32)) / 127.5 - 1
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(
            f"{where} holds {array.dtype}; images are uint8 or floats in [0, 1] or [-1, 1]. Convert them."
        )
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= -1 and high <= 1):  # also catches NaN
        raise ConfigError(f"{where} holds floats in [{low}, {high}]; allowed are [0, 1] and [-1, 1]. Rescale them.")
    images = torch.from_numpy(array.astype(np.float32))
    return images if low < 0 else images * 2 - 1


def to_nchw(images: Tensor, where: str) -> Tensor:
    """NHW, NHWC or NCHW as NCHW; where both channel places would do, the last one is taken."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in CHANNELS:
        return images.permute(0, 3, 1, 2).contiguous()
    if images.ndim == 4 and images.shape[1] in CHANNELS:
        return images
    raise ConfigError(f"{where} has shape {tuple(images.shape)}; images are NHW, NHWC or NCHW with 1, 3 or 4 channels.")


def resize_square(images_NCHW: Tensor, side: int) -> Tensor:
    """Centre crop to a square, then antialiased bilinear resize; shape (N, C, side, side), in [-1, 1]."""
    height, width = images_NCHW.shape[2:]
    crop = min(height, width)
    top, left = (height - crop) // 2, (width - crop) // 2
    square_NCHW = images_NCHW[:, :, top : top + crop, left : left + crop]
    if crop == side:
        return square_NCHW.contiguous()
    resized_NCHW = functional.interpolate(square_NCHW, size=(side, side), mode="bilinear", antialias=True)
    return resized_NCHW.clamp(-1, 1)  # rounding may leave the range by an ulp


def decode(sources: Iterable[tuple[str, bytes | Path]], resize: int | None, dataset: str) -> Tensor:
    """Encoded images (PNG, JPEG, ...), given as (name, bytes or path), as one batch.

    Greyscale files stay grey unless they stand among coloured ones; alpha is dropped.

    Raises:
        ConfigError: no image, a file that is none, or shapes that differ while `resize` is None.
    """
    from PIL import Image

    rows: list[Tensor] = []
    for name, source in sources:
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"dataset `{dataset}` cannot read `{name}` as an image: {error}. Remove it.") from error
        row = to_unit_range(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), name)
        rows.append(row if resize is None else resize_square(row[None], resize)[0])
        if row.shape[1:] != rows[0].shape[1:] and resize is None:
            raise ConfigError(
                f"dataset `{dataset}` has images of different size: the first is {tuple(rows[0].shape[1:])}, "
                f"`{name}` is {tuple(row.shape[1:])}. Set `resize` to bring them to one square size."
            )
    if not rows:
        raise ConfigError(f"dataset `{dataset}` holds no image. Check `dataset.path`.")
    channels = max(len(row) for row in rows)
    return torch.stack([row.expand(channels, -1, -1) for row in rows])

"""Halves of a dataset: one to search against, the other to report against."""

from __future__ import annotations

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.seeds import Purpose, SeedRange


def split_halves(num_images: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint sorted int64 indices (search half, report half) that cover range(num_images).

    They depend on the two arguments alone; with an odd number the report half has one more.

    Raises:
        ConfigError: fewer than 2 images.
    """
    if num_images < 2:
        raise ConfigError(f"cannot split {num_images} image(s) into two halves; give at least 2.")
    order = SeedRange(split_seed, Purpose.SPLIT).generator().permutation(num_images)
    half = num_images // 2
    return np.sort(order[:half]), np.sort(order[half:])

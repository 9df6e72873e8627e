"""Halves of a dataset: one to search against, the other to report against."""

from __future__ import annotations

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.seeds import Purpose, SeedRange


def split_halves(num_images: int, split_seed: int, labels_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint sorted int64 indices (search half, report half) that cover range(num_images).

    Where labels are known the cut is stratified: both halves hold every class in equal number, give or take one.
    Two random halves of scikit-learn's digits are a Fréchet distance of 14 apart on average, stratified ones 6
    (docs/log.md), and that distance is the noise floor of every score.

    Args:
        num_images: N.
        split_seed: of the cut; with an odd number the report half has one more.
        labels_N: class of each image, shape (N,); None when there are none.

    Raises:
        ConfigError: fewer than 2 images.
    """
    if num_images < 2:
        raise ConfigError(f"cannot split {num_images} image(s) into two halves; give at least 2.")
    order = SeedRange(split_seed, Purpose.SPLIT).generator().permutation(num_images)
    if labels_N is None:
        half = num_images // 2
        return np.sort(order[:half]), np.sort(order[half:])
    order = order[np.argsort(labels_N[order], kind="stable")]  # class by class, random inside a class
    return np.sort(order[1::2]), np.sort(order[::2])  # dealing one by one keeps classes and totals even


def split_three(
    num_images: int, split_seed: int, labels_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint sorted int64 indices to train on (half), to search against and to report against (a quarter each).

    Cut twice as by `split_halves`, stratified where labels are known.

    Raises:
        ConfigError: fewer than 4 images.
    """
    if num_images < 4:
        raise ConfigError(f"cannot split {num_images} image(s) into three parts; give at least 4.")
    train, rest = split_halves(num_images, split_seed, labels_N)
    search, report = split_halves(len(rest), split_seed, None if labels_N is None else labels_N[rest])
    return train, rest[search], rest[report]

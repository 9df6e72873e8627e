"""Random numbers that depend on (seed, purpose, image index, stream) and on nothing else.

Philox is counter-based (Salmon et al., 2011): the key holds the seed and the purpose, the counter holds
image index and stream. So image 17 gets the same noise whatever the batch size, the number of devices or
the order of evaluation, and the search, select and report ranges cannot overlap: their keys differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from lcsc.core.errors import ConfigError


class Purpose(IntEnum):
    """What a range of seeds is used for; ranges of different purposes are disjoint by construction."""

    SEARCH = 1
    SELECT = 2
    REPORT = 3
    TRAIN = 4
    SPLIT = 5
    BOOTSTRAP = 6
    SEARCHER = 7
    RECHECK = 8
    FRESH = 9


@dataclass(frozen=True)
class SeedRange:
    """The random streams of one seed for one purpose."""

    seed: int
    purpose: Purpose

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"`seed` is {self.seed}; it must lie in [0, 2**64).")

    def generator(self, index: int = 0, stream: int = 0) -> np.random.Generator:
        """The generator of item `index` (an image, a training step, ...) and `stream` (a sampler step, ...)."""
        key = np.array([self.seed, int(self.purpose)], dtype=np.uint64)
        counter = np.array([0, 0, index, stream], dtype=np.uint64)  # the low 128 bits are the draws themselves
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def normal(self, indices: Sequence[int] | range, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
        """Standard normal float32, shape (len(indices), *shape), one independent stream per index."""
        out = np.empty((len(indices), *shape), dtype=np.float32)
        for row, index in enumerate(indices):
            self.generator(index, stream).standard_normal(out=out[row], dtype=np.float32)
        return out


@dataclass(frozen=True)
class ImageNoise:
    """The noise of a run of images: what a sampler gets as `rng`."""

    seeds: SeedRange
    indices: range

    def normal(self, shape_chw: tuple[int, ...], stream: int = 0) -> np.ndarray:
        """Standard normal float32, shape (len(indices), *shape_chw). Stream 0 is the initial noise."""
        return self.seeds.normal(self.indices, shape_chw, stream)

"""Noise of image i depends on (seed, purpose, i, stream) alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from lcsc.core.errors import ConfigError
from lcsc.core.seeds import ImageNoise, Purpose, SeedRange


def test_noise_is_the_same_in_any_batching():
    seeds = SeedRange(3, Purpose.SEARCH)
    whole = seeds.normal(range(10), (2, 3))
    parts = [seeds.normal(range(7, 10), (2, 3)), seeds.normal(range(0, 7), (2, 3))]
    assert np.array_equal(whole, np.concatenate([parts[1], parts[0]]))
    assert np.array_equal(ImageNoise(seeds, range(4, 6)).normal((2, 3)), whole[4:6])


def test_purposes_seeds_images_and_streams_never_meet():
    draws = {}
    for seed, purpose, image, stream in itertools.product((0, 1), Purpose, (0, 1), (0, 1)):
        values = SeedRange(seed, purpose).normal([image], (4,), stream).tobytes()
        assert values not in draws, (seed, purpose, image, stream, draws[values])
        draws[values] = (seed, purpose, image, stream)
    assert len(draws) == 2 * len(Purpose) * 4


def test_noise_is_standard_normal():
    sample = SeedRange(0, Purpose.REPORT).normal(range(500), (40,)).ravel()
    assert stats.kstest(sample, "norm").pvalue > 0.01


def test_golden_draw():
    values = SeedRange(0, Purpose.SEARCH).normal([17], (3,))[0]
    again = np.random.Generator(
        np.random.Philox(key=np.array([0, 1], np.uint64), counter=np.array([0, 0, 17, 0], np.uint64))
    ).standard_normal(3, dtype=np.float32)
    assert np.array_equal(values, again)


def test_seed_range_is_checked():
    with pytest.raises(ConfigError, match=r"`seed` is -1; it must lie in \[0, 2\*\*64\)"):
        SeedRange(-1, Purpose.SEARCH)

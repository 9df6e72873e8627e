"""The checksum is the two sums it says, and no single flipped bit or swapped pair of words escapes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc.kernels.checksum import checksum


def definition(data: bytes) -> tuple[int, int]:
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    return sum(words) % 2**64, sum((i + 1) * word for i, word in enumerate(words)) % 2**64


@settings(deadline=None)  # the first call compiles
@given(st.binary(max_size=300))
def test_it_is_the_definition(data):
    assert checksum(np.frombuffer(data, np.uint8)) == definition(data)


def test_large_words_do_not_overflow_silently():
    bits = np.full(2**18, 0xFFFFFFFF, np.uint32)
    assert checksum(bits) == definition(bits.tobytes())


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint16, np.uint8, np.int64])
def test_every_dtype_is_its_bytes(dtype):
    bits = np.arange(37).astype(dtype)
    assert checksum(bits) == definition(bits.tobytes())
    assert checksum(bits.reshape(1, 37)) == definition(bits.tobytes())


def test_flips_and_swaps_are_noticed():
    data = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8)
    sums = {checksum(data)}
    for bit in range(8 * data.size):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        sums.add(checksum(flipped))
    words = data.view(np.uint32)
    for i in range(16):
        for j in range(i):
            swapped = words.copy()
            swapped[[i, j]] = swapped[[j, i]]
            sums.add(checksum(swapped))
    assert len(sums) == 1 + 8 * 64 + 120


def test_strided_arrays_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        checksum(np.zeros((4, 4))[:, :2])

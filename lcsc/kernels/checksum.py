"""A checksum at the speed of memory: two sums over the words of a block of bytes, as in Fletcher's checksum.

    a = sum_i w_i        b = sum_i (i + 1) w_i        (mod 2^64, over little-endian words of 32 bits, i from 0)

`a` notices every change of a single word, `b` also words that changed places. zlib's CRC-32 takes three times as long
as the combination of the same bytes; this takes a fraction. It guards against damage, not against forgery.
Source: J. G. Fletcher, "An arithmetic checksum for serial transmissions", IEEE Trans. Commun. 30 (1982), with sums
that are wide enough to need no modulus for blocks of less than 2^31 words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def _sums(words: Any) -> Any:
    a = b = np.uint64(0)
    for i in range(len(words)):
        word = np.uint64(words[i])
        a += word
        b += np.uint64(np.uint32(i + 1)) * word
    return a, b


def checksum(bits: np.ndarray) -> tuple[int, int]:
    """The two sums of a contiguous array's bytes, padded with zeros to whole words.

    Raises:
        ValueError: 2^33 bytes or more, or not contiguous.
    """
    if not bits.flags.c_contiguous or bits.nbytes >= 2**33:
        raise ValueError("a checksum needs a contiguous array of less than 2^33 bytes.")
    flat = bits.reshape(-1).view(np.uint8)
    even = flat.size - flat.size % 4
    a, b = _sums(flat[:even].view(np.uint32))
    if even < flat.size:
        last = int.from_bytes(flat[even:].tobytes(), "little")
        a, b = int(a) + last, int(b) + (even // 4 + 1) * last
    return int(a) % 2**64, int(b) % 2**64

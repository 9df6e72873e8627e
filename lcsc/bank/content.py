"""What a checkpoint holds as one digest, whatever file format it came in.

A tensor is cut into chunks of `CHUNK` elements in C order; each chunk's bits have a checksum
(`lcsc.kernels.checksum`). The digest of a checkpoint covers names, dtypes, shapes and these sums, so that any pass
over the numbers can collect it on its way. It guards against damage and mix-ups, not against forgery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lcsc.core.digests import value_digest

#: elements of one chunk
CHUNK = 2**17


def sum_text(a: int, b: int) -> str:
    """A chunk's two sums as 32 hexadecimal digits."""
    return f"{a:016x}{b:016x}"


def chunk_sums(bits: np.ndarray) -> list[str]:
    """Checksum of every chunk of a tensor's raw bits (little-endian, C order); none for an empty tensor."""
    from lcsc.kernels.checksum import checksum

    flat = np.ascontiguousarray(bits).reshape(-1)
    return [sum_text(*checksum(flat[start : start + CHUNK])) for start in range(0, flat.size, CHUNK)]


def content_digest(tensors: Mapping[str, tuple[str, Sequence[int], Sequence[str]]]) -> str:
    """Hex SHA-256 over `name -> (dtype, shape, chunk sums)`; the order of the names does not matter."""
    rows = [[name, dtype, list(shape), list(sums)] for name, (dtype, shape, sums) in tensors.items()]
    return value_digest(sorted(rows))

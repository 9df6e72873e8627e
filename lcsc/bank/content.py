"""What a checkpoint holds as one digest, whatever file format it came in.

A tensor is cut into chunks of `CHUNK` elements in C order; each chunk's bits have a checksum
(`lcsc.kernels.checksum`). The digest of a checkpoint covers names, dtypes, shapes and these sums, so that any pass
over the numbers can collect it on its way. It guards against damage and mix-ups, not against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lcsc.core.digests import value_digest

#: elements of one chunk
CHUNK = 2**17
_Label = TypeVar("_Label")


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


def same_bits(contents: Iterable[tuple[_Label, str]]) -> tuple[tuple[_Label, ...], ...]:
    """Labels whose digests are equal, two or more each, in their order."""
    same: dict[str, list[_Label]] = {}
    for label, digest in contents:
        same.setdefault(digest, []).append(label)
    return tuple(tuple(labels) for labels in same.values() if len(labels) > 1)


def duplicates_text(found: Sequence[Sequence[Any]]) -> str:
    """What `same_bits` found, as a sentence."""
    few = "; ".join(" = ".join(map(str, labels[:4])) for labels in found[:4])
    return f"duplicates, steps with the same bits: {few}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def duplicates_note(parents: Iterable[Mapping[str, Any]]) -> list[str]:
    """One sentence where some of the parents (`CheckpointBank.parent`, with `rate`) are the same bits, else none."""
    contents = {(p["step"], p.get("rate") or ""): str(p["content"]) for p in parents}
    found = same_bits((f"{s} ({rate})" if rate else str(s), digest) for (s, rate), digest in sorted(contents.items()))
    return [duplicates_text(found)] if found else []

"""Where a checkpoint's tensors lie: bytes in files. Every format is read through this one description.

Nothing here imports torch: half-precision numbers that numpy lacks travel as their raw bits (`bfloat16` as uint16).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lcsc.core.dtypes import FLOATS, ITEMSIZE, raw_dtype
from lcsc.core.errors import BankError

#: dtypes are told in `lcsc.core.dtypes`, and taken from here as well
__all__ = [
    "FLOATS",
    "ITEMSIZE",
    "Piece",
    "Source",
    "Table",
    "cut_source",
    "pread_into",
    "raw_dtype",
    "read_source",
    "whole_rows",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one file that hold a tensor or a rectangular part of it.

    Args:
        part: which of the checkpoint's files, an index into `Checkpoint.files`.
        offset: first byte, counted from the start of the file.
        shape: shape of the part.
        stride: elements to the next index along each axis; None means C order without gaps.
        at: where the part begins in the whole tensor; None means that it is the whole tensor.
    """

    part: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    at: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor: dtype name, shape and the pieces that make it up (one, unless it was saved in parts)."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor without gaps."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def plain(self) -> bool:
        """Whether it is one piece in C order, so that any range of it is one range of the file."""
        return len(self.pieces) == 1 and self.pieces[0].stride is None and self.pieces[0].at is None

    @property
    def runs(self) -> list[tuple[int, Piece]] | None:
        """First element and piece, in order, where each piece is one run of the tensor in C order; None where not."""
        if self.plain:
            return [(0, self.pieces[0])]
        found, start = [], 0
        for piece in sorted(self.pieces, key=lambda piece: piece.at or ()):
            at = piece.at or (0,) * len(self.shape)
            if piece.stride is not None or any(at[1:]) or piece.shape[1:] != self.shape[1:]:
                return None
            found.append((start, piece))
            start += math.prod(piece.shape)
        return found if start == self.numel else None


def whole_rows(source: Source, a: int, b: int) -> tuple[int, int]:
    """Elements [a, b) widened to what `cut_source` can cut: nothing more where the tensor lies in runs, else rows."""
    if not source.shape or source.runs is not None:
        return a, b
    width = max(1, math.prod(source.shape[1:]))
    return a // width * width, -(-b // width) * width


def cut_source(source: Source, a: int, b: int) -> Source:
    """Elements [a, b) of a tensor, not empty and as `whole_rows` gives them, as a tensor of their own."""
    if not source.shape or (a, b) == (0, source.numel):
        return source
    size, pieces = ITEMSIZE[source.dtype], []
    if (runs := source.runs) is not None:
        for first, piece in runs:
            low, high = max(a, first), min(b, first + math.prod(piece.shape))
            if low < high:
                offset = piece.offset + (low - first) * size
                pieces.append(Piece(piece.part, offset, (high - low,), at=(low - a,)))
        whole = len(pieces) == 1
        return Source(source.dtype, (b - a,), (replace(pieces[0], at=None),) if whole else tuple(pieces))
    width = math.prod(source.shape[1:])
    first_row, last_row = a // width, b // width
    for piece in source.pieces:
        at = piece.at or (0,) * len(source.shape)
        low, high = max(first_row, at[0]), min(last_row, at[0] + piece.shape[0])
        if low >= high:
            continue
        step = math.prod(piece.shape[1:]) if piece.stride is None else piece.stride[0]
        offset, shape = piece.offset + (low - at[0]) * step * size, (high - low, *piece.shape[1:])
        place = None if piece.at is None else (low - first_row, *at[1:])
        pieces.append(Piece(piece.part, offset, shape, piece.stride, place))
    return Source(source.dtype, (last_row - first_row, *source.shape[1:]), tuple(pieces))


#: tensors of a checkpoint by the name they have in it
Table = Mapping[str, Source]


def pread_into(fd: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    """Fill a contiguous array from a file at an offset; raises BankError when the file ends before."""
    view = buffer.data.cast("B")
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise BankError(
                f"`{path}` ended {len(view) - done} bytes early at byte {offset + done}: it changed after it was "
                "scanned. Leave the bank alone while it is read, or copy the file again."
            )
        done += got


def read_source(files: Sequence[Path], source: Source, base: int = 0, out: np.ndarray | None = None) -> np.ndarray:
    """The whole tensor as raw bits, shape `source.shape`, dtype `raw_dtype(source.dtype)`.

    `base` is added to every offset; `out` receives the bits where it is given.
    """
    if out is None:
        out = np.empty(source.shape, raw_dtype(source.dtype))
    for piece in source.pieces:
        path = files[piece.part]
        fd = os.open(path, os.O_RDONLY)
        try:
            part = _read_piece(fd, path, piece, out.dtype, base)
        finally:
            os.close(fd)
        if piece.at is None:
            out[...] = part
        else:
            out[tuple(slice(a, a + n) for a, n in zip(piece.at, piece.shape, strict=True))] = part
    return out


def _read_piece(fd: int, path: Path, piece: Piece, dtype: np.dtype, base: int) -> np.ndarray:
    if piece.stride is None:
        part = np.empty(piece.shape, dtype)
        pread_into(fd, part.reshape(-1), base + piece.offset, path)
        return part
    if 0 in piece.shape:
        return np.empty(piece.shape, dtype)
    span = 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.stride, strict=True))
    flat = np.empty(span, dtype)
    pread_into(fd, flat, base + piece.offset, path)
    strides = tuple(s * dtype.itemsize for s in piece.stride)
    return np.lib.stride_tricks.as_strided(flat, piece.shape, strides, writeable=False)

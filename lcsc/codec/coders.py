"""Bytes as streams: the smallest of a few lossless coders. N = symbols, C = contexts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcsc.codec.container import Stream
from lcsc.core.errors import not_installed

#: a coder has to save this share of the bytes, or they are stored as they are
LEAST_GAIN = 0.02
#: bytes that zstd tries before it is given all
_SAMPLE = 1 << 16
_LEVEL = 3


class Wrong(Exception):
    """What is wrong with a stream, as the middle of a sentence."""


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise not_installed("A coded bank", "zstandard", "codec") from None
    return zstandard


def entropy_bits(counts_CS: np.ndarray) -> float:
    """Bits that symbols of these counts, shape (C, S), take at least, given their contexts."""
    counts = counts_CS[counts_CS > 0].astype(np.float64)
    totals = counts_CS.sum(1, dtype=np.float64)
    totals = totals[totals > 0]
    return float((totals * np.log2(totals)).sum() - (counts * np.log2(counts)).sum())


def count(data_N: np.ndarray, ctx_N: np.ndarray | None = None, num_contexts: int = 1) -> np.ndarray:
    """How often each byte comes up in each context, int64, shape (C, 256)."""
    if ctx_N is None:
        return np.bincount(data_N, minlength=256).reshape(1, 256)
    return np.bincount(ctx_N.astype(np.int64) * 256 + data_N, minlength=256 * num_contexts).reshape(-1, 256)


def encode_bytes(data_N: np.ndarray, ctx_N: np.ndarray | None = None, num_contexts: int = 1) -> Stream:
    """Bytes, uint8, as the smallest stream; contexts, if any, must be known where they are read.

    Raises:
        MissingExtraError: without the package `zstandard`.
    """
    from lcsc.kernels.entropy import encode_static, frequencies

    plain = data_N.tobytes()
    counts_CS = count(data_N, ctx_N, num_contexts)
    if data_N.size and (counts_CS.sum(0) > 0).sum() == 1:
        return Stream("fill", [int(data_N[0])], b"")
    found = Stream("raw", [], plain)
    most = int(len(plain) * (1 - LEAST_GAIN))
    if entropy_bits(counts_CS) / 8 < most:
        freq_CS = frequencies(counts_CS)
        zeros = np.zeros(len(data_N), np.uint16) if ctx_N is None else ctx_N
        table = zlib.compress(freq_CS.astype("<u2").T.tobytes(), 9)
        data = table + encode_static(data_N, zeros, freq_CS)
        if len(data) < most:
            found, most = Stream("rans", [num_contexts, len(table)], data), len(data)
    compressor = _zstandard().ZstdCompressor(level=_LEVEL, write_content_size=False)
    if len(compressor.compress(plain[:_SAMPLE])) < len(plain[:_SAMPLE]) * (1 - LEAST_GAIN):
        data = compressor.compress(plain)
        if len(data) < most:
            found = Stream("zstd", [], data)
    return found


def decode_bytes(
    coder: str, params: Sequence[Any], data: bytes, size: int, ctx_N: np.ndarray | None = None, num_contexts: int = 1
) -> np.ndarray:
    """The `size` bytes again, uint8, shape (N,).

    Raises:
        Wrong: an unknown coder, or parameters and bytes that do not fit it.
        MissingExtraError: a stream of zstd without the package `zstandard`.
    """
    if coder == "raw" and len(data) == size:
        return np.frombuffer(data, np.uint8)
    if coder == "fill" and not data and len(params) == 1 and params[0].__class__ is int and 0 <= params[0] < 256:
        return np.full(size, params[0], np.uint8)
    if coder == "zstd":
        return _unzstd(data, size)
    if coder == "rans" and len(params) == 2 and params[0] == num_contexts and params[1].__class__ is int:
        return _unrans(data, size, params[1], ctx_N, num_contexts)
    raise Wrong(f"a stream of `{str(coder)[:20]}` has {len(data)} bytes and the settings {str(list(params))[:60]}")


def _unzstd(data: bytes, size: int) -> np.ndarray:
    zstandard = _zstandard()
    try:
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=max(size, 1))
    except zstandard.ZstdError as error:
        raise Wrong(f"a stream of zstd cannot be read ({error})") from None
    if len(plain) != size:
        raise Wrong(f"a stream holds {len(plain)} bytes in place of {size}")
    return np.frombuffer(plain, np.uint8)


def _unrans(data: bytes, size: int, length: int, ctx_N: np.ndarray | None, num_contexts: int) -> np.ndarray:
    from lcsc.kernels.entropy import decode_static

    nbytes = 512 * num_contexts
    try:
        unpack = zlib.decompressobj()
        table = unpack.decompress(data[:length], nbytes + 1)
        if len(table) != nbytes or length < 0:
            raise ValueError
        freq_CS = np.ascontiguousarray(np.frombuffer(table, "<u2").reshape(256, -1).T)
        return decode_static(data[length:], np.zeros(size, np.uint16) if ctx_N is None else ctx_N, freq_CS)
    except (ValueError, zlib.error):
        raise Wrong("the shares of a stream are damaged") from None

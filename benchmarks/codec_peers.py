"""Other compressors of checkpoints, each as a pair of functions on bytes; and ExCP's published rule.

ZipNN overwrites what it is given, so that it gets a copy. A peer that is not installed is left out.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable

import numpy as np

from lcsc.codec.lossy import Plane
from lcsc.codec.quantize import codebook, nearest

Peer = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def shuffled(data: bytes, width: int = 4) -> bytes:
    """Byte planes one behind the other."""
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(-1, width).T).tobytes()


def unshuffled(data: bytes, width: int = 4) -> bytes:
    """What `shuffled` took apart."""
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(width, -1).T).tobytes()


def peers() -> dict[str, Peer]:
    """By name, those that are installed."""
    import zstandard

    three, nineteen = zstandard.ZstdCompressor(level=3), zstandard.ZstdCompressor(level=19)
    back = zstandard.ZstdDecompressor().decompress
    found: dict[str, Peer] = {
        "zstd-3": (three.compress, back),
        "zstd-19": (nineteen.compress, back),
        "xz-6": (lambda data: lzma.compress(data, preset=6), lzma.decompress),
        "shuffle + zstd-3": (lambda data: three.compress(shuffled(data)), lambda data: unshuffled(back(data))),
        "shuffle + zstd-19": (lambda data: nineteen.compress(shuffled(data)), lambda data: unshuffled(back(data))),
    }
    try:
        import lz4.frame

        found["lz4"] = (lz4.frame.compress, lz4.frame.decompress)
    except ImportError:
        pass
    try:
        from zipnn import ZipNN

        zipnn = ZipNN(bytearray_dtype="float32", input_format="byte")
        found["ZipNN"] = (
            lambda data: bytes(zipnn.compress(bytearray(data))),
            lambda data: bytes(zipnn.decompress(data)),
        )
    except ImportError:
        pass
    return found


def measure(peer: Peer, data: bytes) -> dict[str, float]:
    """Ratio, and MB/s of both ways; raises AssertionError where the bytes do not come back."""
    began = time.process_time()
    small = peer[0](data)
    middle = time.process_time()
    again = peer[1](small)
    ended = time.process_time()
    assert bytes(again) == data
    return {
        "ratio": len(data) / len(small),
        "encode_mb_s": len(data) / (middle - began) / 1e6,
        "decode_mb_s": len(data) / (ended - middle) / 1e6,
    }


def xz_symbols(symbols: np.ndarray) -> int:
    """Bytes that xz takes for symbols of 4 bits: one in a byte, or two, whichever is less."""
    packed = symbols[: len(symbols) // 2 * 2 : 2] * np.uint8(16) + symbols[1::2][: len(symbols) // 2]
    return min(len(lzma.compress(some.tobytes(), preset=9 | lzma.PRESET_EXTREME)) for some in (symbols, packed))


def excp(w: list, m: list, v: list, before: list, alpha: float = 5e-5, beta: float = 2.0) -> dict:
    """ExCP's rule (arXiv:2406.11257 and its code's defaults) on tensors of a checkpoint, 4 bits, codebooks of a tensor.

    Returns reconstructions by plane, and bytes with xz of the packed symbols and codebooks of 16 bits.
    """
    found: dict[str, list] = {"w": [], "m": [], "v": []}
    symbols, books = [], 0
    for w_N, m_N, v_N, old_N in zip(w, m, v, before, strict=True):
        delta = w_N - old_N
        cut = np.median(np.abs(delta)) * min(2.5, alpha / np.sqrt(max(float(v_N.mean()), 1e-30)))
        kept_w = np.abs(delta) > cut
        kept_m = (np.abs(m_N) > beta * np.abs(m_N).mean()) & kept_w
        for plane, values, kept in (("w", delta, kept_w), ("m", m_N, kept_m), ("v", v_N, kept_m)):
            codes = codebook(values[kept], 15) if kept.any() else np.empty(0, np.float32)
            symbol_N = np.zeros(values.size, np.uint8)
            if codes.size:
                symbol_N[kept] = nearest(values[kept], codes) + 1
            own = Plane(symbol_N, np.ones(1, np.float32), codes).values([values.size])
            found[plane].append(old_N + own if plane == "w" else own)
            symbols.append(symbol_N)
            books += 2 * codes.size
    return {**found, "bytes": xz_symbols(np.concatenate(symbols)) + books}

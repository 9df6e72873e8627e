"""Dtypes by name: how wide a number is, and which numpy dtype carries its bits."""

from __future__ import annotations

import numpy as np

#: bytes of one number, by dtype name
ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
#: dtypes that can be combined
FLOATS = ("float64", "float32", "float16", "bfloat16")


def raw_dtype(name: str) -> np.dtype:
    """The numpy dtype that carries a tensor's bits: its own where numpy has it, else an unsigned integer."""
    if name == "bfloat16":
        return np.dtype("<u2")
    if name.startswith("float8"):
        return np.dtype("u1")
    return np.dtype(name).newbyteorder("<")

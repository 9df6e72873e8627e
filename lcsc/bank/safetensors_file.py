"""Safetensors files: the header as a table of places, without reading a number.

The header is parsed here and not by the `safetensors` library because the bank needs the byte ranges, and because
the library accepts names that stand twice and builds any header in memory before it looks at it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcsc.bank.extents import ITEMSIZE, Piece, Source
from lcsc.bank.shard_index import open_regular, read_range, shown, strict_json
from lcsc.core.errors import BankError

#: Largest header that is read, in bytes. The library stops at 100 MB, as text; what that becomes in memory is its
#: multiple. 16 MiB hold 32,768 tensors with 400-byte names.
MAX_HEADER = 16 << 20
#: Most tensors of one file.
MAX_TENSORS = 32_768
#: Metadata of a packed bank (`lcsc.bank.pack`), whose one tensor is no checkpoint's.
PACK_KEY = "lcsc_bank"
#: dtype names of the format -> names of torch
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_LFS = b"version https://git-lfs"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LIMIT = 1 << 63


def read_safetensors(path: Path, part: int = 0) -> tuple[dict[str, Source], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header alone.

    Args:
        path: the file.
        part: index of the file among the checkpoint's files, written into every piece.

    Returns:
        Name -> source in the order of the header, and the `__metadata__` strings.

    Raises:
        BankError: truncated, trailing bytes, or any lie of the header: length, JSON, names that stand twice, unknown
            dtypes, shapes that do not fit their bytes, holes or overlaps between tensors.
    """
    with open_regular(path) as (fd, size):
        if size < 8:
            raise BankError(f"`{shown(path)}` has {size} bytes, too few for a safetensors file. Copy it again.")
        length = int.from_bytes(first := read_range(fd, 0, 8, path), "little")
        if first == _LFS[:8]:
            raise BankError(f"`{shown(path)}` is a Git LFS pointer, not the file. Fetch it with `git lfs pull`.")
        if length > size - 8:
            raise BankError(
                f"`{shown(path)}` says its header has {length} bytes, but the file has {size}. It is truncated or "
                "not a safetensors file; copy it again."
            )
        if length > MAX_HEADER:
            raise BankError(f"`{shown(path)}` has a header of {length} bytes; at most {MAX_HEADER} are read.")
        raw = read_range(fd, 8, length, path)
    return parse_header(raw, path, part=part, start=8 + length, size=size - 8 - length)


def parse_header(
    raw: bytes, path: Path, *, part: int, start: int, size: int
) -> tuple[dict[str, Source], dict[str, str]]:
    """As `read_safetensors`, from the header's text.

    Args:
        raw: the JSON text.
        path: the file it comes from, for the messages.
        part: index of that file among the checkpoint's files.
        start: first byte of the data in the file.
        size: bytes of data.
    """
    if raw[:1] != b"{":
        raise BankError(f"`{shown(path)}` has no safetensors header (its text must begin with a brace).")
    header = strict_json(raw, path, objects=3 * MAX_TENSORS + 2, names=9 * MAX_TENSORS)
    del raw
    metadata = _metadata(header.pop("__metadata__", {}), path)
    if len(header) > MAX_TENSORS:
        raise BankError(f"`{shown(path)}` holds {len(header)} tensors; at most {MAX_TENSORS} are read.")
    table: dict[str, Source] = {}
    spans = []
    for name, info in header.items():
        dtype, shape, begin, end = _entry(name, info, path)
        spans.append((begin, end, name))
        table[name] = Source(dtype, shape, (Piece(part, start + begin, shape),))
    _check_spans(sorted(spans), size, path)
    return table, metadata


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or any(text.__class__ is not str for text in value.values()):
        raise BankError(f"`{shown(path)}` has metadata that is not a table of texts. Copy the file again.")
    return value


def _entry(name: str, info: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte (within the data) of one tensor."""
    if info.__class__ is not dict or info.keys() != _FIELDS:
        raise _lie(path, name, f"is described by {shown(info)}, not by dtype, shape and data_offsets")
    code, dims, span = info["dtype"], info["shape"], info["data_offsets"]
    dtype = DTYPES.get(code) if code.__class__ is str else None
    if dtype not in ITEMSIZE:
        known = ", ".join(key for key, value in DTYPES.items() if value in ITEMSIZE)
        raise _lie(path, name, f"has the dtype `{shown(code)}`; known are {known}")
    if dims.__class__ is not list or len(dims) > 64 or span.__class__ is not list or len(span) != 2:
        raise _lie(path, name, f"has shape {shown(dims)} and bytes {shown(span)}; two lists of counts are needed")
    count = ITEMSIZE[dtype]
    for n in dims:
        if n.__class__ is not int or n < 0 or n >= _LIMIT or (count := count * n) >= _LIMIT:
            raise _lie(path, name, f"has the shape {shown(dims)}, which no file can hold")
    begin, end = span
    if begin.__class__ is not int or end.__class__ is not int or begin < 0 or end - begin != count:
        raise _lie(path, name, f"has shape {shown(dims)} and dtype {code}, {count} bytes, but lies at {shown(span)}")
    return dtype, tuple(dims), begin, end


def _check_spans(spans: list[tuple[int, int, str]], size: int, path: Path) -> None:
    """Raise BankError unless the tensors cover the data exactly, without holes and overlaps."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            what = "leaves a hole before it" if begin > position else "overlaps the tensor before it"
            raise _lie(path, name, f"begins at data byte {begin}, where {position} was due: it {what}")
        position = end
    if position > size:
        raise BankError(
            f"`{shown(path)}` is truncated: its tensors need {position} bytes of data and {size} are there. "
            "Copy the file again."
        )
    if position < size:
        raise BankError(
            f"`{shown(path)}` has {size - position} bytes behind its last tensor; a safetensors file ends there. "
            "Copy the file again."
        )


def _lie(path: Path, name: str, what: str) -> BankError:
    return BankError(f"`{shown(path)}`: tensor `{shown(name)}` {what}. The header is damaged; copy the file again.")

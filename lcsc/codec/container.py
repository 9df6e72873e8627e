"""One coded checkpoint as one file: a header that says all, and streams that each have a checksum.

    8 bytes   magic
    u32       version
    u32       bytes of the header as it lies in the file (zlib)
    u64       bytes of the whole file
    u32       CRC-32 of the 24 bytes above and of the header
    header    JSON, see `lcsc.codec.checkpoint`
    streams   one behind the other to the end of the file; the header says kind, bytes and CRC-32 of each

Every byte is covered by a CRC, and so a file that was cut off or changed is refused by one sentence. Files come from
strangers: nothing of them is executed, and sizes are bounded before memory is taken.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcsc.core.digests import canonical_json
from lcsc.core.errors import BankError

MAGIC = b"LCSCKD\r\n"
VERSION = 1
#: how coded checkpoints are named
SUFFIX = ".ckd"
_HEAD = struct.Struct("<8sIIQ")
_CRC = struct.Struct("<I")
#: longest header, as it lies in the file and unpacked
MAX_HEADER, MAX_JSON = 1 << 24, 1 << 26


def damaged(path: Path, what: str) -> BankError:
    """The error for a coded checkpoint that is not what was written."""
    return BankError(f"`{path}` is no whole coded checkpoint: {what}. Restore it, or pack the bank again.")


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes of one stream, and what a reader has to know of them.

    Args:
        coder: see `lcsc.codec.coders`.
        params: plain values that the coder needs.
        data: the bytes.
    """

    coder: str
    params: Sequence[Any]
    data: bytes

    def row(self) -> list[Any]:
        """How the header tells of it."""
        return [self.coder, list(self.params), len(self.data), zlib.crc32(self.data)]


def pack(header: dict[str, Any], streams: Sequence[Stream]) -> bytes:
    """A whole file; `header` must hold the rows of the streams in their order.

    Raises:
        BankError: more tensors than a header holds.
    """
    text = zlib.compress(canonical_json(header).encode(), 9)
    if len(text) > MAX_HEADER:
        raise BankError(f"the description of a checkpoint takes {len(text)} bytes; at most {MAX_HEADER} are written.")
    size = _HEAD.size + _CRC.size + len(text) + sum(len(stream.data) for stream in streams)
    head = _HEAD.pack(MAGIC, VERSION, len(text), size)
    crc = _CRC.pack(zlib.crc32(text, zlib.crc32(head)))
    return b"".join([head, crc, text, *(stream.data for stream in streams)])


class Container:
    """A coded checkpoint that was opened: its header was checked, streams are when they are read.

    Args:
        path: the file.

    Raises:
        BankError: no such file, another format or version, or damage to the header or the file's length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._open(file.read(_HEAD.size + _CRC.size), file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise BankError(f"`{path}` cannot be read: {error.strerror}. Check the path.") from None

    def _open(self, head: bytes, file: Any, found: int) -> None:
        path = self.path
        if len(head) < _HEAD.size + _CRC.size or head[:8] != MAGIC:
            raise damaged(path, "it does not begin like one")
        _, version, length, size = _HEAD.unpack(head[: _HEAD.size])
        if length > MAX_HEADER or size != found:
            raise damaged(path, f"it has {found} bytes and says {size}, {length} of them in its header")
        text = file.read(length)
        if len(text) != length or zlib.crc32(text, zlib.crc32(head[: _HEAD.size])) != _CRC.unpack(head[-4:])[0]:
            raise damaged(path, "its header is not the one that was written")
        if version != VERSION:
            raise damaged(path, f"it has version {version}, and this lcsc reads {VERSION}")
        self.nbytes, self._first = found, len(head) + length
        try:
            unpack = zlib.decompressobj()
            plain = unpack.decompress(text, MAX_JSON)
            self.header: dict[str, Any] = json.loads(plain)
            if unpack.unconsumed_tail or self.header.__class__ is not dict:
                raise ValueError
        except (zlib.error, ValueError, RecursionError):
            raise damaged(path, "its header holds no description") from None

    def places(self, rows: Sequence[Sequence[Any]]) -> list[tuple[str, list[Any], int, int, int]]:
        """Coder, parameters, first byte, bytes and CRC of streams, from their rows in order.

        Raises:
            BankError: rows of other types, or streams that do not fill the file to its last byte.
        """
        at, found = self._first, []
        for row in rows:
            if row.__class__ is not list or [item.__class__ for item in row] != [str, list, int, int] or row[2] < 0:
                raise damaged(self.path, "a stream is described by something else than kind, bytes and checksum")
            coder, params, nbytes, crc = row
            found.append((coder, params, at, nbytes, crc))
            at += nbytes
        if at != self.nbytes:
            raise damaged(self.path, f"its streams end at byte {at} of {self.nbytes}")
        return found

    def read(self, offset: int, nbytes: int, crc: int) -> bytes:
        """Bytes of a stream; raises BankError where they are not those that were written."""
        try:
            with open(self.path, "rb") as file:
                data = os.pread(file.fileno(), nbytes, offset)
                while len(data) < nbytes and (more := os.pread(file.fileno(), nbytes - len(data), offset + len(data))):
                    data += more  # a read takes 2 GiB at most
        except OSError as error:
            raise BankError(f"`{self.path}` cannot be read: {error.strerror}.") from None
        if len(data) != nbytes or zlib.crc32(data) != crc:
            raise damaged(self.path, f"bytes {offset} to {offset + nbytes} are not those that were written")
        return data

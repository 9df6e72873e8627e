"""Zip archives as torch writes them, read strictly: where each entry's bytes lie, and whether they are intact.

`torch.load` inflates compressed entries (1 MB becomes 1 GB), ignores checksums and takes one of two entries that
share a name. Here an archive is stored, whole, free of overlaps and says the same thing in every place that says it.
Format: PKWARE APPNOTE 6.3.9, sections 4.3 and 4.4.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcsc.bank.shard_index import read_range, shown
from lcsc.core.errors import BankError

#: Most entries of one archive; torch writes one for each tensor, the optimizer's included.
MAX_ENTRIES = 32_768
_MAX_DIRECTORY = 16 << 20
_CHUNK = 1 << 20
_END, _END64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_CENTRAL, _LOCAL, _DESCRIPTOR = b"PK\1\2", b"PK\3\4", b"PK\7\x08"
_FULL = 0xFFFFFFFF
_SEPARATE = 8  # flag: sizes and checksum stand behind the data
_UTF8 = 0x800


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive: first byte of its data in the file, its bytes, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Central:
    """What the central directory says of one entry."""

    name: bytes
    flags: int
    size: int
    crc: int
    header: int


def read_zip(fd: int, start: int, size: int, path: Path) -> dict[str, Entry]:
    """The entries of the archive in `size` bytes from `start` of an open file, by name without the common folder.

    Raises:
        BankError: not a zip archive or truncated, compressed or encrypted entries, names that stand twice or lead
            elsewhere, entries that overlap or lie outside, or headers that contradict each other.
    """
    count, offset, length = _find_directory(fd, start, size, path)
    directory = read_range(fd, start + offset, length, path)
    places, spans = {}, []
    for central in _entries(directory, count, path):
        data, end = _local(fd, start, offset, central, path)
        spans.append((central.header, end))
        name = _name(central.name, path)
        if name in places:
            raise _bad(path, f"holds two entries named `{shown(name)}`")
        places[name] = Entry(name, start + data, central.size, central.crc)
    position = 0
    for begin, end in sorted(spans):
        if begin < position:
            raise _bad(path, f"holds entries that overlap at byte {begin}")
        position = end
    return _without_folder(places, path)


def check_crc(fd: int, entry: Entry, path: Path) -> None:
    """Read an entry's bytes and raise BankError unless their CRC-32 is the one in the directory."""
    buffer = memoryview(bytearray(min(_CHUNK, max(entry.size, 1))))
    crc, done = 0, 0
    while done < entry.size:
        got = os.preadv(fd, [buffer[: entry.size - done]], entry.offset + done)
        if got == 0:
            raise _bad(path, f"ended inside entry `{shown(entry.name)}`")
        crc = zlib.crc32(buffer[:got], crc)
        done += got
    if crc != entry.crc:
        raise differs(path, entry.name, crc, entry.crc)


def differs(path: Path, name: str, found: int, written: int) -> BankError:
    """The error for bytes that are not those that were written."""
    return _bad(
        path,
        f"holds entry `{shown(name)}` with checksum {found:08x}, written with {written:08x} (or by torch with "
        "checksums turned off, which cannot be told from damage)",
    )


def _bad(path: Path, what: str) -> BankError:
    return BankError(f"`{shown(path)}` {what}. The file is damaged or hostile; copy it again from its source.")


def _find_directory(fd: int, start: int, size: int, path: Path) -> tuple[int, int, int]:
    """Number of entries, and first byte and length of the central directory, counted from `start`."""
    if size < 22:
        raise _bad(path, f"has {size} bytes, too few for a zip archive")
    tail_size = min(size, 98)  # end record 22, locator 20, end record of zip64 56
    tail = read_range(fd, start + size - tail_size, tail_size, path)
    sign, disk, first, here, count, length, offset, comment = struct.unpack("<4s4H2LH", tail[-22:])
    if sign != _END or comment or disk or first or here != count:
        raise _bad(path, "does not end like a zip archive: it is truncated, or bytes were added")
    end = size - 22
    if len(tail) == 98 and tail[56:60] == _LOCATOR:
        _, _, place, disks = struct.unpack("<4sLQL", tail[56:76])
        sign, rest, _, _, disk, first, here, big, big_length, big_offset = struct.unpack("<4sQ2H2L4Q", tail[:56])
        end = size - 98
        if sign != _END64 or rest != 44 or place != end or disks != 1 or disk or first or here != big:
            raise _bad(path, "has a damaged zip64 end record")
        small = ((count, big, 0xFFFF), (length, big_length, _FULL), (offset, big_offset, _FULL))
        if any(value not in (true, limit) for value, true, limit in small):
            raise _bad(path, "has two end records that differ")
        count, length, offset = big, big_length, big_offset
    if count > MAX_ENTRIES or length > _MAX_DIRECTORY:
        raise _bad(path, f"holds {count} entries in a directory of {length} bytes; at most {MAX_ENTRIES} are read")
    if offset + length != end:
        raise _bad(path, "has a directory that is not where its end record says")
    return count, offset, length


def _entries(directory: bytes, count: int, path: Path) -> Iterator[_Central]:
    position = 0
    for _ in range(count):
        if position + 46 > len(directory):
            raise _bad(path, "has a directory that ends too early")
        fields = struct.unpack_from("<4s6H3L5H2L", directory, position)
        sign, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment, disk, _, mode, header = (
            fields
        )
        if sign != _CENTRAL:
            raise _bad(path, "has a damaged directory")
        name = directory[position + 46 : position + 46 + name_size]
        extra = directory[position + 46 + name_size : position + 46 + name_size + extra_size]
        position += 46 + name_size + extra_size + comment
        if method or flags & ~(_SEPARATE | _UTF8):
            what = "encrypted" if flags & 1 else "compressed" if method else "specially marked"
            raise _bad(
                path, f"holds the {what} entry `{shown(name.decode('latin-1'))}`; torch stores entries as they are"
            )
        if disk or stat.S_IFMT(mode >> 16) not in (0, stat.S_IFREG):
            raise _bad(path, f"holds the entry `{shown(name.decode('latin-1'))}`, which is a link or not a file")
        size, packed, header = _wide(extra, [size, packed, header], path)
        if packed != size:
            raise _bad(path, f"holds the entry `{shown(name.decode('latin-1'))}` with two different sizes")
        yield _Central(name, flags, size, crc, header)
    if position != len(directory):
        raise _bad(path, "has a directory with bytes behind its last entry")


def _wide(extra: bytes, values: list[int], path: Path) -> list[int]:
    """Replace those values that do not fit 32 bits by the ones of the zip64 field."""
    missing = [i for i, value in enumerate(values) if value == _FULL]
    while missing:
        if len(extra) < 4:
            raise _bad(path, "has an entry beyond 4 GiB without its size")
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            if len(body) < 8 * len(missing):
                raise _bad(path, "has an entry beyond 4 GiB without its size")
            for k, i in enumerate(missing):
                values[i] = int.from_bytes(body[8 * k : 8 * k + 8], "little")
            break
    return values


def _local(fd: int, start: int, limit: int, entry: _Central, path: Path) -> tuple[int, int]:
    """First byte of an entry's data and the byte behind its last, counted from `start`; checks its local header."""
    named = shown(entry.name.decode("latin-1"))
    if entry.header + 30 + len(entry.name) + entry.size > limit:
        raise _bad(path, f"holds the entry `{named}` outside of its data")
    header = read_range(fd, start + entry.header, 30 + len(entry.name), path)
    sign, _, flags, method, _, _, crc, packed, size, name_size, extra_size = struct.unpack_from("<4s5H3L2H", header)
    separate = bool(flags & _SEPARATE)  # then the local header may leave them to the record behind the data
    true = crc == entry.crc or (separate and crc == 0)
    true &= all(n in (entry.size, _FULL) or (separate and n == 0) for n in (packed, size))
    if sign != _LOCAL or method or flags != entry.flags or header[30:] != entry.name or not true:
        raise _bad(path, f"describes the entry `{named}` in two ways")
    data = entry.header + 30 + name_size + extra_size
    end = data + entry.size
    if separate:
        end += _descriptor(fd, start + end, min(24, limit - end), entry, path)
    if end > limit:
        raise _bad(path, f"holds the entry `{named}` outside of its data")
    return data, end


def _descriptor(fd: int, offset: int, room: int, entry: _Central, path: Path) -> int:
    """Length of the record behind an entry's data, which repeats its checksum and sizes."""
    record = read_range(fd, offset, max(room, 0), path)
    expected = _DESCRIPTOR + struct.pack("<L", entry.crc)
    long = expected + struct.pack("<2Q", entry.size, entry.size)
    short = expected + struct.pack("<2L", entry.size & _FULL, entry.size & _FULL)
    if record == long:
        return 24
    if entry.size < _FULL and record[:16] == short:
        return 16
    raise _bad(path, f"describes the entry `{shown(entry.name.decode('latin-1'))}` in two ways")


def _name(raw: bytes, path: Path) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeError:
        name = ""
    parts = name.split("/")
    if "\\" in name or "\0" in name or len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise _bad(path, f"holds an entry with the name `{shown(raw.decode('latin-1'))}`, which torch does not write")
    return name


def _without_folder(places: dict[str, Entry], path: Path) -> dict[str, Entry]:
    folders = {name.split("/", 1)[0] for name in places}
    if len(folders) != 1:
        raise _bad(path, f"holds {len(folders)} folders where torch writes one")
    return {name.split("/", 1)[1]: entry for name, entry in places.items()}

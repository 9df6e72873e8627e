"""One journal record as one line: JSON that carries its own checksum and the digest of the line before.

    {...,"prev":"<16 hex digits of the SHA-256 of the line before>","crc":"<CRC-32 of all bytes before this field>"}

So a flipped bit, a lost or a doubled line and lines of another journal are all noticed, and a line is still plain JSON.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcsc.core.digests import canonical_json
from lcsc.core.errors import RunError

Record = dict[str, Any]

#: What stands before the first line.
FIRST = "0" * 16


def link(line: bytes) -> str:
    """What the line after `line` (with its newline) says of it."""
    return hashlib.sha256(line).hexdigest()[:16]


def frame(record: Record, prev: str) -> bytes:
    """The line of a record, newline included.

    Args:
        record: plain values; NaN and Inf are refused (ValueError).
        prev: `link` of the line before, `FIRST` for the first one.
    """
    body = f'{canonical_json(record)[:-1]},"prev":"{prev}"'.encode()
    return body + f',"crc":"{zlib.crc32(body):08x}"}}\n'.encode()


def unframe(line: bytes, prev: str) -> Record:
    """The record of a line, newline included.

    Raises:
        ValueError: the line is not what `frame` made of a record after `prev`.
    """
    body, mark, tail = line.rpartition(b',"crc":"')
    if not mark or tail != f'{zlib.crc32(body):08x}"}}\n'.encode():
        raise ValueError("its checksum is wrong")
    record = json.loads(line.decode(), parse_constant=_refuse)  # whoever can count a checksum can write anything
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("not a record")
    if record.pop("prev", None) != prev:
        raise ValueError("it does not follow the record before")
    del record["crc"]
    return record


def read_records(path: Path, check: Callable[[Record], None] | None = None) -> tuple[list[Record], int]:
    """All whole records of a journal and the number of bytes they take; a torn last line is left out.

    Args:
        path: the journal.
        check: raises ValueError for a record that its reader cannot use.

    Raises:
        RunError: a line that ends in a newline is damaged, or does not follow the one before.
    """
    records, good, _ = read_chain(path, check)
    return records, good


def read_chain(path: Path, check: Callable[[Record], None] | None = None) -> tuple[list[Record], int, str]:
    """As `read_records`, and the link that the next line takes."""
    data = path.read_bytes()
    records: list[Record] = []
    good, prev = 0, FIRST
    while (end := data.find(b"\n", good)) >= 0:
        line = data[good : end + 1]
        try:
            record = unframe(line, prev)
            if record.get("seq") != len(records):
                raise ValueError("out of sequence")
            if check is not None:
                check(record)
        except ValueError as error:
            raise RunError(
                f"`{path}` is damaged at record {len(records)} (byte {good}): {error}. "
                "Restore the file from a copy, or start a new run."
            ) from error
        records.append(record)
        good, prev = end + 1, link(line)
    return records, good, prev


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a score")


def may_win(record: Record) -> bool:
    """Whether a candidate may be the best: those beyond a searcher's budget only inform it (`Proposal.may_win`)."""
    return bool(record.get("may_win", True))

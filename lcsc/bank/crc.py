"""CRC-32 of the bytes in torch files, compared on the way of a pass that reads them anyway.

The writer's checksums are taken from the archives' directories when the headers are read. A pass adds up those of the
chunks it reads, in its own threads and while they are in the cache; what no pass reads whole (a view of a larger
storage, a tensor in strides, a constant) is read once for its checksum alone. Safetensors has no checksums.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcsc.bank.content import CHUNK
from lcsc.bank.extents import ITEMSIZE, Piece, Source, Table
from lcsc.bank.shard_index import open_regular
from lcsc.bank.zip_check import Entry, check_crc, differs

if TYPE_CHECKING:
    from lcsc.bank.rows import Row

#: the polynomial of CRC-32, bits reversed
_POLYNOMIAL = 0xEDB88320


@dataclass(frozen=True, slots=True)
class Stored:
    """The archive entries of one checkpoint's files, in the order of files and bytes.

    Args:
        places: file, first byte and bytes of each entry, shape (E, 3), int64; checkpoints alike share one array.
        crcs: their checksums as written, shape (E,), uint32.
    """

    places: np.ndarray
    crcs: np.ndarray

    @classmethod
    def of(cls, entries: Iterable[tuple[int, Entry]]) -> Stored | None:
        """From `(file, entry)`, None when there is none."""
        found = sorted((part, entry.offset, entry.size, entry.crc) for part, entry in entries)
        if not found:
            return None
        return cls(np.array([item[:3] for item in found], np.int64), np.array([item[3] for item in found], np.uint32))


class Crcs:
    """Which rows still have to be compared, and the checksums of the chunks that were read so far.

    Args:
        rows: checkpoints; those without `stored` need nothing.
        first: number of each combined tensor's first chunk.
        count: number of all chunks of a row.
    """

    def __init__(self, rows: Sequence[Row], first: Mapping[str, int], count: int) -> None:
        self._rows, self._first = rows, first
        self.wanted = np.array([row.stored is not None for row in rows])
        self._sums = np.zeros((len(rows), count if self.wanted.any() else 0), np.uint32)
        self._plans: dict[tuple[int, int], list[tuple[dict[str, None], Source, int, bool]]] = {}
        #: row and index of the entries that were read for their checksum alone
        self._alone: set[tuple[int, int]] = set()

    def add(self, k: int, chunk: int, bits: np.ndarray) -> None:
        """Take the checksum of one chunk of row k; zlib lets other threads run meanwhile."""
        self._sums[k, chunk] = zlib.crc32(bits.data)

    def compare(self, ks: Sequence[int], seen: np.ndarray, threads: int) -> None:
        """Compare rows with what was written, each once; `seen`, shape (K, chunks), says which chunks were added.

        Raises:
            BankError: the bytes of a tensor are not those that were written; file and tensor are named.
        """
        if not (todo := [k for k in ks if self.wanted[k]]):
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="lcsc-crc") as pool:
            for _ in pool.map(lambda k: self._row(k, seen[k]), todo):
                pass
        self.wanted[todo] = False

    def compare_some(self, k: int, names: Collection[str]) -> None:
        """As `compare`, of some tensors of row k alone, which no pass has read; each is read once."""
        if names and self.wanted[k]:
            self._row(k, np.zeros(self._sums.shape[1], bool), frozenset(names))

    def _row(self, k: int, seen: np.ndarray, names: frozenset[str] | None = None) -> None:
        row = self._rows[k]
        assert row.stored is not None
        for inside, source, index, whole in self._plan(row.table, row.stored.places):
            if (name := next((n for n in inside if names is None or n in names), None)) is None:
                continue
            part, offset, size = row.stored.places[index].tolist()
            path, written = row.files[part], int(row.stored.crcs[index])
            first = self._first.get(name, 0)
            stop = first + -(-source.numel // CHUNK)
            if whole and seen[first:stop].all():
                found = joined(self._sums[k, first:stop].tolist(), CHUNK * ITEMSIZE[source.dtype], size)
                if found != written:
                    raise differs(path, name, found, written)
            elif (k, index) not in self._alone:
                with open_regular(path) as (fd, _):
                    check_crc(fd, Entry(name, offset, size, written), path)
                self._alone.add((k, index))

    def _plan(self, table: Table, places: np.ndarray) -> list[tuple[dict[str, None], Source, int, bool]]:
        """Each entry that a table needs: the names of the tensors in it, one of these tensors, the entry's index, and
        whether it is just that tensor's numbers. The first of the names is that tensor's.
        """
        key = id(table), id(places)
        if key not in self._plans:
            starts = [(part, offset) for part, offset, _ in places.tolist()]
            plan: dict[int, tuple[dict[str, None], Source, int, bool]] = {}
            for name, source, piece in _pieces(table):
                # the entry that begins last at or before the piece; safetensors files among the others have none
                index = bisect.bisect_right(starts, (piece.part, piece.offset)) - 1
                part, offset, size = places[max(index, 0)].tolist()
                if index < 0 or part != piece.part or not offset <= piece.offset < offset + size:
                    continue
                whole = name in self._first and source.plain and (offset, size) == (piece.offset, source.nbytes)
                inside = plan[index][0] if index in plan else {}
                if whole or not inside:
                    plan[index] = ({name: None, **inside}, source, index, whole)
                else:
                    inside[name] = None
            self._plans[key] = list(plan.values())
        return self._plans[key]


def _pieces(table: Table) -> Iterable[tuple[str, Source, Piece]]:
    for name, source in table.items():
        if source.numel:
            for piece in source.pieces:
                yield name, source, piece


def joined(crcs: Sequence[int], width: int, nbytes: int) -> int:
    """The checksum of `nbytes` bytes from those of its parts of `width` bytes each (the last may be shorter)."""
    whole, last = crcs[0], nbytes - width * (len(crcs) - 1)
    steps = [width] * (len(crcs) - 2) + [last] * (len(crcs) > 1)
    for crc, step in zip(crcs[1:], steps, strict=True):
        whole = _times(_shift(step), whole) ^ crc
    return whole


_SHIFTS: dict[int, int] = {}


def _shift(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial, bits reversed: what that many more bytes do to a checksum.

    As zlib's `crc32_combine`, which Python does not offer.
    """
    if nbytes not in _SHIFTS:
        power, square, left = 1 << 31, 1 << 23, nbytes  # x^0 and x^8
        while left:
            if left & 1:
                power = _times(square, power)
            square = _times(square, square)
            left >>= 1
        _SHIFTS[nbytes] = power
    return _SHIFTS[nbytes]


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), bits reversed, modulo the polynomial of CRC-32."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product

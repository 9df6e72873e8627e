"""A part of a bank's columns as a bank of its own: what one node combines of a model that all of them make.

Tensors are cut where they lie in the files, so that every storage reads, holds and adds up the part alone. Sums go
column by column, so that the bits are those of the whole. K = checkpoints, P = columns, N = columns of the part,
B = candidates, G = layer groups.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lcsc.bank.bank import CheckpointBank
from lcsc.bank.crc import Stored
from lcsc.bank.extents import Table, cut_source, whole_rows
from lcsc.bank.layout import Layout
from lcsc.bank.rows import Checksums, Row
from lcsc.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lcsc.bank.storage import Storage
    from lcsc.kernels import Groups


class BankPart:
    """Columns of a bank that one process reads and combines without the others.

    Nothing is read before the first `combine`. Dtype, storage, device and the anchor of differences are the bank's:
    open it with `storage="resident"` where the part fits in memory, also if the bank does not (opening reads headers
    only), and leave `auto`, which measures the whole bank.

    A tensor saved in strides or in parts that are no runs of it is read in whole rows. Of torch files the checksums of
    those tensors are compared that the part holds whole.

    Args:
        bank: the whole.
        spans: of each tensor that takes part, the first element and the one after the last, in C order.

    Raises:
        ConfigError: a span of no tensor, or beyond its ends.
    """

    def __init__(self, bank: CheckpointBank, spans: Mapping[str, tuple[int, int]]) -> None:
        self.bank = bank
        entries = {entry.name: entry for entry in bank.layout.entries}
        _check_spans(spans, {name: entry.stop - entry.start for name, entry in entries.items()})
        wanted = {name: spans[name] for name in entries if name in spans and spans[name][0] < spans[name][1]}
        held = {name: _held([row.table for row in bank.rows], name, *span) for name, span in wanted.items()}
        self._layout = Layout.of({name: (b - a,) for name, (a, b) in held.items()})
        self._first = [entries[entry.name].start + held[entry.name][0] for entry in self._layout.entries]
        self._rows = _cut_rows(bank.rows, held)
        #: where each tensor's elements lie in the row of N numbers that `combine` gives
        self.places: dict[str, slice] = {}
        self._picks: list[slice] = []
        count = 0
        for entry in self._layout.entries:
            (a, b), first = wanted[entry.name], entry.start - held[entry.name][0]
            self._picks.append(slice(first + a, first + b))
            self.places[entry.name] = slice(count, count + b - a)
            count += b - a
        #: N
        self.num_columns = count

    @classmethod
    def columns(cls, bank: CheckpointBank, start: int, stop: int) -> BankPart:
        """Columns [start, stop) of the bank's flat row.

        Raises:
            ConfigError: not 0 <= start <= stop <= P.
        """
        P = bank.layout.num_parameters
        if not 0 <= start <= stop <= P:
            raise ConfigError(f"the columns are {start} to {stop}; they must rise and lie between 0 and {P}, as P is.")
        cut = {e.name: (max(start, e.start) - e.start, min(stop, e.stop) - e.start) for e in bank.layout.entries}
        return cls(bank, {name: span for name, span in cut.items() if span[0] < span[1]})

    def combine(self, coef: Tensor, *, groups: Groups | None = None, out: Tensor | None = None) -> Tensor:
        """The part's columns of candidates; the same bits as these columns of `bank.combine`.

        Args:
            coef: shape (K,) or (B, K); with `groups` (G, K) or (B, G, K).
            groups: which columns of the whole bank use which layer group's coefficients.
            out: float32 buffer, shape (N,) or (B, N).

        Returns:
            float32, shape (N,) or (B, N); `out` where it is given.

        Raises:
            ValueError: shapes that do not fit.
            BankError: a file changed since it was opened, or there is not enough memory.
            NonFiniteError: a checkpoint holds NaN or Inf in this part; file and tensor are named.
            EvaluationError: a candidate holds NaN or Inf in this part.
        """
        import torch

        lead = coef.shape[: coef.ndim - (1 if groups is None else 2)]
        if self.num_columns == 0:
            return torch.empty(*lead, 0) if out is None else out
        own = None if groups is None else self._groups(groups)
        if self.num_columns == self._layout.num_parameters:
            return self._store.combine(coef, own, out)
        held = self._store.combine(coef, own, None)
        picked = torch.cat([held[..., pick] for pick in self._picks], -1)
        return picked if out is None else out.copy_(picked)

    @functools.cached_property
    def _store(self) -> Storage:
        import torch

        from lcsc.bank.storage import Resident, Streamed, load

        bank, checksums = self.bank, Checksums(self._layout, self._rows)
        if bank.storage == "streamed":
            return Streamed(self._rows, self._layout, checksums)
        if bank.storage == "delta":
            return load(self._rows, self._layout, checksums, torch.bfloat16, bank.anchor, bank.device)
        if (mapped := self._mapped()) is not None:
            return Resident(mapped)
        return load(self._rows, self._layout, checksums, getattr(torch, bank.dtype), device=bank.device)

    def _mapped(self) -> Tensor | None:
        """The rows of a packed bank as they lie in its file, where the part is one range of them."""
        from lcsc.bank.pack_read import map_pack

        bank, start, stop = self.bank, self._first[0], self._first[0] + self._layout.num_parameters
        together = all(at == start + entry.start for at, entry in zip(self._first, self._layout.entries, strict=True))
        if not together or bank.device != "cpu":
            return None
        mapped = map_pack(bank.path, bank.rows, bank.layout, bank.dtype)
        return None if mapped is None else mapped[:, start:stop]

    def _groups(self, groups: Groups) -> Groups:
        """The whole bank's layer groups, for the columns that are held."""
        from lcsc.kernels import Groups

        starts: list[int] = [0]
        ids: list[int] = []
        for entry, first in zip(self._layout.entries, self._first, strict=True):
            at, last = first, first + entry.stop - entry.start
            segment = bisect.bisect_right(groups.starts, at) - 1
            while at < last:
                stop = min(last, groups.starts[segment + 1])
                if ids and ids[-1] == groups.groups[segment]:
                    starts[-1] += stop - at
                elif stop > at:
                    ids.append(groups.groups[segment])
                    starts.append(starts[-1] + stop - at)
                at, segment = stop, segment + 1
        return Groups(tuple(starts), tuple(ids), groups.num_groups)


def _check_spans(spans: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> None:
    for name, (a, b) in spans.items():
        if name not in sizes:
            raise ConfigError(f"the part takes `{name}`, which is no combined tensor of the bank. Leave it out.")
        if not 0 <= a <= b <= sizes[name]:
            raise ConfigError(
                f"the part takes elements {a} to {b} of `{name}`; they must lie between 0 and {sizes[name]}."
            )


def _held(tables: Sequence[Table], name: str, a: int, b: int) -> tuple[int, int]:
    """The elements to hold so that every row can be cut there."""
    for table in {id(table): table for table in tables}.values():
        low, high = whole_rows(table[name], a, b)
        a, b = min(a, low), max(b, high)
    return a, b


def _cut_rows(rows: Sequence[Row], held: Mapping[str, tuple[int, int]]) -> tuple[Row, ...]:
    """The rows with the elements that are held alone; those that shared a table share the cut one."""
    tables: dict[int, Table] = {}
    whole: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    cut = []
    for row in rows:
        if id(row.table) not in tables:
            tables[id(row.table)] = {name: cut_source(row.table[name], *span) for name, span in held.items()}
        table, stored = tables[id(row.table)], row.stored
        if stored is not None:
            key = id(row.table), id(stored.places)
            if key not in whole:
                whole[key] = _whole(table, stored.places)
            places, which = whole[key]
            stored = Stored(places, stored.crcs[which]) if which.any() else None
        cut.append(dataclasses.replace(row, table=table, stored=stored))
    return tuple(cut)


def _whole(table: Table, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries of an archive, shape (E, 3), that are just the numbers of a tensor here, and which of all those are.

    Comparing another one would read what the part does not need.
    """
    here = {(s.pieces[0].part, s.pieces[0].offset, s.nbytes) for s in table.values() if s.plain}
    which = np.array([tuple(place) in here for place in places.tolist()], bool)
    return places[which], which

"""A run's checkpoints as one matrix. K = checkpoints, P = flat parameters, B = candidates, G = layer groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lcsc.bank.coded import coded_group, is_coded
from lcsc.bank.content import chunk_sums, content_digest
from lcsc.bank.extents import Source, read_source
from lcsc.bank.find import Checkpoint, choose, find_groups
from lcsc.bank.memory import Extent, bank_bytes, choose_device, choose_storage
from lcsc.bank.pack_read import open_pack, rows_by_rate, take_rows
from lcsc.bank.rows import Checksums, Row, origin
from lcsc.bank.shape import Shape, several_emas, shape_of
from lcsc.bank.stream import Progress
from lcsc.core.digests import value_digest
from lcsc.core.errors import BankError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lcsc.bank.storage import Storage
    from lcsc.kernels import Groups

DTYPES = ("float32", "bfloat16", "float16")
_Stepped = TypeVar("_Stepped", Checkpoint, Row)


@dataclass(frozen=True)
class Selection:
    """Which steps of a run to use: those in [start, stop], every n-th counted from the last, the last n of them.

    None means no limit.
    """

    start: int | None = None
    stop: int | None = None
    every: int = 1
    last: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.last is not None and self.last < 1):
            raise ConfigError(f"`every` is {self.every} and `last` is {self.last}; both must be at least 1.")

    def pick(self, found: Sequence[_Stepped]) -> list[_Stepped]:
        """The selected checkpoints, in step order; raises BankError when none is left."""
        lower = -1 if self.start is None else self.start
        kept = [f for f in found if f.step >= lower and (self.stop is None or f.step <= self.stop)]
        kept = kept[::-1][:: self.every][: self.last][::-1]
        if not kept:
            raise BankError(
                f"no checkpoint left: {len(found)} steps from {found[0].step} to {found[-1].step}, "
                f"and {self} keeps none. Widen `bank.start` and `bank.stop`."
            )
        return kept


class CheckpointBank:
    """Checkpoints of one architecture, read as rows of one matrix.

    Opening reads headers only and checks that every checkpoint has the same tensors; the numbers are read when they
    are first used, into memory or, where they do not fit, block by block at each use. Files are never modified.
    Make one with `CheckpointBank.open`.
    """

    def __init__(
        self,
        path: Path,
        select: Selection,
        component: str | None,
        weights: str | None,
        dtype: str,
        storage: str,
        device: str,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"`bank.dtype` is `{dtype}`; it must be one of {', '.join(DTYPES)}.")
        self.path, self.dtype = path, dtype
        shape = self._shape = _shape(path, select, component, weights)
        #: one row a checkpoint, and how their columns lie
        self.rows, self.layout = shape.rows, shape.layout
        #: `{"class": ..., "config": {...}}` of the network, None when the files do not say
        self.arch: Mapping[str, Any] | None = shape.arch
        #: raw, ema or lora, and the EMA's rate as the files write it, None where there are several
        self.kind, self.rate = shape.kind, shape.rate
        #: EMA rate of each row where the bank holds several rates (`weights=ema:*`), else empty
        self.rates = shape.rates
        #: what the reader has to say: which weights were taken, what was passed over, what is copied
        self.notes: tuple[str, ...] = shape.said
        #: which tensors are copied and from which step, as a sentence; None where all are combined
        self.copied = shape.copied
        #: origin of each row where the file itself says so (packed banks), else None; see `parent`
        self.origins = shape.parents
        itemsize = 4 if dtype == "float32" else 2
        wanted = "auto" if storage == "exact" else storage
        self._extent = Extent.of(self.rows, self.layout)
        #: torch device of the rows
        self.device, free = choose_device(device, self._extent, itemsize)
        #: resident, delta or streamed
        self.storage = choose_storage(wanted, self._extent, itemsize, free)
        if storage == "exact" and self.storage == "delta":
            self.storage = "streamed"
        exact = "delta" if self.storage == "delta" else "exact"
        #: what was asked for, as plain values; opens the same bank again
        self.config = {
            "path": str(path),
            "component": component,
            "weights": weights,
            **dataclasses.asdict(select),
            "dtype": dtype,
            "storage": exact if storage == "auto" else storage,
            "device": device,
        }
        #: row that `delta` keeps in full; another one may be set before the numbers are used
        self.anchor = len(self.rows) // 2
        #: sums of the contents, collected whenever rows are read
        self.checksums = Checksums(self.layout, self.rows)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        select: Selection | None = None,
        component: str | None = None,
        weights: str | None = None,
        dtype: str = "float32",
        storage: str = "auto",
        device: str = "cpu",
    ) -> CheckpointBank:
        """Open the checkpoints under `path`.

        Args:
            path: a folder in any layout that `lcsc bank scan` reads, one checkpoint, or what `lcsc bank pack` wrote
                (a file; a folder with `codec=`).
            select: which steps; None means all.
            component: part of each checkpoint that holds the network, such as `unet`; None finds it.
            weights: `raw`, `ema`, `ema:<rate>`, `ema:*` (all rates of one run, for post-hoc EMA) or `lora`; None takes
                raw weights where both are there.
            dtype: how resident rows are stored in memory: float32, bfloat16 or float16.
            storage: `resident`, `delta` (bfloat16 differences to one checkpoint), `streamed`, `exact` (resident or
                streamed, which give the same bits) or `auto` (the first of the three that fits in the free memory).
            device: `cpu`, a GPU such as `cuda`, or `auto` (the GPU where there is one and the bank fits into it). A
                GPU combines with the arithmetic of the CPU and gives its bits where it is fast at float64.

        Raises:
            BankError: nothing found, damaged files, or checkpoints that do not fit together.
        """
        return cls(Path(path), select or Selection(), component, weights, dtype, storage, device)

    @property
    def steps(self) -> tuple[int, ...]:
        """Training step of each row, increasing."""
        return tuple(row.step for row in self.rows)

    @property
    def num_checkpoints(self) -> int:
        """K."""
        return len(self.rows)

    @property
    def kind_text(self) -> str:
        """What the rows are, in words: raw, lora, or ema and its rates as written."""
        rates = dict.fromkeys(rate for rate in self._shape.row_rates if rate)
        return f"{self.kind} {' and '.join(rates)}".strip()

    @property
    def lines(self) -> list[str]:
        """What a user should see before the bank is used: size, storage and what the reader has to say."""
        P = self.layout.num_parameters
        size = bank_bytes(self._extent, self.storage, 4 if self.dtype == "float32" else 2) / 1e6
        place = self.storage if self.device == "cpu" else f"{self.storage} on {self.device}"
        return [
            f"bank: {self.num_checkpoints} checkpoints ({self.kind_text}) x {P:,} parameters, {place}, {size:,.0f} MB",
            *(f"note: {note}" for note in self.notes),
        ]

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype of each combined tensor in the last checkpoint's files."""
        return {entry.name: self.rows[-1].table[entry.name].dtype for entry in self.layout.entries}

    # ------------------------------------------------------------------------------------------- numbers

    @functools.cached_property
    def _store(self) -> Storage:
        import torch

        from lcsc.bank.pack_read import map_pack
        from lcsc.bank.storage import Resident, Streamed, load

        if self.storage == "streamed":
            return Streamed(self.rows, self.layout, self.checksums)
        dtype = getattr(torch, self.dtype)
        if self.storage == "delta":
            return load(self.rows, self.layout, self.checksums, torch.bfloat16, self.anchor, self.device)
        mapped = map_pack(self.path, self.rows, self.layout, self.dtype) if self.device == "cpu" else None
        if mapped is None:
            return load(self.rows, self.layout, self.checksums, dtype, device=self.device)
        return Resident(mapped)

    def matrix(self) -> Tensor:
        """W_KP, shape (K, P), in the bank's dtype; for resident banks only.

        Raises:
            NonFiniteError: a checkpoint holds NaN or Inf (file, tensor and count are named).
            BankError: the bank is stored otherwise; `blocks` works with every storage.
        """
        if self.storage != "resident":
            raise BankError(
                f"the bank `{self.path}` is stored as `{self.storage}`, which has no matrix. Use `blocks`, or open it "
                "with storage=resident."
            )
        return self._store.W_KP  # type: ignore[attr-defined]

    def load(self) -> None:
        """Read and check all numbers now rather than at the first use.

        Raises:
            NonFiniteError: a checkpoint holds NaN or Inf (file, tensor and count are named).
        """
        _ = self._store
        if self.storage == "streamed":
            from lcsc.bank.rows import cut
            from lcsc.bank.storage import each_row, tables_of

            for _ in each_row(self.rows, cut(self.layout, tables_of(self.rows)), self.checksums):
                pass

    def combine(self, coef: Tensor, *, groups: Groups | None = None, out: Tensor | None = None) -> Tensor:
        """Candidates, see `lcsc.kernels.combine`; a streamed bank reads its files once for all B of a call.

        Args:
            coef: shape (K,) or (B, K); with `groups` (G, K) or (B, G, K).
            groups: which columns use which layer group's coefficients.
            out: float32 buffer, shape (P,) or (B, P).
        """
        return self._store.combine(coef, groups, out)

    @contextlib.contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Inside, `combine` works on the CPU, also where the rows lie on a GPU: any machine can make the same bits."""
        from lcsc.bank.storage import OnCpu, Resident

        store = self._store
        if self.device != "cpu" and isinstance(store, Resident):
            self.__dict__["_store"] = OnCpu(store.W_KP, store.anchor_P)
        try:
            yield
        finally:
            self.__dict__["_store"] = store

    def project(self, grad_P: Tensor, *, groups: Groups | None = None) -> Tensor:
        """Gradient with respect to the coefficients, float32, shape (K,) or (G, K); see `lcsc.kernels.project`."""
        return self._store.project(grad_P, groups)

    def blocks(self, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows, a few columns at a time: `(columns, W_KC)` in order, float32; the array is used again."""
        return self._store.blocks(columns)

    def stream(self, coef_MK: np.ndarray, *, progress: Progress | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """M outputs in one pass: `(start, out_MC)`, float32, every column once; the array is used again.

        A streamed bank reads only the checkpoints that have a coefficient, and needs no torch.

        Args:
            coef_MK: coefficients, float64, shape (M, K).
            progress: called with bytes done and bytes in all.
        """
        from lcsc.kernels import round_coef

        rounded = round_coef(np.ascontiguousarray(coef_MK, dtype=np.float64))
        if self.storage == "streamed":
            from lcsc.bank.stream import Pass, run_pass

            return run_pass(Pass(self.rows, self.layout, rounded[:, None], checksums=self.checksums), progress=progress)
        return self._store.stream(rounded, progress)

    # --------------------------------------------------------------------------------- what is not combined

    @property
    def constants_named(self) -> tuple[str, ...]:
        """Names of the tensors that are not combined."""
        return self._shape.constants

    def constant_sources(self) -> dict[str, tuple[tuple[Path, ...], Source]]:
        """Tensors that are not combined (integers, batch-norm statistics) as they lie in the last checkpoint."""
        self.checksums.compare_some(len(self.rows) - 1, self._shape.constants)
        last = self.rows[-1]
        return {name: (last.files, last.table[name]) for name in self._shape.constants}

    @functools.cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that are not combined, read from the last checkpoint."""
        from lcsc.bank.storage import as_tensor

        base = self.rows[-1].base
        return {
            name: as_tensor(read_source(files, source, base), source.dtype)
            for name, (files, source) in self.constant_sources().items()
        }

    # -------------------------------------------------------------------------------------------- origin

    def parent(self, k: int) -> dict[str, Any]:
        """Row k's origin: step, files below the bank's folder with their bytes, and the digest of its content.

        The digest is at hand once the row was read for another purpose; otherwise the row is read now.
        """
        row = self.rows[k]
        if self.origins is not None:
            return dict(self.origins[k])
        self.checksums.compare([k])
        found = self.checksums.of(k) or {
            entry.name: chunk_sums(read_source(row.files, row.table[entry.name], row.base))
            for entry in self.layout.entries
        }
        tensors = {name: (row.table[name].dtype, row.table[name].shape, sums) for name, sums in found.items()}
        for name in self._shape.constants:
            source = row.table[name]
            tensors[name] = (source.dtype, source.shape, chunk_sums(read_source(row.files, source, row.base)))
        return origin(self.path, row, content_digest(tensors))

    @functools.cached_property
    def parents(self) -> tuple[Mapping[str, Any], ...]:
        """`parent` of every row."""
        return tuple(self.parent(k) for k in range(len(self.rows)))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over steps and contents of all rows; where the files lie and in which format does not matter."""
        return value_digest([[p["step"], p["content"], p.get("rounded")] for p in self.parents])


def _shape(path: Path, select: Selection, component: str | None, weights: str | None) -> Shape:
    if (packed := open_pack(path)) is not None:
        kept = [row for rows in rows_by_rate(packed, weights) for row in select.pick(rows)]
        return take_rows(packed, kept)
    if is_coded(path):
        group, parents, held = coded_group(path, select, weights)
        shape = shape_of(group, group.checkpoints)
        return dataclasses.replace(shape, parents=tuple(parents), held=held)
    groups = find_groups(path)
    if weights == "ema:*":
        emas = several_emas([group for group in groups if component in (None, group.component)])
        return shape_of(emas[0], [row for group in emas for row in select.pick(group.checkpoints)])
    group = choose(groups, component, weights)
    return shape_of(group, select.pick(group.checkpoints))

"""Which process writes which rows of a folder of `torch.distributed.checkpoint`, and their numbers when torch asks.

The parameters are cut into boxes of whole rows. A process combines the boxes of its own range one batch after the
other, so that it reads its part of the checkpoints and holds no more than a batch.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lcsc.bank import CheckpointBank
from lcsc.bank.layout import Entry
from lcsc.bank.part import BankPart
from lcsc.bank.storage import as_tensor
from lcsc.core.errors import NonFiniteError
from lcsc.export.folder import Model
from lcsc.export.stream import overflows, round_to

#: numbers that are combined at a time, and the most of one box unless a row is longer
BATCH = 2**24


@dataclass(frozen=True)
class Box:
    """Rows [first, last) of a tensor to write: its name, dtype and shape, and the bank's name of its numbers.

    `source` is None for a tensor that is copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    first: int
    last: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the box."""
        return (self.last - self.first, *self.shape[1:]) if self.shape else ()

    @property
    def span(self) -> tuple[int, int]:
        """Its elements, in C order."""
        width = math.prod(self.shape[1:])
        return self.first * width, self.last * width

    def item(self) -> WriteItem:
        """What torch is told of it."""
        at = torch.Size((self.first, *(0 for _ in self.shape[1:])) if self.shape else ())
        chunk = ChunkStorageMetadata(offsets=at, sizes=torch.Size(self.sizes))
        properties = TensorProperties(dtype=getattr(torch, self.dtype))
        data = TensorWriteData(chunk, properties, torch.Size(self.shape))
        return WriteItem(MetadataIndex(self.name, at), WriteItemType.SHARD, tensor_data=data)


def boxes_of(bank: CheckpointBank, model: Model, rank: int, world: int) -> list[Box]:
    """What a process writes: its range of columns in the bank's order, the first one also what holds no column.

    A row belongs to the range that it begins in.

    Args:
        bank: the checkpoints.
        model: its tensors.
        rank: which of the processes.
        world: how many there are.
    """
    P, entries = bank.layout.num_parameters, {entry.name: entry for entry in bank.layout.entries}
    start, stop = P * rank // world, P * (rank + 1) // world
    boxes, others = [], []
    for spec in model.specs:
        source = bank.layout.ties.get(spec.name, spec.name)
        if source not in entries or 0 in spec.shape:
            kept = source if source in entries else None
            others.append(Box(spec.name, spec.dtype, spec.shape, kept, 0, (*spec.shape, 1)[0]))
            continue
        low, high = _rows(entries[source], start, stop)
        step = max(1, BATCH // math.prod(spec.shape[1:]))
        for first in range(low, high, step):
            boxes.append(Box(spec.name, spec.dtype, spec.shape, source, first, min(first + step, high)))
    boxes.sort(key=lambda box: (entries[box.source or ""].start, box.first))
    return boxes + (others if rank == 0 else [])


def _rows(entry: Entry, start: int, stop: int) -> tuple[int, int]:
    """Rows of a tensor that begin in columns [start, stop)."""
    rows, width = (*entry.shape, 1)[0], math.prod(entry.shape[1:])
    low, high = (min(rows, max(0, -(-(end - entry.start) // width))) for end in (start, stop))
    return low, high


class Planner(DefaultSavePlanner):
    """Tells torch which boxes there are, and makes their numbers when they are asked for, in order.

    Args:
        bank: the checkpoints.
        coef_K: float64.
        boxes: those of this process, see `boxes_of`.
        progress: called with numbers made and numbers in all.
    """

    def __init__(
        self,
        bank: CheckpointBank,
        coef_K: np.ndarray,
        boxes: Sequence[Box],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._bank, self._coef_K, self._boxes, self._progress = bank, torch.from_numpy(coef_K), boxes, progress
        self._found = {(box.name, box.first): (box, batch) for batch in _batches(boxes) for box in batch}
        self._batch: list[Box] = []
        self._numbers: dict[str, np.ndarray] = {}
        self._done = 0

    def create_local_plan(self) -> SavePlan:
        """The boxes."""
        return SavePlan([box.item() for box in self._boxes])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The numbers of a box.

        Raises:
            NonFiniteError: a number is too large for the dtype.
        """
        name, at = write_item.index.fqn, write_item.index.offset
        box, batch = self._found[name, at[0] if at else 0]
        if box.source is None:
            return self._bank.constants[name]
        if 0 in box.shape:
            return torch.empty(box.sizes, dtype=getattr(torch, box.dtype))
        if batch is not self._batch:
            self._combine(batch)
        values_C = self._numbers[box.source]
        bits_C = round_to(values_C, box.dtype)
        if (bad := overflows(bits_C, box.dtype)) is not None:
            raise NonFiniteError(
                f"`{name}` reaches {values_C[bad]:.6g}, too large for {box.dtype}. Write it with dtype=float32."
            )
        self._done += len(values_C)
        if self._progress:
            self._progress(self._done, sum(math.prod(box.sizes) for box in self._boxes if box.source is not None))
        return as_tensor(bits_C, box.dtype).reshape(box.sizes)

    def _combine(self, batch: list[Box]) -> None:
        self._numbers = {}  # before the next are made
        part = BankPart(self._bank, {box.source: box.span for box in batch if box.source is not None})
        row = part.combine(self._coef_K).cpu().numpy()
        self._batch, self._numbers = batch, {name: row[place] for name, place in part.places.items()}


def _batches(boxes: Sequence[Box]) -> list[list[Box]]:
    """Boxes that are combined together: neighbours, of each tensor one range, which its tied names share."""
    batches: list[list[Box]] = []
    spans: dict[str | None, tuple[int, int]] = {}
    for box in boxes:
        full = sum(b - a for a, b in spans.values()) + box.span[1] - box.span[0] > BATCH
        if not batches or (spans.get(box.source) != box.span and (full or box.source in spans)):
            batches.append([])
            spans = {}
        spans[box.source] = box.span
        batches[-1].append(box)
    return batches


class Writer(FileSystemWriter):
    """Writes the boxes of one process as they are made, one behind the other, and keeps none.

    torch's own holds every tensor until the last one is written.

    Args:
        folder: where to.
        rank: which of the processes.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self._file = folder / f"__{rank}_0.distcp"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One torch archive a box, as torch's own writes them."""
        results, done = [], Future()
        with open(self._file, "xb") as file:
            for item in plan.items:
                archive = io.BytesIO()  # torch makes another error of a full disk
                torch.save(planner.resolve_data(item), archive)
                offset, length = file.tell(), file.write(archive.getbuffer())
                results.append(WriteResult(item.index, length, _StorageInfo(self._file.name, offset, length)))
            file.flush()
            os.fsync(file.fileno())
        done.set_result(results)
        return done

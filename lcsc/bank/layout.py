"""How named tensors lie in one flat row of float32 numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Batch-norm statistics: a signed combination can make a variance negative, so they are copied instead.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_combined(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is combined (float weights) or copied from the last checkpoint (the rest)."""
    return dtype.is_floating_point and name.rsplit(".", 1)[-1] not in STATISTICS


@dataclass(frozen=True)
class Entry:
    """One tensor's place: `row[start:stop].view(shape)`."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The order and shapes of all combined tensors, sorted by name."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Iterable[int]]) -> Layout:
        """Lay out named shapes, sorted by name, without gaps."""
        entries, start = [], 0
        for name in sorted(shapes):
            entries.append(Entry(name, tuple(shapes[name]), start))
            start = entries[-1].stop
        return cls(tuple(entries))

    @property
    def num_parameters(self) -> int:
        """P, the length of a row."""
        return self.entries[-1].stop if self.entries else 0

    def views(self, theta_P: Tensor) -> dict[str, Tensor]:
        """Named tensors that share memory with the row `theta_P`, shape (P,)."""
        return {e.name: theta_P[e.start : e.stop].view(e.shape) for e in self.entries}

    def flatten(self, tensors: Mapping[str, Tensor], out_P: Tensor | None = None) -> Tensor:
        """Copy named tensors into a float32 row, shape (P,)."""
        if out_P is None:
            out_P = torch.empty(self.num_parameters, dtype=torch.float32)
        for name, view in self.views(out_P).items():
            view.copy_(tensors[name])
        return out_P

    def name_at(self, position: int) -> str:
        """Name of the tensor that holds the flat position."""
        return next(e.name for e in self.entries if e.start <= position < e.stop)

"""How named tensors lie in one flat row of numbers. Works on numpy arrays and torch tensors alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lcsc.bank.extents import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

#: Batch-norm statistics: a signed combination can make a variance negative, so they are copied instead.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_combined(name: str, dtype: str) -> bool:
    """Whether a tensor is combined (float weights) or copied from the last checkpoint (the rest)."""
    return dtype in FLOATS and not _is_statistic(name)


def is_refused(name: str, dtype: str) -> bool:
    """Whether a tensor holds weights of a dtype that is not combined (float8, complex); copying one would hide it."""
    return dtype.startswith(("float", "complex")) and dtype not in FLOATS and not _is_statistic(name)


def _is_statistic(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in STATISTICS


@dataclass(frozen=True, slots=True)
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
    """The order and shapes of all combined tensors, sorted by name.

    Args:
        entries: tensors with their places.
        ties: further names of tensors that are already in `entries` (tied weights): they have no place of their own.
    """

    entries: tuple[Entry, ...]
    ties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Mapping[str, Iterable[int]], ties: Mapping[str, str] | None = None) -> Layout:
        """Lay out named shapes, sorted by name, without gaps."""
        entries, start = [], 0
        for name in sorted(shapes):
            entries.append(Entry(name, tuple(shapes[name]), start))
            start = entries[-1].stop
        return cls(tuple(entries), dict(ties or {}))

    @property
    def num_parameters(self) -> int:
        """P, the length of a row."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, tied names included."""
        own = {entry.name: entry.shape for entry in self.entries}
        return own | {name: own[twin] for name, twin in self.ties.items()}

    def views(self, theta_P: Tensor) -> dict[str, Tensor]:
        """Named tensors that share memory with the row `theta_P`, shape (P,); tied names share one tensor."""
        own = {e.name: theta_P[e.start : e.stop].reshape(e.shape) for e in self.entries}
        return own | {name: own[twin] for name, twin in self.ties.items()}

    def flatten(self, tensors: Mapping[str, Tensor], out_P: Tensor | None = None) -> Tensor:
        """Copy named tensors into a float32 row, shape (P,)."""
        if out_P is None:
            import torch

            out_P = torch.empty(self.num_parameters, dtype=torch.float32)
        for name, view in self.views(out_P).items():
            view.copy_(tensors[name])
        return out_P

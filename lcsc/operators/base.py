"""What an operator is: (bank, point) -> candidate. Pure; the bank stays untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.lora_modules import AdapterFiles
from lcsc.core.space import Point, SearchSpace


@dataclass(frozen=True)
class Candidate:
    """Weights that do not exist yet, and the recipe that makes them.

    Args:
        arch: `{"class", "config"}` of the candidate's network (may differ from the bank's); None where the tensors are
            no network of a known class, such as an adapter.
        layout: where each parameter lies in the flat row.
        write: fills a float32 row, shape (P,), with the weights; the same bits each time.
        recipe: plain JSON values, enough to rebuild the candidate from the bank.
        constants: tensors that are not combined.
        adapter: how the files of an adapter are called and what is told in them; None for networks.
        measured: numbers of its making that another machine measures otherwise, such as seconds: told in records, no
            part of the recipe.
    """

    arch: Mapping[str, Any] | None
    layout: Layout
    write: Callable[[Tensor], None]
    recipe: Mapping[str, Any]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    adapter: AdapterFiles | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """A fresh copy of all tensors by name, float32 (constants in their own dtype)."""
        theta_P = torch.empty(self.layout.num_parameters)
        self.write(theta_P)
        # clones, because libraries that write files take views of one buffer for tied tensors
        return {name: t.clone() for name, t in {**self.layout.views(theta_P), **self.constants}.items()}


@dataclass(frozen=True)
class Baseline:
    """A named point that a user could have chosen without a search.

    `family` groups points that differ in one setting; the best of a family on the search seeds is its
    tuned representative.
    """

    family: str
    label: str
    point: Point


@runtime_checkable
class Operator(Protocol):
    """A way to make a model from a bank."""

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """What may be varied; empty means that there is nothing to search."""
        ...

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The candidate at `point`."""
        ...

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Points to compare a search with; may be empty."""
        ...


@runtime_checkable
class PullsBack(Protocol):
    """What an operator offers beside `Operator` when candidates depend smoothly on the point."""

    def pull_back(self, bank: CheckpointBank, point: Point, grad_P: Tensor) -> dict[str, np.ndarray]:
        """Derivative with respect to the point, box by box, of a number whose derivative by the weights is `grad_P`."""
        ...


@dataclass(frozen=True, eq=False)
class Distances:
    """What distances of weights follow from. K = checkpoints, G = groups with coefficients of their own.

    Args:
        gram_GKK: inner products of the checkpoints' deltas from their mean in each group, float64.
        pull: turns a number's derivative by the coefficients, shape (G, K), into that by the point, box by box.
    """

    gram_GKK: np.ndarray
    pull: Callable[[np.ndarray], dict[str, np.ndarray]]


@runtime_checkable
class Measured(Protocol):
    """What an operator offers beside `Operator` when distances of weights follow from coefficients."""

    def coefficients(self, bank: CheckpointBank, point: Point) -> np.ndarray:
        """The point's coefficients, shape (K,) or (G, K); each row sums to one."""
        ...

    def distances(self, bank: CheckpointBank) -> Distances:
        """One pass over the bank."""
        ...


@runtime_checkable
class Notes(Protocol):
    """What an operator offers beside `Operator` when a user should know something before the search."""

    def notes(self, bank: CheckpointBank) -> list[str]:
        """One line each; `note: ` is put before it."""
        ...


@runtime_checkable
class ReadsMore(Protocol):
    """What an operator offers beside `Operator` when it reads what is not the bank's, such as a second model."""

    def other_checkpoints(self, bank: CheckpointBank) -> Mapping[str, str]:
        """Digest of each by what it is for; searches with others are other searches."""
        ...


def notes_of(operator: Operator, bank: CheckpointBank) -> list[str]:
    """The lines to print before a search with `operator`; none for operators that have nothing to say."""
    return [f"note: {note}" for note in operator.notes(bank)] if isinstance(operator, Notes) else []

"""Operators that make another architecture of one checkpoint, piece by piece. P = flat parameters.

A plan says which tensors are remade together and how; all others are copied, unless the pieces are the whole model. It
is carried out in memory for a search (`candidate`), or one piece at a time from files to files
(`lcsc.export.transform`), so that both give the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.extents import read_source
from lcsc.bank.rows import to_float32
from lcsc.core.errors import BankError, ConfigError, NonFiniteError
from lcsc.core.registry import describe, plain
from lcsc.core.space import Point
from lcsc.operators.base import Candidate

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """Tensors that are remade together, such as a layer's attention.

    Args:
        reads: their names in the checkpoint; those that are not written again are dropped. Names of another checkpoint
            of the plan begin with what it is called there and a colon.
        writes: shapes by name in the new model.
        make: gives the written tensors, in the dtypes of those read, and facts for the recipe (plain values).
        longest: facts that take at least as many characters as any that `make` may give.
        likes: a tensor that is read for one that is written, whose dtype it takes; without one it keeps its own, and a
            new one takes that of all that are read.
    """

    reads: tuple[str, ...]
    writes: Mapping[str, tuple[int, ...]]
    make: Callable[[Tensors], tuple[dict[str, Tensor], dict[str, Any]]]
    longest: Mapping[str, Any]
    likes: Mapping[str, str] = field(default_factory=dict)

    def made(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `make` gives for tensors by name; raises NonFiniteError where one of them holds NaN or Inf."""
        for name in self.reads:
            if not torch.isfinite(tensors[name]).all():
                raise NonFiniteError(
                    f"`{name}` holds NaN or Inf, and finite numbers are needed. Take another checkpoint."
                )
        return self.make(tensors)


@dataclass(frozen=True)
class Plan:
    """How another model is made of one checkpoint.

    Args:
        row: the checkpoint's row in the bank.
        arch: `{"class", "config"}` of the new model.
        pieces: what is remade; no tensor is written by two of them.
        recipe: plain values; the pieces' facts join it as `pieces`.
        others: further checkpoints that pieces read, by what they are called there: a bank and a row of it.
        whole: the pieces are the whole model; nothing is copied beside them, and the network ties what it ties.
        files: texts to write beside the weights, by name.
        folders: where tokenizers and the like lie, by the folder below the new one; empty for the bank's own alone.
        settled: the operator without settings that depend on which other steps the bank holds; None where it has none.
        measured: see `Candidate`.
    """

    row: int
    arch: Mapping[str, Any]
    pieces: tuple[Piece, ...]
    recipe: Mapping[str, Any]
    others: Mapping[str, tuple[CheckpointBank, int]] = field(default_factory=dict)
    whole: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    settled: object | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def gone(self) -> set[str]:
        """Names of the checkpoint's tensors that are not copied: read by a piece, or written by one."""
        return {name for piece in self.pieces for name in (*piece.reads, *piece.writes)}

    def shapes(self, before: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the new model's tensors, by name, from those of the checkpoint."""
        gone = self.gone
        kept = {name: shape for name, shape in before.items() if name not in gone and not self.whole}
        return kept | {name: tuple(shape) for piece in self.pieces for name, shape in piece.writes.items()}

    def ties(self, bank: CheckpointBank) -> Mapping[str, str]:
        """Further names of the new model's tensors in files; see `lcsc.bank.Layout`."""
        return {} if self.whole else bank.layout.ties


@runtime_checkable
class Transforms(Protocol):
    """What an operator offers beside `Operator` when it can make a model of one checkpoint without a search."""

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """How the model at a point is made; None means the settings alone, without a search."""
        ...


def told(operator: object, point: Point | None, plan: Plan) -> dict[str, Any]:
    """What a recipe says beside a plan's own: the operator's settings and the point, enough to plan it again."""
    operator = operator if plan.settled is None else plan.settled
    floats = {name: np.asarray(x, np.float64).tolist() for name, x in (point or {}).items()}
    return {"settings": plain(describe("operator", operator)), "point": floats}


def row_of(bank: CheckpointBank, step: int | None, name: str = "step") -> int:
    """The bank's row of a training step, the last for None; raises ConfigError for a step that it lacks.

    Args:
        bank: any.
        step: as it was set.
        name: of the setting, for the message.
    """
    if step is None:
        return bank.num_checkpoints - 1
    if step not in bank.steps:
        raise ConfigError(
            f"`operator.{name}` is {step}; the bank `{bank.path}` has steps {bank.steps[0]} to {bank.steps[-1]}, of "
            f"which {min(bank.steps, key=lambda s: abs(s - step))} is nearest. Take one of them."
        )
    return bank.steps.index(step)


def one_or_each(name: str, given: Any) -> Any:
    """A setting that is null, one number above 0, or a list of one a layer; lists come back as tuples.

    A tuple is equal and hashable, whatever kind of list it came as.

    Raises:
        ConfigError: naming the setting, for anything else.
    """
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    numbers = list(given) if listed else [given]
    if given is not None and not (numbers and all(type(n) is int and n > 0 for n in numbers)):
        raise ConfigError(f"`operator.{name}` is `{given}`; give a number above 0, or a list of one a layer.")
    return tuple(numbers) if listed else given


def refuse_ties(bank: CheckpointBank, names: Collection[str]) -> None:
    """Raise BankError where one of the tensors to remake shares its numbers with another."""
    for name, twin in bank.layout.ties.items():
        if name in names or twin in names:
            raise BankError(
                f"`{name}` and `{twin}` of `{bank.path}` are one tensor; it cannot be remade for one of them."
            )


def flat_row(bank: CheckpointBank, k: int) -> Tensor:
    """Row k, float32, shape (P,); from the files where the bank does not hold it, because differences are rounded."""
    if bank.storage == "resident":
        return bank.matrix()[k].float().cpu()
    row, theta_P = bank.rows[k], torch.empty(bank.layout.num_parameters)
    for entry in bank.layout.entries:
        source = row.table[entry.name]
        numbers = to_float32(read_source(row.files, source, row.base), source.dtype)
        theta_P[entry.start : entry.stop] = torch.from_numpy(numbers.reshape(-1))
    return theta_P


def candidate(plan: Plan, bank: CheckpointBank) -> Candidate:
    """The planned model in memory, float32."""
    old = bank.layout.views(flat_row(bank, plan.row))
    for tag, (other, row) in plan.others.items():
        old |= {f"{tag}:{name}": tensor for name, tensor in other.layout.views(flat_row(other, row)).items()}
    made: dict[str, Tensor] = {}
    facts = []
    for piece in plan.pieces:
        tensors, fact = piece.made(old)
        made |= tensors
        facts.append(fact)
    own = {entry.name: entry.shape for entry in bank.layout.entries}
    layout = Layout.of(plan.shapes(own), plan.ties(bank))

    def write(out_P: Tensor) -> None:
        layout.flatten({**old, **made}, out_P)

    constants = {} if plan.whole else bank.constants
    recipe = {**plan.recipe, "pieces": facts}
    return Candidate(plan.arch, layout, write, recipe, constants, measured=plan.measured)

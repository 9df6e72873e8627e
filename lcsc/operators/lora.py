"""Linear combination of LoRA checkpoints, by their updates. K = checkpoints, P = flat parameters, M = modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.lora import product_gram
from lcsc.bank.lora_modules import FACTOR_SPACE, Modules, combine_modules
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.linear import Linear

#: Directions that carry less than this share of the updates' squared length are rounding, not movement.
NOISE = 1e-13


#: of a bank that has no tensors by name
_NO_TENSORS = Layout(())


@dataclass(frozen=True, eq=False)
class View:
    """Vectors with which the linear operator sees a LoRA bank: the same steps, but other numbers.

    `W_KD` has one row a checkpoint. For updates the rows are short and only their inner products mean anything.
    """

    path: Path
    steps: tuple[int, ...]
    W_KD: np.ndarray
    layout: Layout = _NO_TENSORS

    @property
    def num_checkpoints(self) -> int:
        """K."""
        return len(self.W_KD)

    def blocks(self, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows, a few columns at a time."""
        for start in range(0, self.W_KD.shape[1], columns):
            part = slice(start, min(start + columns, self.W_KD.shape[1]))
            yield part, self.W_KD[:, part]


@functools.lru_cache(maxsize=4)
def modules_of(bank: CheckpointBank) -> Modules:
    """The bank's modules, found once."""
    return Modules(bank)


@functools.lru_cache(maxsize=4)
def update_view(bank: CheckpointBank) -> View:
    """Vectors whose inner products are those of the checkpoints' updates, centred, from the K x K Gram matrix alone."""
    modules, K = modules_of(bank), bank.num_checkpoints
    gram_KK = np.zeros((K, K))
    for pair, scale_K in zip(modules.pairs, modules.scale_MK, strict=True):
        gram_KK += product_gram(modules.rows(pair.A), modules.rows(pair.B), scale_K)
    for name in modules.rest:
        W_KD = modules.rows(name).reshape(K, -1).astype(np.float64)
        gram_KK += W_KD @ W_KD.T
    size = np.trace(gram_KK)
    gram_KK = gram_KK - gram_KK.mean(0) - gram_KK.mean(1, keepdims=True) + gram_KK.mean()
    values_D, vectors_KD = np.linalg.eigh(gram_KK)
    values_D[values_D < NOISE * size] = 0
    return View(bank.path, bank.steps, vectors_KD * np.sqrt(values_D))


@functools.lru_cache(maxsize=4)
def factor_view(bank: CheckpointBank) -> View:
    """The factors themselves, as they lie in the bank."""
    return View(bank.path, bank.steps, bank.matrix().float().cpu().numpy())


@register("operator", "lora", source="LCSC, arXiv:2404.02241, on the updates of LoRA, arXiv:2106.09685")
@dataclass(frozen=True)
class Lora:
    """sum_k coef_k (scale_k B_k A_k) of LoRA checkpoints, recompressed to low rank, with coefficients that sum to one.

    Args:
        rank: rank of the combined adapter, with scale 1; null keeps each module's rank and scale, so that the result
            takes the place of a checkpoint. The rank that loses nothing is K times that of the checkpoints.
        factors: combine A and B on their own instead. That is not the combination of the updates: for signed
            coefficients the two differ by as much as the update itself (lcsc/bank/lora.py has numbers).
        whitening: as in the linear operator, with lengths measured on the updates.
    """

    rank: int | None = None
    factors: bool = False
    whitening: float = 0.5

    def __post_init__(self) -> None:
        _ = self._linear  # checks `whitening`
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"`operator.rank` is {self.rank}; it must be at least 1, or null to keep the rank.")
        if self.factors and self.rank is not None:
            raise ConfigError(f"`operator.rank` is {self.rank}, but factors keep their rank. Leave one of the two out.")

    @property
    def _linear(self) -> Linear:
        return Linear(self.whitening)

    def _view(self, bank: CheckpointBank) -> Any:
        modules_of(bank)  # also a search in factor space is refused for other banks
        return factor_view(bank) if self.factors else update_view(bank)

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """K - 1 unbounded coordinates of the sum-to-one plane."""
        return self._linear.space(self._view(bank))

    def coefficients(self, bank: CheckpointBank, point: Point) -> np.ndarray:
        """The point's coefficients, float64, shape (K,), sum one to rounding."""
        return self._linear.coefficients(self._view(bank), point)

    def point(self, bank: CheckpointBank, coef_K: np.ndarray) -> dict[str, np.ndarray]:
        """The point whose coefficients are `coef_K`, shape (K,)."""
        return self._linear.point(self._view(bank), coef_K)

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Those of the linear operator."""
        rows = self._linear.baselines(self._view(bank))
        if not self.factors:
            return rows
        return [Baseline(row.family, f"{row.label} ({FACTOR_SPACE})", row.point) for row in rows]

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The combined adapter; its recipe says how much the truncation to its rank lost."""
        modules, coef_K = modules_of(bank), self.coefficients(bank, point)
        found, made = combine_modules(modules, coef_K, self.rank, factors=self.factors)
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}
        layout = bank.layout if self.factors else Layout.of({name: t.shape for name, t in tensors.items()})

        def write(out_P: Tensor) -> None:
            layout.flatten(tensors, out_P)

        recipe = {"operator": "lora", "steps": list(bank.steps), "coef": coef_K.tolist(), **made}
        recipe["adapter"] = dict(modules.settings(self.rank) or {})
        alphas = modules.integer_alphas if self.rank is not None else ()
        constants = {**bank.constants, **{name: torch.full_like(bank.constants[name], self.rank) for name in alphas}}
        return Candidate(None, layout, write, recipe, constants, modules.files(self.rank))

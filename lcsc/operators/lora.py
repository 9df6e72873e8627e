"""Linear combination of LoRA checkpoints, by their updates. K = checkpoints, P = flat parameters, M = modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.lora import LoraPair, adapter_settings, combine_products, lora_pairs, lora_scale, product_gram
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Point, SearchSpace
from lcsc.kernels import combine
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.linear import Linear

FACTOR_SPACE = "factor space: not the combination of the updates"
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


class Adapter:
    """A LoRA bank, module by module.

    Args:
        bank: opened; its rows are read when they are first used.

    Raises:
        BankError: no LoRA, or factors that do not fit together.
    """

    def __init__(self, bank: CheckpointBank) -> None:
        self.bank = bank
        self.places = {entry.name: entry for entry in bank.layout.entries}
        self.places |= {name: self.places[twin] for name, twin in bank.layout.ties.items()}
        constants = {name: tuple(value.shape) for name, value in bank.constants.items()}
        shapes = {name: entry.shape for name, entry in self.places.items()}
        self.pairs = lora_pairs({**constants, **shapes})
        if not self.pairs:
            raise BankError(
                f"`{bank.path}` holds no LoRA factors, such as `lora_A` and `lora_B`. Use operator=linear for weights."
            )
        if integers := [name for pair in self.pairs for name in (pair.A, pair.B) if name not in shapes]:
            raise BankError(f"the LoRA factor `{integers[0]}` does not hold floats. Save the adapter unquantized.")
        factors = {name for pair in self.pairs for name in (pair.A, pair.B, pair.alpha)}
        #: names of float tensors that are no factors (modules trained in full): combined as weights
        self.rest = tuple(entry.name for entry in bank.layout.entries if entry.name not in factors)
        self.settings = [adapter_settings(row.files) for row in bank.rows]
        self.scale_MK = np.array([self._scales(pair) for pair in self.pairs])

    def tensor(self, name: str) -> Tensor:
        """A tensor of all checkpoints, shape (K, ...), in the bank's dtype."""
        place = self.places[name]
        return self.bank.matrix()[:, place.start : place.stop].reshape(-1, *place.shape)

    def numbers(self, name: str) -> np.ndarray:
        """A tensor of all checkpoints, shape (K, ...), float64."""
        return self.tensor(name).double().cpu().numpy()

    def rank(self, pair: LoraPair) -> int:
        """A module's rank."""
        return self.places[pair.A].shape[0]

    def _scales(self, pair: LoraPair) -> list[float]:
        if pair.alpha is None:
            alphas: list[float | None] = [None] * self.bank.num_checkpoints
        elif pair.alpha in self.places:
            alphas = [float(alpha) for alpha in self.tensor(pair.alpha).reshape(-1)]
        else:  # an integer, which is not combined
            alphas = [float(self.bank.constants[pair.alpha])] * self.bank.num_checkpoints
        return [lora_scale(pair, self.rank(pair), a, s) for a, s in zip(alphas, self.settings, strict=True)]


@functools.lru_cache(maxsize=4)
def adapter_of(bank: CheckpointBank) -> Adapter:
    """The bank's modules, found once."""
    return Adapter(bank)


@functools.lru_cache(maxsize=4)
def update_view(bank: CheckpointBank) -> View:
    """Vectors whose inner products are those of the checkpoints' updates, centred, from the K x K Gram matrix alone."""
    adapter = adapter_of(bank)
    K = bank.num_checkpoints
    gram_KK = np.zeros((K, K))
    for pair, scale_K in zip(adapter.pairs, adapter.scale_MK, strict=True):
        gram_KK += product_gram(adapter.numbers(pair.A), adapter.numbers(pair.B), scale_K)
    for name in adapter.rest:
        W_KD = adapter.numbers(name).reshape(K, -1)
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
        adapter_of(bank)  # also a search in factor space is refused for other banks
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
        adapter, coef_K = adapter_of(bank), self.coefficients(bank, point)
        recipe: dict[str, Any] = {"operator": "lora", "steps": list(bank.steps), "coef": coef_K.tolist()}
        if self.factors:
            theta_P, layout, more = _factors(adapter, coef_K)
        else:
            theta_P, layout, more = _updates(adapter, coef_K, self.rank)

        def write(out_P: Tensor) -> None:
            out_P.copy_(theta_P)

        settings = _settings(adapter, self.rank)
        arch = bank.arch or {"class": "lora", "config": settings}
        constants = {**bank.constants, **_integer_alphas(adapter, self.rank)}
        return Candidate(arch, layout, write, {**recipe, **more, "adapter": settings}, constants)


def _factors(adapter: Adapter, coef_K: np.ndarray) -> tuple[Tensor, Layout, Mapping[str, Any]]:
    """All tensors combined on their own, alpha copied from the last checkpoint."""
    bank = adapter.bank
    theta_P = torch.empty(bank.layout.num_parameters)
    bank.combine(torch.from_numpy(coef_K), out=theta_P)
    views = bank.layout.views(theta_P)
    for pair in adapter.pairs:
        if pair.alpha in views:
            views[pair.alpha].copy_(adapter.tensor(pair.alpha)[-1])
    return theta_P, bank.layout, {"space": FACTOR_SPACE}


def _updates(adapter: Adapter, coef_K: np.ndarray, rank: int | None) -> tuple[Tensor, Layout, Mapping[str, Any]]:
    """The combined updates as factors of `rank`, and what that lost."""
    bank = adapter.bank
    shapes = {name: place.shape for name, place in adapter.places.items()}
    for pair in adapter.pairs if rank is not None else ():
        shapes[pair.A] = (rank, *shapes[pair.A][1:])
        shapes[pair.B] = (shapes[pair.B][0], rank, *shapes[pair.B][2:])
    layout = Layout.of(shapes)  # tied factors do not stay tied
    theta_P = torch.empty(layout.num_parameters)
    views = layout.views(theta_P)
    for name in adapter.rest:
        W_KD = adapter.tensor(name).reshape(len(coef_K), -1).contiguous()
        combine(torch.from_numpy(coef_K), W_KD, out_BP=views[name].view(-1))
    for name, twin in bank.layout.ties.items():
        views[name].copy_(views[twin])  # those of the rest; factors follow
    used = np.flatnonzero(coef_K)
    alone = int(used[0]) if rank is None and len(used) == 1 and coef_K[used[0]] == 1 else None
    errors: dict[str, float] = {}
    for pair, scale_K in zip(adapter.pairs, adapter.scale_MK, strict=True):
        kept = scale_K[-1] if rank is None else 1.0
        if alone is not None and scale_K[alone] == kept:  # the checkpoint itself, bit for bit
            A, B = adapter.tensor(pair.A)[alone], adapter.tensor(pair.B)[alone]
            errors[pair.module] = 0.0
        else:
            A_K, B_K = adapter.numbers(pair.A), adapter.numbers(pair.B)
            wanted = adapter.rank(pair) if rank is None else rank
            new_A, new_B, errors[pair.module] = combine_products(A_K, B_K, coef_K, scale_K, wanted, scale=kept)
            A, B = torch.from_numpy(new_A), torch.from_numpy(new_B)
        views[pair.A].copy_(A)
        views[pair.B].copy_(B)
        if pair.alpha in views:
            views[pair.alpha].copy_(adapter.tensor(pair.alpha)[-1] if rank is None else torch.tensor(float(rank)))
    worst = max(errors, key=lambda module: errors[module])
    lost = {"max": errors[worst], "max_module": worst, "mean": float(np.mean(list(errors.values())))}
    return theta_P, layout, {"space": "product", "rank": rank, "error": lost}


def _settings(adapter: Adapter, rank: int | None) -> dict[str, Any]:
    """The last checkpoint's settings (PEFT's or diffusers'), made true for another rank; empty where it has none."""
    settings = dict(adapter.settings[-1] or {})
    if rank is None:
        return settings
    changed = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {key: changed.get(key.rpartition(".")[2], value) for key, value in settings.items()}


def _integer_alphas(adapter: Adapter, rank: int | None) -> dict[str, Tensor]:
    """Alphas that are no floats and so lie outside the layout, for another rank."""
    names = [pair.alpha for pair in adapter.pairs if pair.alpha in adapter.bank.constants]
    return {} if rank is None else {name: torch.full_like(adapter.bank.constants[name], rank) for name in names}

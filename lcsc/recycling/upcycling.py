"""Experts of a mixture from the feed-forward block of a dense layer. E = experts, I = units of the block, D = width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: axis of the units in the tensors of a feed-forward block, by role; the last bias has none
UNITS: dict[str, int | None] = {"gate": 0, "up": 0, "up_bias": 0, "down": 1, "down_bias": None}

Block = dict[str, Tensor]


@dataclass(frozen=True)
class Experts:
    """How one block becomes several.

    Args:
        count: E, a multiple of `groups`.
        groups: each expert is one of so many equal slices of the units; `groups` neighbours are a whole block (virtual
            groups, arXiv:2410.07524). 1 gives every expert the whole block.
        noise: Gaussian noise on every tensor of an expert, in standard deviations of that tensor.
        drop: share of an expert's units that is drawn anew, from a normal distribution with mean and standard deviation
            of what it replaces (Drop-Upcycling, arXiv:2502.19261). The same units in all tensors of an expert.
        scale: the last projection is multiplied by it, its bias is not.
        router_std: standard deviation of the router's rows; rows of one block are equal.
        fresh: generator of an expert's numbers, by its index; that of index E is the router's.
    """

    count: int
    groups: int
    noise: float
    drop: float
    scale: float
    router_std: float
    fresh: Callable[[int], np.random.Generator]

    def router(self, width: int, dtype: torch.dtype) -> Tensor:
        """The router, shape (E, D): softmax((x @ router.T)) says how much a token x wants each expert."""
        rows = self.fresh(self.count).standard_normal((self.count // self.groups, width))
        return (self.router_std * torch.from_numpy(rows)).to(dtype).repeat_interleave(self.groups, 0)

    def expert(self, block: Mapping[str, Tensor], index: int) -> Block:
        """One expert.

        Args:
            block: the dense block by role (`UNITS`), any float dtype: `gate` and `up` (I, D), `down` (D, I),
                biases `up_bias` (I,) and `down_bias` (D,).
            index: of the expert.

        Returns:
            The same roles in their dtypes, with I / groups units. Without noise, drop and scale they have its bits.
        """
        rng = self.fresh(index)
        made = {role: _slice(role, tensor, index % self.groups, self.groups) for role, tensor in block.items()}
        if self.scale != 1:
            made["down"] = (made["down"].double() * self.scale).to(block["down"].dtype)
        if self.drop:
            made = _dropped(made, self.drop, rng)
        if self.noise:
            made = {role: _noisy(tensor, self.noise, rng) for role, tensor in made.items()}
        return made


def _slice(role: str, tensor: Tensor, part: int, parts: int) -> Tensor:
    axis = UNITS[role]
    return tensor if axis is None or parts == 1 else tensor.chunk(parts, axis)[part]


def _noisy(tensor: Tensor, noise: float, rng: np.random.Generator) -> Tensor:
    drawn = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
    return (tensor.double() + noise * _std(tensor) * drawn).to(tensor.dtype)


def _std(tensor: Tensor) -> Tensor:
    return tensor.double().std(correction=0)


def _dropped(block: Block, share: float, rng: np.random.Generator) -> Block:
    num_units = len(block["up"])
    units = torch.from_numpy(np.sort(rng.choice(num_units, int(share * num_units), replace=False)))
    out = {}
    for role in UNITS:
        if role not in block:
            continue
        tensor, axis = block[role], UNITS[role]
        if axis is None or not len(units):
            out[role] = tensor
            continue
        old = tensor.index_select(axis, units).double()
        drawn = old.mean() + _std(old) * torch.from_numpy(rng.standard_normal(tuple(old.shape)))
        out[role] = tensor.index_copy(axis, units, drawn.to(tensor.dtype))
    return {role: out[role] for role in block}

"""Fewer key/value heads for a trained model: grouped-query attention. L = layers, H = key/value heads."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import ITEMSIZE
from lcsc.bank.lora import refuse_lora
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Choices, Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, Plan, candidate, one_or_each, refuse_ties, row_of
from lcsc.recycling.attention import Attention, find_attention, heads_settings
from lcsc.recycling.heads import Pooling, regroup

#: ways to make one head of several, the default first: the box `pooling` counts in them
METHODS = ("aligned", "mean", "first", "random")
GROUPINGS = ("order", "similarity")
#: largest logarithm of a head's weight, up and down, that is searched
LIMIT = 4.0


@register("operator", "gqa", source="arXiv:2305.13245; heads aligned before pooling, arXiv:2412.20677")
@dataclass(frozen=True)
class Gqa:
    """Key/value heads of one checkpoint in groups, each pooled to one head; what is left null is searched.

    Without a search, null `pooling` is `aligned` and null `grouping` is `order`.

    Args:
        num_kv_heads: heads of every layer, or a list with one number a layer; divisors of the present number.
        max_kv_heads: sum over the layers that a search of numbers fills; null lets it choose them freely.
        per_layer: search a number for each layer; otherwise one for all.
        pooling: `aligned` (mean of heads that are first turned towards one another), `mean` (the paper's), `first` or
            `random`.
        grouping: `order` (neighbours) or `similarity`.
        restore_norm: give pooled heads the mean length of theirs; null: for aligned ones only.
        repeat_heads: where layers differ, repeat their heads up to one number, which is all that the classes of
            transformers can read; false keeps each layer's own number (`per_layer_config`), which lcsc opens.
        head_weights: search the weights of the heads within their groups, for keys and values.
        step: training step of the checkpoint; null is the last.
        seed: of random heads.
    """

    num_kv_heads: Any = None
    max_kv_heads: int | None = None
    per_layer: bool = True
    pooling: str | None = None
    grouping: str | None = None
    restore_norm: bool | None = None
    repeat_heads: bool = True
    head_weights: bool = False
    step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("pooling", self.pooling, METHODS), ("grouping", self.grouping, GROUPINGS)):
            if value is not None and value not in known:
                raise ConfigError(f"`operator.{name}` is `{value}`.{did_you_mean(str(value), known)}")
        self.__dict__["num_kv_heads"] = one_or_each("num_kv_heads", self.num_kv_heads)
        self._check_pairs()
        _ = SeedRange(self.seed, Purpose.TRAIN)  # checks it

    def _check_pairs(self) -> None:
        """Raise ConfigError for settings that would be ignored beside another."""
        if self.max_kv_heads is not None and self.num_kv_heads is not None:
            raise ConfigError(
                f"`operator.max_kv_heads` is {self.max_kv_heads}, but `num_kv_heads` fixes the numbers. Leave one out."
            )
        if not self.per_layer and (self.max_kv_heads is not None or self.num_kv_heads is not None):
            raise ConfigError("`operator.per_layer` is false, which is for free numbers of heads. Leave it out.")
        if self.pooling in ("first", "random") and (self.head_weights or self.restore_norm is not None):
            raise ConfigError(
                f"`operator.pooling` is `{self.pooling}`, which has neither weights nor a norm to restore. Leave "
                "`head_weights` and `restore_norm` out."
            )

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Whatever of numbers, pooling, grouping and weights is not fixed; zeros are the defaults."""
        found = self._attention(bank)
        L, H = len(found.layers), found.num_kv_heads
        self._counts(found, None)  # refuses numbers that do not fit
        boxes = []
        if self.num_kv_heads is None:
            boxes.append(Box("groups", L if self.per_layer else 1, 0.0, 1.0, scale=0.25, choices=self._choices(found)))
        if self.pooling is None:
            boxes.append(Box("pooling", 1, 0.0, float(len(METHODS)), scale=0.5))
        if self.grouping is None:
            boxes.append(Box("grouping", 1, 0.0, float(len(GROUPINGS)), scale=0.5))
        if self.head_weights:
            boxes += [Box(name, L * H, -LIMIT, LIMIT, scale=0.5, level=1) for name in ("key_weights", "value_weights")]
        return SearchSpace(tuple(boxes))

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Each pooling that is not excluded, with the same number of heads in all layers."""
        space, found = self.space(bank), self._attention(bank)
        floats = [None]
        if self.num_kv_heads is None and self.max_kv_heads is None:
            places = np.arange(len(found.choices) - 1)  # all heads is no change
            floats = [(place + 0.5) / len(found.choices) for place in places]
        elif self.num_kv_heads is None:
            floats = [0.5]
        rows = []
        for method in METHODS if self.pooling is None else (self.pooling,):
            for at in floats:
                point = space.to_point(np.zeros(space.size))
                if at is not None:
                    point["groups"][:] = at
                if self.pooling is None:
                    point["pooling"][:] = METHODS.index(method) + 0.5
                counts = self._counts(found, point)
                same = f"{counts[0]}" if len(set(counts)) == 1 else ",".join(map(str, counts))
                rows.append(Baseline(method, f"{method}, {same} key/value heads", point))
        return rows

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The model with fewer key/value heads."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """How it is made; see `lcsc.operators.surgery`.

        Where layers have different numbers of heads, the new configuration has their least common multiple, and the
        pooled heads are repeated up to it, or (`repeat_heads=false`) each layer's own number. The recipe tells both
        sizes of the cache.
        """
        found, arch, row = self._attention(bank), need_arch(bank), row_of(bank, self.step)
        refuse_ties(bank, {name for layer in found.layers for name in layer.values()})
        if point is None and self.num_kv_heads is None:
            raise ConfigError(
                f"`operator.num_kv_heads` is not set, and nothing is searched here. Choose one of {found.choices}, or "
                "a list of one a layer."
            )
        counts = self._counts(found, point)
        method = self.pooling or _choice(point, "pooling", METHODS)
        grouping = self.grouping or _choice(point, "grouping", GROUPINGS)
        restore = method == "aligned" if self.restore_norm is None else self.restore_norm
        stored = (math.lcm(*counts),) * len(counts) if self.repeat_heads else counts
        pieces = []
        for i, (names, count, kept) in enumerate(zip(found.layers, counts, stored, strict=True)):
            weights = {f"{role}_weights_H": _weights(point, f"{role}_weights", found, i) for role in ("key", "value")}
            how = Pooling(
                count,
                method,
                similar=grouping == "similarity",
                restore_norm=restore,
                copies=kept // count,
                fresh=functools.partial(SeedRange(self.seed, Purpose.TRAIN).generator, i),
                std=float(arch["config"].get("initializer_range") or 0.02),
                **weights,
            )
            pieces.append(_piece(names, found, how, bank.layout.shapes))
        recipe = {
            "operator": "gqa",
            "steps": [bank.steps[row]],
            "pooling": method,
            "grouping": grouping,
            "restore_norm": restore,
            "seed": self.seed,
            "num_kv_heads": list(counts),
            "stored_kv_heads": stored[0] if len(set(stored)) == 1 else list(stored),
            "cache_bytes_per_token": cache_bytes(found, counts, bank),
            "stored_cache_bytes_per_token": cache_bytes(found, stored, bank),
        }
        config = {**arch["config"], **heads_settings(stored)}
        return Plan(row, {**arch, "config": config}, tuple(pieces), recipe)

    # ------------------------------------------------------------------------------------------------- details

    def _choices(self, found: Attention) -> Choices | None:
        """Numbers of heads that floats above 1 name; None without a sum to keep."""
        if self.max_kv_heads is None:
            return None
        num = len(found.choices)
        floats = tuple(1 + (place + 0.5) / num for place in range(num))
        return Choices(floats, found.choices, self.max_kv_heads, "heads")

    def _attention(self, bank: CheckpointBank) -> Attention:
        shapes = bank.layout.shapes
        refuse_lora(shapes, bank.path)
        return find_attention(need_arch(bank), shapes, bank.path)

    def _counts(self, found: Attention, point: Point | None) -> tuple[int, ...]:
        """Heads of each layer at a point, or as set; raises ConfigError for numbers that do not divide the heads."""
        L, choices = len(found.layers), found.choices
        if self.num_kv_heads is not None:
            listed = not isinstance(self.num_kv_heads, int)
            counts = tuple(self.num_kv_heads) if listed else (self.num_kv_heads,) * L
            if len(counts) != L:
                raise ConfigError(f"`operator.num_kv_heads` has {len(counts)} numbers for {L} layers. Give one each.")
            if wrong := [n for n in counts if n not in choices]:
                raise ConfigError(
                    f"`operator.num_kv_heads` is {wrong[0]}, and {found.num_kv_heads} key/value heads cannot be "
                    f"divided into {wrong[0]} equal groups. Choose one of {choices}."
                )
            return counts
        if self.max_kv_heads is not None and self.max_kv_heads < L:
            raise ConfigError(f"`operator.max_kv_heads` is {self.max_kv_heads} for {L} layers; each needs at least 1.")
        x_L = np.zeros(L) if point is None else np.broadcast_to(np.asarray(point["groups"], np.float64), (L,))
        if self.max_kv_heads is not None:
            if not (x_L > 1).all():
                return fill(x_L, choices, self.max_kv_heads)
            x_L = x_L - 1  # floats above 1 name the numbers themselves, whatever they sum to; see `_choices`
        return tuple(choices[min(int(x * len(choices)), len(choices) - 1)] for x in x_L)


def fill(x_L: np.ndarray, choices: Sequence[int], budget: int) -> tuple[int, ...]:
    """Numbers of heads that sum to at most `budget`, each one of `choices`; larger floats get more.

    All layers begin with the smallest. The layer whose float is furthest above its place gets the next, as long as one
    fits.
    """
    place_L = np.zeros(len(x_L), int)
    while True:
        spent = sum(choices[place] for place in place_L)
        steps = [
            (float(x - place / len(choices)), -layer)
            for layer, (x, place) in enumerate(zip(x_L, place_L, strict=True))
            if place + 1 < len(choices) and spent + choices[place + 1] - choices[place] <= budget
        ]
        if not steps:
            return tuple(choices[place] for place in place_L)
        place_L[-max(steps)[1]] += 1


def cache_bytes(found: Attention, counts: Sequence[int], bank: CheckpointBank) -> int:
    """Bytes of keys and values that one token keeps, in the dtype of the checkpoint: 2 sum_l heads_l d bytes."""
    size = ITEMSIZE[bank.dtypes[found.layers[0]["k.weight"]]]
    return 2 * sum(counts) * found.head_size * size


def _choice(point: Point | None, name: str, known: Sequence[str]) -> str:
    at = 0 if point is None else int(np.asarray(point[name]).reshape(-1)[0])
    return known[min(max(at, 0), len(known) - 1)]


def _weights(point: Point | None, name: str, found: Attention, layer: int) -> Tensor | None:
    """Weights of a layer's heads from their logarithms; None for equal ones."""
    if point is None or name not in point:
        return None
    H = found.num_kv_heads
    return torch.from_numpy(np.exp(np.asarray(point[name], np.float64)[layer * H : (layer + 1) * H]))


def _piece(names: Mapping[str, str], found: Attention, how: Pooling, shapes: Mapping[str, tuple[int, ...]]) -> Piece:
    """The attention of one layer."""
    rows, H = how.num_groups * how.copies * found.head_size, found.num_kv_heads
    writes = {
        name: (rows, *shapes[name][1:]) if role.split(".")[0] in "kv" else shapes[name] for role, name in names.items()
    }

    def make(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        made, groups = regroup(
            {role: tensors[name] for role, name in names.items()}, found.head_size, found.rotary_dims, how
        )
        return {names[role]: tensor for role, tensor in made.items()}, {"groups": [list(group) for group in groups]}

    return Piece(tuple(names.values()), writes, make, {"groups": [[H]] * H})

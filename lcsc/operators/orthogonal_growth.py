"""A trained model with more layers (copies beside their originals) and more experts (noisy copies). L = layers."""

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
from lcsc.bank.lora import refuse_lora
from lcsc.core.errors import BankError, ConfigError, did_you_mean
from lcsc.core.registry import plain, register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.gqa import fill
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, Plan, candidate, one_or_each, refuse_ties, row_of
from lcsc.recycling.growth import (
    METHODS,
    Decoder,
    Duplication,
    Mixture,
    check_top_k,
    duplicated,
    feed_forward_norm,
    find_decoder,
    grown_config,
    layer_order,
    original,
    scaled_outputs,
)

AXES = ("depth", "width", "both")
ORDERS = ("depth_first", "width_first")
#: the paper's noise; a search tries it times 10^x for x in the box `noise`
NOISE = 0.01
#: which layers are copied where not all are: rules for the baselines
RULES = ("spread", "first", "last")


@register("operator", "orthogonal_growth", source="arXiv:2510.08008")
@dataclass(frozen=True)
class OrthogonalGrowth:
    """More layers and more experts for one checkpoint; what is left null is searched.

    Without a search, null `method` is `interposition`, `copies` 2, `noise` 0.01 and `scale_top_k` true.

    Args:
        axis: `depth`, `width` (mixtures only) or `both`.
        order: of the two: `depth_first` draws noise for every layer, `width_first` copies layers with their noise.
        method: `interposition` (each layer is followed by its copies) or `stack` (the whole is repeated).
        copies: how often a layer is there, or a list with one number a layer; at least 1.
        max_copies: most copies of a layer that a search tries.
        num_layers: sum over the layers that a search fills; null lets it choose them freely.
        keep_first, keep_last: layers at the edges that are there once.
        copy_scale: multiplies what copies write into the stream of layers; 0 keeps the function. Null is searched for
            each layer; without a search it is 1.
        expert_copies: how often an expert is there.
        noise: of the copied experts, in standard deviations of each matrix; originals stay.
        noise_router: whether the copies' rows of the router get noise as well.
        scale_top_k: whether a token goes to as many times more experts.
        step: training step of the checkpoint; null is the last.
        seed: of the noise.
    """

    axis: str = "depth"
    order: str = "depth_first"
    method: str | None = None
    copies: Any = None
    max_copies: int = 2
    num_layers: int | None = None
    keep_first: int = 0
    keep_last: int = 0
    copy_scale: float | None = 1.0
    expert_copies: int = 2
    noise: float | None = None
    noise_router: bool = True
    scale_top_k: bool | None = None
    step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = (("axis", AXES), ("order", ORDERS), ("method", METHODS))
        for name, known in choices:
            value = getattr(self, name)
            if value not in known and (name != "method" or value is not None):
                raise ConfigError(f"`operator.{name}` is `{value}`.{did_you_mean(str(value), known)}")
        self.__dict__["copies"] = one_or_each("copies", self.copies)
        for name, least in (("max_copies", 2), ("expert_copies", 2), ("keep_first", 0), ("keep_last", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`operator.{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("copy_scale", "noise"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ConfigError(f"`operator.{name}` is {value}; it must be at least 0.")
        if self.num_layers is not None and self.copies is not None:
            raise ConfigError(f"`operator.num_layers` is {self.num_layers}, but `copies` fixes them. Leave one out.")
        _ = SeedRange(self.seed, Purpose.TRAIN)  # checks it

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Whatever of method, copies, their scale, noise and top-k is not fixed; zeros are the defaults."""
        found, boxes = self._decoder(bank), []
        if self.axis != "width":
            if self.method is None:
                boxes.append(Box("method", 1, 0.0, float(len(METHODS)), scale=0.5))
            if self.copies is None:
                boxes.append(Box("copies", len(found.layers), -1.0, 1.0, scale=0.5))
            if self.copy_scale is None:
                boxes.append(Box("damping", len(found.layers), 0.0, 1.0, scale=0.3))
        if self.axis != "depth":
            if self.noise is None:
                boxes.append(Box("noise", 1, -2.0, 1.7, scale=0.5))
            if self.scale_top_k is None and _mixture_of(found, bank).normalized:
                boxes.append(Box("top_k", 1, 0.0, 2.0, scale=0.5))
        space = SearchSpace(tuple(boxes))
        self.plan(bank, space.to_point(np.zeros(space.size)))  # refuses settings that do not fit
        return space

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """The paper's choices, as far as they are free: both methods, copies of all layers or by a rule, zeroed or not,
        and top-k kept.
        """
        space, found = self.space(bank), self._decoder(bank)
        names, rows = {box.name for box in space.boxes}, []

        def add(family: str, **values: Any) -> None:
            point = space.to_point(np.zeros(space.size))
            for name, value in values.items():
                point[name][:] = value
            layers = len(self._order(found, point))
            rows.append(Baseline(family, f"{family}, {layers} layers", point))

        methods = METHODS if "method" in names and self.axis != "width" else (self.method or METHODS[0],)
        rules = RULES if self.num_layers is not None and self.axis != "width" else (None,)
        for method in methods:
            for rule in rules:
                values: dict[str, Any] = {"method": METHODS.index(method) + 0.5} if "method" in names else {}
                if rule is not None:
                    values["copies"] = self._by_rule(found, rule)
                growth = "width" if self.axis == "width" else method
                add(growth if rule is None else f"{growth} {rule}", **values)
        for rule in rules if "damping" in names else ():
            where = {} if rule is None else {"copies": self._by_rule(found, rule)}
            add("zeroed" if rule is None else f"zeroed {rule}", damping=1.0, **where)
        if "top_k" in names:
            add("top-k kept", top_k=1.5)
        return rows if space.size else []

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The grown model."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """How it is made; see `lcsc.operators.surgery`."""
        found, arch, row = self._decoder(bank), need_arch(bank), row_of(bank, self.step)
        refuse_ties(bank, {name for layer in found.layers for name in layer.values()})
        order = self._order(found, point)
        config = grown_config(found, arch["config"], order)
        recipe: dict[str, Any] = {"operator": "orthogonal_growth", "steps": [bank.steps[row]], "axis": self.axis}
        if self.axis != "width":
            method = self._method(point)
            recipe |= {"method": method, "num_layers": len(order), "layers": list(order)}
            recipe["copy_scale"] = [self._scale(point, i) for i in range(len(found.layers))]
        widen: Mixture | None = None
        noise = 0.0
        if self.axis != "depth":
            widen, noise = _mixture_of(found, bank), self._noise(point)
            changes = self._wider(widen, point)
            config |= changes
            recipe |= {**changes, "noise": noise, "noise_router": self.noise_router, "seed": self.seed}
        if self.axis == "both":
            recipe["order"] = self.order
        recipe |= {"optimizer": "new", "point": plain({k: np.asarray(x).tolist() for k, x in (point or {}).items()})}
        seeds = SeedRange(self.seed, Purpose.TRAIN)
        pieces = []
        for i, layer in enumerate(found.layers):
            places = [place for place, source in enumerate(order) if source == i]
            hows = []
            for place in places:
                index = i if self.order == "width_first" else place
                fresh = functools.partial(seeds.generator, index)
                hows.append(Duplication(self.expert_copies, noise, self.noise_router, fresh))
            pieces.append(_piece(found, layer, places, self._scale(point, i), widen, hows, bank.layout.shapes))
        plan = Plan(row, {**arch, "config": config}, tuple(pieces), recipe)
        own = {entry.name: entry.shape for entry in bank.layout.entries}
        parameters = sum(math.prod(shape) for shape in plan.shapes(own).values())
        return Plan(row, plan.arch, plan.pieces, {**recipe, "parameters": parameters})

    # ------------------------------------------------------------------------------------------------- details

    def _decoder(self, bank: CheckpointBank) -> Decoder:
        refuse_lora(bank.layout.shapes, bank.path)
        found = find_decoder(need_arch(bank), bank.layout.shapes, bank.path)
        if fixed := [name for name in bank.constants if name.startswith(found.stem + ".")]:
            raise BankError(f"`{bank.path}` has `{fixed[0]}`, which is no weight of a layer. Save the model anew.")
        return found

    def _method(self, point: Point | None) -> str:
        if self.method is not None or point is None or "method" not in point:
            return self.method or METHODS[0]
        return METHODS[min(int(np.asarray(point["method"]).reshape(-1)[0]), len(METHODS) - 1)]

    def _order(self, found: Decoder, point: Point | None) -> tuple[int, ...]:
        """Which layer stands where."""
        if self.axis == "width":
            return tuple(range(len(found.layers)))
        return layer_order(self._counts(found, point), self._method(point), self.keep_last)

    def _counts(self, found: Decoder, point: Point | None) -> tuple[int, ...]:
        """How often each layer is there; raises ConfigError for settings that do not fit the layers."""
        L = len(found.layers)
        free = range(self.keep_first, L - self.keep_last)
        if not free:
            raise ConfigError(
                f"`operator.keep_first` {self.keep_first} and `keep_last` {self.keep_last} leave none of the {L} "
                "layers to copy. Give less."
            )
        if isinstance(self.copies, tuple):
            if len(self.copies) != L:
                raise ConfigError(f"`operator.copies` has {len(self.copies)} numbers for {L} layers. Give one each.")
            if wrong := [i for i, n in enumerate(self.copies) if n > 1 and i not in free]:
                raise ConfigError(
                    f"`operator.copies` copies layer {wrong[0]}, and `keep_first` or `keep_last` keeps it once. Leave "
                    "one out."
                )
            return self.copies
        counts = np.ones(L, int)
        if self.copies is not None:
            counts[list(free)] = self.copies
            return tuple(map(int, counts))
        x_L = np.zeros(L) if point is None or "copies" not in point else np.asarray(point["copies"], np.float64)
        x_F, choices = (x_L[list(free)] + 1) / 2, range(1, self.max_copies + 1)
        if self.num_layers is None:
            counts[list(free)] = [choices[min(int(x * self.max_copies), self.max_copies - 1)] for x in x_F]
            return tuple(map(int, counts))
        once = L - len(free)
        if not L <= self.num_layers <= once + self.max_copies * len(free):
            raise ConfigError(
                f"`operator.num_layers` is {self.num_layers}; {L} layers, {len(free)} of them up to {self.max_copies} "
                f"times, can be {L} to {once + self.max_copies * len(free)}. Give such a number."
            )
        counts[list(free)] = fill(x_F, choices, self.num_layers - once)
        return tuple(map(int, counts))

    def _by_rule(self, found: Decoder, rule: str) -> np.ndarray:
        """The floats that copy layers by a rule first; the box `copies`."""
        assert self.num_layers is not None
        L, x_L = len(found.layers), np.full(len(found.layers), -0.9)
        free = np.arange(self.keep_first, L - self.keep_last)
        extra = min(self.num_layers - L, len(free))
        chosen = {
            "spread": free[np.unique(np.linspace(0, len(free) - 1, extra).round().astype(int))],
            "first": free[:extra],
            "last": free[len(free) - extra :],
        }[rule]
        x_L[chosen] = 0.9
        return x_L

    def _scale(self, point: Point | None, layer: int) -> float:
        if self.copy_scale is not None or point is None or "damping" not in point:
            return 1.0 if self.copy_scale is None else float(self.copy_scale)
        return 1.0 - float(np.asarray(point["damping"])[layer])

    def _noise(self, point: Point | None) -> float:
        if self.noise is not None or point is None or "noise" not in point:
            return NOISE if self.noise is None else float(self.noise)
        return float(NOISE * 10 ** np.asarray(point["noise"], np.float64).reshape(-1)[0])

    def _wider(self, mixture: Mixture, point: Point | None) -> dict[str, Any]:
        """What the configuration says of the experts: E is multiplied, and so are a token's unless they are kept.

        With a token's experts their balancing loss is multiplied too, on the same function; its coefficient makes up.
        """
        kept = self.scale_top_k is False
        if self.scale_top_k is None and point is not None and "top_k" in point:
            kept = float(np.asarray(point["top_k"]).reshape(-1)[0]) >= 1
        check_top_k(mixture, kept)
        times = 1 if kept else self.expert_copies
        return {
            **dict.fromkeys(mixture.keys, mixture.num_experts * self.expert_copies),
            "num_experts_per_tok": mixture.top_k * times,
            "router_aux_loss_coef": mixture.aux_loss / times,
        }


def _mixture_of(found: Decoder, bank: CheckpointBank) -> Mixture:
    if found.mixture is None:
        raise BankError(
            f"`{bank.path}` has no experts to double: it is dense and grows in depth only. Use `operator.axis=depth`, "
            "or operator=sparse_upcycling first."
        )
    return found.mixture


def _piece(
    found: Decoder,
    layer: Mapping[str, str],
    places: Sequence[int],
    scale: float,
    widen: Mixture | None,
    hows: Sequence[Duplication],
    shapes: Mapping[str, tuple[int, ...]],
) -> Piece:
    """One layer and its copies."""
    kind = str(found.config["model_type"])

    def wider(tensors: Mapping[str, Tensor], how: Duplication) -> dict[str, Tensor]:
        return dict(tensors) if widen is None else duplicated(tensors, widen, how)

    def make(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = {tail: tensors[name] for tail, name in layer.items()}
        made = {}
        for turn, (place, how) in enumerate(zip(places, hows, strict=True)):
            here = wider(scaled_outputs(kind, own, scale if turn else 1.0), how)
            made |= {f"{found.stem}.{place}.{tail}": tensor for tail, tensor in here.items()}
        return made, {"places": list(places), "norm": float(f"{feed_forward_norm(own):.5e}")}

    empty = {tail: torch.empty(shapes[name], device="meta") for tail, name in layer.items()}
    after = wider(empty, Duplication(hows[0].times, 0.0, False, hows[0].fresh))
    new = {f"{found.stem}.{place}.{tail}": tail for place in places for tail in after}
    writes = {name: tuple(after[tail].shape) for name, tail in new.items()}
    likes = {name: layer[original(tail, widen)] for name, tail in new.items()}
    return Piece(tuple(layer.values()), writes, make, {"places": list(places), "norm": -1.23456e-100}, likes)

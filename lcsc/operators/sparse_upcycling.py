"""A dense model as a mixture of experts, each of which begins as its feed-forward block. L = layers, E = experts."""

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
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, Plan, candidate, refuse_ties, row_of
from lcsc.recycling.dense import (
    QWEN2,
    SHARED,
    SWITCH,
    VIT,
    Dense,
    Mixture,
    dense_name,
    find_dense,
    mixture_config,
    mixture_of,
    names_of,
    router_of,
    switch_layers,
)
from lcsc.recycling.upcycling import UNITS, Experts

CHOICES = ("all", "alternate", "last_half")
#: numbers of experts that a search tries, and the one without a search
NUMBERS = (2, 4, 8, 16, 32)
NUM_EXPERTS = 8
#: floats of the rules' layers, on both sides of 0 and near it: a search that begins there soon tries other layers
NEAR = 0.1
#: most noise that is searched, in standard deviations of an expert's tensors
MAX_NOISE = 0.5


@register("operator", "sparse_upcycling", source="arXiv:2212.05055; arXiv:2502.19261 (drop), arXiv:2410.07524 (groups)")
@dataclass(frozen=True)
class SparseUpcycling:
    """Feed-forward blocks of one dense checkpoint become mixtures of copies; what is left null is searched.

    Without a search, null `layers` is `all`, `num_experts` 8, and `noise` and `drop` 0.

    Args:
        layers: `all`, `alternate` (every other, from the second on), `last_half`, or a list of layers, counted from 0.
        num_sparse: how many layers a search of them makes mixtures; null lets it choose.
        num_experts: experts of a layer.
        top_k: experts of a token; in a vision transformer experts choose tokens, and it is how many choose one on
            average. Null is 2, or 1 where the class knows no more or there is but one.
        normalize: whether a token's weights are divided by their sum, which makes the mixture equal to the dense model;
            null: where the class can.
        rescale: without normalisation, multiply the experts' last projection by what uniform weights lack.
        groups: experts are so many equal slices of the dense block, and `groups` experts a whole one.
        noise: Gaussian noise on the experts, in standard deviations of each of their tensors.
        drop: share of each expert's units that is drawn anew from the statistics of what it replaces.
        router_std: standard deviation of the new routers.
        aux_loss: coefficient of the loss that balances the experts in training; 0 leaves it off.
        step: training step of the checkpoint; null is the last.
        seed: of routers, noise and drop.
    """

    layers: Any = None
    num_sparse: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    normalize: bool | None = None
    rescale: bool = False
    groups: int = 1
    noise: float | None = None
    drop: float | None = None
    router_std: float = 0.02
    aux_loss: float = 0.01
    step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.layers
        if isinstance(given, str) and given not in CHOICES:
            raise ConfigError(f"`operator.layers` is `{given}`.{did_you_mean(given, CHOICES)}")
        if given is not None and not isinstance(given, str):
            listed = list(given) if isinstance(given, Sequence) else []
            if not listed or not all(type(i) is int and i >= 0 for i in listed) or len(set(listed)) < len(listed):
                raise ConfigError(f"`operator.layers` is `{given}`; give one of {CHOICES}, or a list such as [1,3].")
            self.__dict__["layers"] = tuple(sorted(listed))
        if given is not None and self.num_sparse is not None:
            raise ConfigError(f"`operator.num_sparse` is {self.num_sparse}, but `layers` fixes them. Leave one out.")
        for name, least in (("num_sparse", 1), ("num_experts", 1), ("top_k", 1), ("groups", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"`operator.{name}` is {value}; it must be at least {least}.")
        for name, most in (("noise", math.inf), ("drop", 1.0), ("router_std", math.inf), ("aux_loss", math.inf)):
            if (value := getattr(self, name)) is not None and not 0 <= value <= most:
                raise ConfigError(f"`operator.{name}` is {value}; it must be at least 0 and at most {most:g}.")
        if self.rescale and self.normalize is not False:
            raise ConfigError("`operator.rescale` is true, which is for `normalize=false`. Leave it out.")
        _ = SeedRange(self.seed, Purpose.TRAIN)  # checks it

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Whatever of layers, experts, noise and drop is not fixed; zeros are the defaults."""
        found, boxes = self._dense(bank), []
        if self.layers is None:
            self._check_sparse(found)
            boxes.append(Box("layers", 1 if found.kind == "t5" else len(found.stems), -1.0, 1.0, scale=0.5))
        if self.num_experts is None:
            boxes.append(Box("experts", 1, -1.0, 1.0, scale=0.5))
        if self.noise is None:
            boxes.append(Box("noise", 1, 0.0, MAX_NOISE, scale=0.05))
        if self.drop is None:
            boxes.append(Box("drop", 1, 0.0, 1.0, scale=0.2))
        space = SearchSpace(tuple(boxes))
        self.plan(bank, space.to_point(np.zeros(space.size)))  # refuses settings that do not fit
        return space

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Each rule for the layers, as far as they are free and the rule fits."""
        space, found = self.space(bank), self._dense(bank)
        if self.layers is not None:
            return [Baseline("upcycled", "copies", space.to_point(np.zeros(space.size)))] if space.size else []
        rows = []
        for rule in CHOICES:
            point, chosen = space.to_point(np.zeros(space.size)), _rule(rule, found)
            if found.kind == "t5":
                if rule == "last_half" or not chosen:
                    continue
                point["layers"][:] = 0.0 if rule == "all" else -NEAR
            elif self.num_sparse not in (None, len(chosen)) or not chosen:
                continue
            else:
                point["layers"][:] = -NEAR
                point["layers"][list(chosen)] = NEAR
            rows.append(Baseline(rule, f"{rule}, {len(chosen)} of {len(found.stems)} layers", point))
        return rows

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The mixture."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """How it is made; see `lcsc.operators.surgery`."""
        found, arch, row = self._dense(bank), need_arch(bank), row_of(bank, self.step)
        refuse_ties(bank, {name for block in found.blocks for name in block.values()})
        chosen = self._layers(found, point)
        if not chosen:
            raise ConfigError(
                f"`operator.layers` is `{self.layers}`, which is none of the model's {len(found.stems)}. Use `all`, or "
                "give a list of them."
            )
        mixture = mixture_of(found, arch["config"], self.layers in (None, "all") and self._every(point), bank.path)
        num = self._experts(point)
        top_k = self._top_k(mixture, num)
        normalize = self._check(found, mixture, num, top_k)
        noise, drop = _number(self.noise, point, "noise"), _number(self.drop, point, "drop")
        if mixture is SWITCH:
            scale = float(num)
        elif normalize:
            scale = float(self.groups)
        else:  # uniform weights of 1/E over the whole blocks among the top k
            scale = num * self.groups / top_k if self.rescale else 1.0
        seeds, pieces = SeedRange(self.seed, Purpose.TRAIN), []
        for i, (stem, block) in enumerate(zip(found.stems, found.blocks, strict=True)):
            fresh = functools.partial(_generator, seeds, i)
            how = Experts(num, self.groups, noise, drop, scale, self.router_std, fresh)
            shapes = {role: bank.layout.shapes[name] for role, name in block.items()}
            if i in chosen:
                pieces.append(_piece(mixture, found, stem, block, how, shapes))
            elif mixture is SWITCH:
                pieces.append(_renamed(mixture, block, shapes))
        recipe = {
            "operator": "sparse_upcycling",
            "steps": [bank.steps[row]],
            "class": mixture.name,
            "layers": list(chosen),
            "num_experts": num,
            "top_k": top_k,
            "normalize": normalize,
            "groups": self.groups,
            "noise": noise,
            "drop": drop,
            "scale": scale,
            "router_std": self.router_std,
            "seed": self.seed,
            "routing": "experts choose tokens" if mixture is VIT else "tokens choose experts",
            "optimizer": "new",
        }
        said = self._said(found, mixture, chosen, num, top_k)
        config = mixture_config(found, mixture, arch["config"], said)
        plan = Plan(row, {"class": mixture.name, "config": config}, tuple(pieces), recipe)
        return Plan(row, plan.arch, plan.pieces, recipe | _sizes(plan, bank, found, chosen, num, top_k, self.groups))

    # ------------------------------------------------------------------------------------------------- details

    def _dense(self, bank: CheckpointBank) -> Dense:
        refuse_lora(bank.layout.shapes, bank.path)
        return find_dense(need_arch(bank), bank.layout.shapes, bank.path)

    def _every(self, point: Point | None) -> bool:
        """Whether every layer is a mixture whatever the point says, so that a search has one class."""
        return self.layers == "all" or point is None or "layers" not in point

    def _check_sparse(self, found: Dense) -> None:
        if self.num_sparse is not None and (self.num_sparse > len(found.stems) or found.kind == "t5"):
            said = "whose class knows two choices" if found.kind == "t5" else "which are fewer"
            raise ConfigError(
                f"`operator.num_sparse` is {self.num_sparse} for {len(found.stems)} layers, {said}. Leave it out."
            )

    def _layers(self, found: Dense, point: Point | None) -> tuple[int, ...]:
        """The layers that become mixtures."""
        L = len(found.stems)
        if isinstance(self.layers, tuple):
            if self.layers[-1] >= L:
                raise ConfigError(
                    f"`operator.layers` has {self.layers[-1]}; the model has layers 0 to {L - 1}. Give some of them."
                )
            return self.layers
        if self.layers is not None or point is None or "layers" not in point:
            return _rule(self.layers or "all", found)
        x_L = np.asarray(point["layers"], np.float64)
        if found.kind == "t5":
            return _rule("all" if x_L[0] >= 0 else "alternate", found)
        order = [int(i) for i in np.argsort(-x_L, kind="stable")]
        count = self.num_sparse or max(1, int((x_L >= 0).sum()))
        return tuple(sorted(order[:count]))

    def _experts(self, point: Point | None) -> int:
        if self.num_experts is not None:
            return self.num_experts
        if point is None or "experts" not in point:
            return NUM_EXPERTS
        fit = [n for n in NUMBERS if n % self.groups == 0 and n >= (self.top_k or 2)] or [NUM_EXPERTS]
        wanted = math.log2(NUM_EXPERTS) + 2 * float(np.asarray(point["experts"]).reshape(-1)[0])
        return min(fit, key=lambda n: abs(math.log2(n) - wanted))

    def _top_k(self, mixture: Mixture, num: int) -> int:
        return self.top_k or (1 if mixture.choices else min(num, max(2, self.groups)))

    def _check(self, found: Dense, mixture: Mixture, num: int, top_k: int) -> bool:
        """Whether weights are normalised; raises ConfigError for settings that do not fit."""
        if mixture.choices and top_k not in mixture.choices:
            raise ConfigError(
                f"`operator.top_k` is {top_k}, and `{mixture.name}` gives a token 1 expert. Leave it out."
            )
        if top_k > num:
            raise ConfigError(f"`operator.top_k` is {top_k} of {num} experts; take at most all of them.")
        if found.units % self.groups or num % self.groups or top_k % self.groups:
            raise ConfigError(
                f"`operator.groups` is {self.groups}; it must divide the {found.units} units of a block, "
                f"`num_experts` {num} and `top_k` {top_k}."
            )
        if self.normalize and not mixture.normalizes:
            raise ConfigError(
                f"`operator.normalize` is true, and `{mixture.name}` weighs a token's expert by its probability. Leave "
                "it out: the experts are multiplied by their number instead, which is exact for uniform weights."
            )
        if self.normalize is False and mixture.name == "MixtralForCausalLM":
            raise ConfigError(
                "`operator.normalize` is false, and Mixtral always divides by the sum. Give a list of `layers`, for "
                "which Llama becomes a Qwen2-MoE, or leave it out."
            )
        if mixture is VIT and self.groups > 1:
            raise ConfigError(
                f"`operator.groups` is {self.groups}, and experts that choose tokens choose alone. Use 1."
            )
        return mixture.normalizes if self.normalize is None else self.normalize

    def _said(self, found: Dense, mixture: Mixture, chosen: tuple[int, ...], num: int, top_k: int) -> dict[str, Any]:
        """What the configuration says of the experts."""
        units, dense = found.units // self.groups, [i for i in range(len(found.stems)) if i not in chosen]
        balance = {"router_aux_loss_coef": self.aux_loss, "output_router_logits": self.aux_loss > 0}
        normalize = mixture.normalizes if self.normalize is None else self.normalize
        if mixture is VIT:
            return {"num_experts": num, "capacity": float(top_k), "sparse_layers": list(chosen), "normalize": normalize}
        if mixture is SWITCH:
            encoder = tuple(i for i in chosen if i < found.encoder)
            decoder = tuple(i - found.encoder for i in chosen if i >= found.encoder)
            return {
                "num_experts": num,
                "num_sparse_encoder_layers": switch_layers(encoder, found.encoder, "encoder"),
                "num_sparse_decoder_layers": switch_layers(decoder, len(found.stems) - found.encoder, "decoder"),
                "expert_capacity": 1 << 20,  # no token is left out
                "router_jitter_noise": 0.0,
                "dense_act_fn": "relu",
                "router_aux_loss_coef": self.aux_loss,
            }
        if mixture.name == "MixtralForCausalLM":
            return {"num_local_experts": num, "num_experts_per_tok": top_k, "intermediate_size": units, **balance}
        own = {"qkv_bias": found.kind == "qwen2", "shared_expert_intermediate_size": min(SHARED, found.units)}
        return {
            **{"num_experts": num, "num_experts_per_tok": top_k, "moe_intermediate_size": units},
            **{"norm_topk_prob": normalize, "decoder_sparse_step": 1, "mlp_only_layers": dense},
            **balance,
            **(own if mixture is QWEN2 else {}),
        }


def _rule(rule: str, found: Dense) -> tuple[int, ...]:
    """The layers of a rule; of an encoder and a decoder it holds for each."""
    out: list[int] = []
    for first, last in ((0, found.encoder), (found.encoder, len(found.stems))):
        here = range(first, last)
        out += {"all": here, "alternate": here[1::2], "last_half": here[len(here) - len(here) // 2 :]}[rule]
    return tuple(out)


def _number(fixed: float | None, point: Point | None, name: str) -> float:
    if fixed is not None:
        return float(fixed)
    return 0.0 if point is None or name not in point else float(np.asarray(point[name]).reshape(-1)[0])


def _generator(seeds: SeedRange, layer: int, expert: int) -> np.random.Generator:
    return seeds.generator(layer, expert)


def _piece(
    mixture: Mixture,
    found: Dense,
    stem: str,
    block: Mapping[str, str],
    how: Experts,
    shapes: Mapping[str, tuple[int, ...]],
) -> Piece:
    """The experts and the router of one layer."""
    names = [names_of(mixture, stem, e) for e in range(how.count)]
    router = router_of(mixture, stem)
    cut = {role: _cut(role, shape, how.groups) for role, shape in shapes.items()}
    writes = {own[role]: cut[role] for own in names for role in block} | {router: (how.count, found.width)}
    shared = _shared_names(stem) if mixture is QWEN2 else {}
    units = min(SHARED, found.units)
    if shared:
        writes |= {shared["gate"]: (units, found.width), shared["up"]: (units, found.width)}
        writes |= {shared["down"]: (found.width, units), shared["switch"]: (1, found.width)}

    def make(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        here = {role: tensors[name] for role, name in block.items()}
        made = {router: how.router(found.width, here["up"].dtype)}
        for e, own in enumerate(names):
            made |= {own[role]: tensor for role, tensor in how.expert(here, e).items()}
        if shared:
            made |= {shared[role]: here[role][:units].clone() for role in ("gate", "up")}
            made[shared["down"]] = torch.zeros(found.width, units, dtype=here["down"].dtype)
            made[shared["switch"]] = torch.zeros(1, found.width, dtype=here["up"].dtype)
        return made, {"layer": stem}

    likes = dict.fromkeys(writes, block["up"]) | {own[role]: name for own in names for role, name in block.items()}
    likes |= {shared[role]: block[role] for role in ("gate", "up", "down") if shared}
    return Piece(tuple(block.values()), writes, make, {"layer": stem}, likes)


def _shared_names(stem: str) -> dict[str, str]:
    """Of the expert that all tokens of a Qwen2-MoE go through, and of the gate before it."""
    own = {role: f"{stem}.mlp.shared_expert.{role}_proj.weight" for role in ("gate", "up", "down")}
    return own | {"switch": f"{stem}.mlp.shared_expert_gate.weight"}


def _renamed(mixture: Mixture, block: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Piece:
    """A block that stays dense under the name it has in the mixture."""
    new = {name: dense_name(mixture, name) for name in block.values()}

    def make(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {new[name]: tensors[name] for name in new}, {}

    writes = {new[name]: shapes[role] for role, name in block.items()}
    return Piece(tuple(new), writes, make, {}, {to: name for name, to in new.items()})


def _cut(role: str, shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
    axis = UNITS[role]
    return tuple(n // groups if i == axis else n for i, n in enumerate(shape))


def _sizes(
    plan: Plan, bank: CheckpointBank, found: Dense, chosen: Sequence[int], num: int, top_k: int, groups: int
) -> dict[str, int]:
    """Parameters in all, and those that a token goes through."""
    own = {entry.name: entry.shape for entry in bank.layout.entries}
    total = sum(math.prod(shape) for shape in plan.shapes(own).values())
    expert = sum(math.prod(_cut(role, own[name], groups)) for role, name in found.blocks[0].items())
    return {"parameters": total, "active_parameters": total - len(chosen) * (num - top_k) * expert}

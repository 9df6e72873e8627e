"""Pipeline stages of a language model, and how a lost one is rebuilt from its neighbours. S = stages, L = layers.

CheckFree, arXiv:2506.15461: a stage is a run of neighbouring layers, kept by one machine of a pipeline. When a machine
dies, layer t of its stage becomes a weighted mean of the layers t of the two stages beside it (Algorithm 1). CheckFree+
swaps the first two and the last two stages for half of the micro-batches, so that the first and the last stage have a
neighbour that learnt to stand in for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import BankError, ConfigError
from lcsc.recycling.kinds import known_kind

#: model_type -> where its layers lie, and which of a layer's tensors write into the residual stream
_O, _EXPERTS = r"self_attn\.o_proj\.(weight|bias)", r"mlp\.(shared_expert\.|experts\.(\d+\.)?)?down_proj(\.weight)?"
_LLAMA = ("layers", rf"{_O}|mlp\.down_proj\.(weight|bias)")
_NORMS = ("layers", r"post_attention_layernorm\.weight|post_feedforward_layernorm\.weight")
FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "cohere", "olmo", "smollm3", "phi3"), _LLAMA),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), ("layers", rf"{_O}|{_EXPERTS}")),
    "mixtral": ("layers", rf"{_O}|{_EXPERTS}|block_sparse_moe\.experts\.\d+\.w2\.weight"),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _NORMS),  # these divide the outputs by their length
    "phi": ("layers", r"(self_attn\.dense|mlp\.fc2)\.(weight|bias)"),
    "starcoder2": ("layers", r"(self_attn\.o_proj|mlp\.c_proj)\.(weight|bias)"),
    "gpt2": ("h", r"(attn|mlp)\.c_proj\.(weight|bias)"),
    "gpt_neox": ("layers", r"(attention\.dense|mlp\.dense_4h_to_h)\.(weight|bias)"),
    "opt": ("layers", r"(self_attn\.out_proj|fc2)\.(weight|bias)"),
}
#: file in a checkpoint's folder with the norms of its layers' gradients, `{"step": ..., "layers": [...]}`
NORMS = "gradient_norms.json"
#: these families keep the gains of their norms less one
LESS_ONE = ("gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Stages:
    """The stages of a model.

    Args:
        num_stages: S.
        layers: for each layer the names of its tensors by role (their names behind the layer's number); empty for
            layers that the checkpoint lacks.
        outputs: matches the roles that write into the residual stream.
        less_one: gains of norms are kept less one.
    """

    num_stages: int
    layers: tuple[Mapping[str, str], ...]
    outputs: re.Pattern[str]
    less_one: bool

    def of(self, stage: int) -> range:
        """Layers of a stage."""
        size = len(self.layers) // self.num_stages
        return range(stage * size, (stage + 1) * size)

    def offset(self, role: str, ndim: int) -> float:
        """What a tensor's numbers lack to what the network multiplies with: 1 for Gemma's gains, else 0."""
        return float(self.less_one and ndim == 1 and role.endswith("norm.weight"))


def find_stages(
    arch: Mapping[str, Any], names: Sequence[str], path: Any, num_stages: int | None, lost: Sequence[int] = ()
) -> Stages:
    """The stages of a model of transformers.

    Args:
        arch: `{"class", "config"}`.
        names: of all tensors.
        path: of the model, for messages.
        num_stages: S; None for one layer each.
        lost: stages whose layers may be missing among the tensors.

    Raises:
        BankError: another family, quantized weights, or layers that are missing though their stage is not lost.
        ConfigError: stages that cannot be equal.
    """
    kind, found = _found(arch, names, path)
    num_layers = _num_layers(arch, found, path)
    S = num_layers if num_stages is None else num_stages
    if num_layers < 2:
        raise BankError(f"`{path}` has one layer, and a lost stage is rebuilt from others. Take a checkpoint.")
    if S < 2 or num_layers % S:
        raise ConfigError(
            f"`operator.num_stages` is {S}, and {num_layers} layers cannot be divided into {S} equal stages. Choose "
            f"one of {[n for n in range(2, num_layers + 1) if num_layers % n == 0]}."
        )
    stages = Stages(
        S, tuple(found.get(i, {}) for i in range(num_layers)), re.compile(FAMILIES[kind][1]), kind in LESS_ONE
    )
    gone = {layer for stage in lost if 0 <= stage < S for layer in stages.of(stage)}
    if missing := sorted(set(range(num_layers)) - set(found) - gone):
        raise BankError(f"`{path}` lacks layer {missing[0]}, whose stage is not in `operator.lost`. Name it there too.")
    return stages


def layer_names(arch: Mapping[str, Any], names: Sequence[str], path: Any) -> list[list[str]]:
    """Names of the tensors of each layer of a model that has all of them; see `find_stages`."""
    _, found = _found(arch, names, path)
    return [list(found[i].values()) for i in range(_num_layers(arch, found, path)) if i in found]


def _found(arch: Mapping[str, Any], names: Sequence[str], path: Any) -> tuple[str, dict[int, dict[str, str]]]:
    """The kind of a model, and the names of its layers' tensors by role, by the layers' numbers."""
    kind = known_kind(arch, path, FAMILIES, {}, "is not among the models whose layers lcsc can tell apart")
    if arch["config"].get("quantization_config") is not None:
        raise BankError(f"`{path}` holds quantized weights, whose layers cannot be averaged. Save it unquantized.")
    found: dict[int, dict[str, str]] = {}
    for name in names:
        if match := re.fullmatch(rf"(?:[^\d]+\.)?{FAMILIES[kind][0]}\.(\d+)\.(.+)", name):
            found.setdefault(int(match[1]), {})[match[2]] = name
    return kind, found


def _num_layers(arch: Mapping[str, Any], found: Mapping[int, Any], path: Any) -> int:
    """Layers of a model, some of which may be missing."""
    said = arch["config"].get("num_hidden_layers") or arch["config"].get("n_layer")
    num_layers = int(said) if said else max(found, default=-1) + 1
    if not found or max(found) >= num_layers:
        raise BankError(f"`{path}` has layers {sorted(found)}, its configuration has {num_layers}; they do not fit.")
    return num_layers


def names_of(stages: Stages, layer: int) -> dict[str, str]:
    """Names by role of a layer that may be missing, after those of any other one."""
    like = next(i for i, names in enumerate(stages.layers) if names)
    return {role: _renumbered(name, role, layer) for role, name in stages.layers[like].items()}


def _renumbered(name: str, role: str, layer: int) -> str:
    head = name[: -len(role) - 1]
    return f"{head[: head.rindex('.')]}.{layer}.{role}"


# -------------------------------------------------------------------------------------------------------- the rule


def norm_weights(norms: Sequence[float], power: float = 1.0) -> tuple[float, ...]:
    """Weights of stages by the norms of their gradients: w_j = norm_j^power / sum, so that they sum to one.

    The stage that has converged less weighs more. The paper's text squares the norms or not (its print does not tell),
    its authors' code does not. Norms of zero only give equal weights.

    Raises:
        ConfigError: a norm that is negative or not finite, or a power that is negative.
    """
    for norm in norms:
        if not 0 <= norm < float("inf"):
            raise ConfigError(f"a gradient's norm is {norm}; it must be a finite number of at least 0.")
    if not power >= 0:
        raise ConfigError(f"the power of the norms is {power}; it must be at least 0 (0 weighs all alike).")
    top = max(norms)
    raised = [(norm / top) ** power if top > 0 else 1.0 for norm in norms]
    return tuple(x / sum(raised) for x in raised)


def stage_norms(layers: Sequence[float], num_stages: int) -> list[float]:
    """Norms of the gradients of equal stages from those of their layers: roots of sums of squares."""
    size = len(layers) // num_stages
    return [math.hypot(*layers[stage * size : (stage + 1) * size]) for stage in range(num_stages)]


def blended(sources: Sequence[Tensor], weights: Sequence[float], scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """scale (sum_j w_j (x_j + offset)) - offset, summed in float64 and given in the dtype of the first.

    Sources of weight 0 are not read, so a copy keeps its bits.

    Args:
        sources: tensors of one shape.
        weights: one each.
        scale: of the sum; 1 for tensors that do not write into the residual stream.
        offset: see `Stages.offset`.
    """
    kept = [(x, w) for x, w in zip(sources, weights, strict=True) if w]
    if len(kept) == 1 and kept[0][1] == scale == 1.0:
        return kept[0][0].clone()
    total = torch.zeros(sources[0].shape, dtype=torch.float64, device=sources[0].device)
    for x, w in kept:
        total += w * (x.double() + offset)
    return (scale * total - offset).to(sources[0].dtype)


def fresh(role: str, shape: Sequence[int], std: float, offset: float, rng: np.random.Generator) -> Tensor:
    """A tensor as a new network begins: N(0, std^2), gains one, biases zero; float32."""
    if len(shape) > 1:
        return torch.from_numpy(std * rng.standard_normal(tuple(shape), dtype=np.float32))
    return torch.zeros(tuple(shape)) if role.endswith("bias") else torch.full(tuple(shape), 1.0 - offset)


# ------------------------------------------------------------------------------------------------------ the routes


def route(num_stages: int, *, swapped: bool = False) -> tuple[int, ...]:
    """The order in which a micro-batch passes the stages; swapped: first two and last two exchanged (CheckFree+).

    Raises:
        ConfigError: fewer than 4 stages, whose pairs would overlap.
    """
    order = list(range(num_stages))
    if swapped:
        if num_stages < 4:
            raise ConfigError(
                f"a swapped order exchanges two pairs of stages, and there are {num_stages}; use 4 or more."
            )
        order[:2], order[-2:] = order[1::-1], order[:-3:-1]
    return tuple(order)


def neighbours(stage: int, num_stages: int) -> tuple[int, ...]:
    """The stages beside a stage: one for the first and the last, else the previous and the next."""
    return tuple(s for s in (stage - 1, stage + 1) if 0 <= s < num_stages)

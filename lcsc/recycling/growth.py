"""Trained decoders with more layers and more experts: which layer follows which, and experts doubled with noise.

L = layers before, E = experts before, D = width of the model, I = width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import BankError, ConfigError
from lcsc.recycling.defaults import filled_config
from lcsc.recycling.experts import MIXTURES
from lcsc.recycling.kinds import known_kind
from lcsc.recycling.stages import FAMILIES as STAGES
from lcsc.recycling.stages import LESS_ONE

METHODS = ("interposition", "stack")
#: model_types whose layers add what they compute to their input, so that a layer with outputs of zero changes nothing
FAMILIES = tuple(sorted(STAGES))
#: class whose experts a model_type has, whatever lies on top of its layers
_MIXTURES = {
    **{"mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM"},
    **{"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"},
}
#: model_type -> why not, for models that one might try
REFUSED = {
    **dict.fromkeys(("bert", "roberta", "vit"), "is no decoder"),
    **dict.fromkeys(("t5", "mt5", "bart", "switch_transformers"), "has an encoder and a decoder"),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe", "minimax_m2"),
        "has a router (sigmoid, groups or a bias of its own) whose outputs would double with its experts",
    ),
}
#: a layer's tensor: what stands before its number, the number, what stands behind it
_LAYER = re.compile(r"((?:.+\.)?(?:layers|h))\.(\d+)\.(.+)")
#: entries of a configuration with one value a layer
_BY_LAYER = ("layer_types", "no_rope_layers")
#: those that speak of layers without naming single ones
_HARMLESS = ("max_window_layers", "num_hidden_layers", "n_layer", "no_rope_layer_interval", "mlp_only_layers")

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Mixture:
    """The experts of a model.

    Args:
        kind: its class.
        num_experts: E of every layer that has some.
        top_k: experts of a token.
        normalized: whether the weights of a token's experts sum to one.
        aux_loss: coefficient of the loss that balances the experts in training.
        keys: what its configuration calls E; transformers 5 has another word than 4 for some, and reads both.
    """

    kind: str
    num_experts: int
    top_k: int
    normalized: bool
    aux_loss: float
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Decoder:
    """The layers of a model.

    Args:
        stem: what stands before a layer's number, such as `model.layers`.
        layers: for each layer the names of its tensors, by what stands behind the number.
        config: its configuration with all defaults of its class.
        depth_key: what it calls L.
        mixture: its experts; None for a dense model.
    """

    stem: str
    layers: tuple[Mapping[str, str], ...]
    config: Mapping[str, Any]
    depth_key: str
    mixture: Mixture | None


def find_decoder(arch: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Any) -> Decoder:
    """The layers of a model that can be grown.

    Args:
        arch: `{"class", "config"}`.
        shapes: of all tensors, by name.
        path: of the model, for messages.

    Raises:
        BankError: a model of another family (named), a quantized one, one whose layers depend on their number, or
            tensors that do not fit the configuration.
    """
    config = arch["config"]
    if config.get("quantization_config") is not None:
        raise BankError(f"`{path}` holds quantized weights, to which no noise can be added. Save it unquantized.")
    known_kind(arch, path, FAMILIES, REFUSED, "is not among the models that lcsc knows how to grow")
    full = filled_config(str(config["model_type"]), config)
    found: dict[int, dict[str, str]] = {}
    stems: set[str] = set()
    for name in shapes:
        if match := _LAYER.fullmatch(name):
            found.setdefault(int(match[2]), {})[match[3]] = name
            stems.add(match[1])
    key = "n_layer" if "n_layer" in full else "num_hidden_layers"
    if len(stems) != 1 or sorted(found) != list(range(len(found))) or full.get(key) != len(found):
        raise BankError(
            f"`{path}` has layers {sorted(found)} below {sorted(stems)}, its configuration {full.get(key)}. Weights "
            "and config.json must be one save."
        )
    for name, value in config.items():
        if "layer" in name and isinstance(value, list | dict) and value and name not in (*_BY_LAYER, *_HARMLESS):
            raise BankError(f"`{path}` has `{name}` in its configuration, which lcsc cannot carry over to new layers.")
    if full.get("scale_attn_by_inverse_layer_idx") or full.get("do_layer_norm_before") is False:
        raise BankError(f"the layers of `{path}` depend on their place or end in a norm, so copies would not fit in.")
    layers = tuple(found[i] for i in range(len(found)))
    return Decoder(stems.pop(), layers, full, key, _mixture(arch, full, layers, shapes, path))


def _mixture(
    arch: Mapping[str, Any],
    full: Mapping[str, Any],
    layers: Sequence[Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    path: Any,
) -> Mixture | None:
    kind = _MIXTURES.get(arch["config"]["model_type"])
    if kind is None:
        return None
    key, words = (
        "num_local_experts" if "num_local_experts" in full else "num_experts",
        ("num_experts", "num_local_experts"),
    )
    routers = [shapes[layer[router]][0] for layer in layers if (router := _router(kind, layer)) is not None]
    if not routers or set(routers) != {full[key]}:
        raise BankError(f"`{path}` has routers for {sorted(set(routers))} experts, its configuration has {full[key]}.")
    return Mixture(
        kind,
        full[key],
        full["num_experts_per_tok"],
        kind == "MixtralForCausalLM" or bool(full.get("norm_topk_prob")),
        float(full.get("router_aux_loss_coef") or 0.0),
        tuple(word for word in words if word in arch["config"]) or (key,),
    )


def _router(kind: str, layer: Mapping[str, Any]) -> str | None:
    """What the router of a layer is called behind the layer's number; None for a dense layer."""
    names = (f"{MIXTURES[kind].block}.gate.weight", "mlp.gate.weight")
    return next((name for name in names if name in layer), None)


# ---------------------------------------------------------------------------------------------------------- depth


def layer_order(copies: Sequence[int], method: str, keep_last: int = 0) -> tuple[int, ...]:
    """Which layer stands at each place of the grown model.

    `interposition` puts the copies of a layer behind it (arXiv:2510.08008, Eq. 2). `stack` repeats the whole (Eq. 1):
    pass after pass with the layers that still have copies; the last `keep_last` stand at the end of the last passes.

    Args:
        copies: how often each layer is there, at least once.
        method: one of `METHODS`.
        keep_last: layers at the end that come in the last passes.

    >>> layer_order([1, 2, 2, 1], "interposition"), layer_order([1, 2, 2, 1], "stack", 1)
    ((0, 1, 1, 2, 2, 3), (0, 1, 2, 1, 2, 3))
    """
    assert method in METHODS
    assert min(copies) >= 1
    if method == "interposition":
        return tuple(i for i, count in enumerate(copies) for _ in range(count))
    passes, first_late = max(copies), len(copies) - keep_last
    return tuple(
        i
        for turn in range(passes)
        for i, count in enumerate(copies)
        if (turn < count if i < first_late else turn >= passes - count)
    )


def grown_config(found: Decoder, old: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The configuration of the layers in another order; what it says of single layers follows them.

    Args:
        found: the layers.
        old: their configuration as it stands in its file.
        order: see `layer_order`.
    """
    config, full = {**old, found.depth_key: len(order)}, found.config
    for name in _BY_LAYER:
        given = full.get(name)
        if isinstance(given, list | tuple) and len(given) == len(found.layers):
            config[name] = [given[i] for i in order]
    if found.mixture is not None and "mlp_only_layers" in full:
        dense = [i for i, layer in enumerate(found.layers) if _router(found.mixture.kind, layer) is None]
        config["mlp_only_layers"] = [place for place, i in enumerate(order) if i in dense]
        config["decoder_sparse_step"] = 1
    return config


def scaled_outputs(kind: str, tensors: Mapping[str, Tensor], scale: float) -> Named:
    """A layer that adds `scale` times what it did to the stream; with 0 it is the identity.

    Multiplied are the projections into the stream, or the gains of norms where those come behind them.

    Args:
        kind: model_type.
        tensors: of a layer, by what stands behind its number.
        scale: 1 leaves the bits.
    """
    if scale == 1:
        return dict(tensors)
    outputs, less = re.compile(STAGES[kind][1]), float(kind in LESS_ONE)

    def scaled(tensor: Tensor) -> Tensor:
        off = less if tensor.ndim == 1 else 0.0
        return (scale * (tensor.double() + off) - off).to(tensor.dtype)

    return {name: scaled(tensor) if outputs.fullmatch(name) else tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------- width


@dataclass(frozen=True)
class Duplication:
    """How experts become several.

    Args:
        times: how often each expert is there.
        noise: of the copies, in standard deviations of each of their matrices.
        noise_router: whether the routers' new rows get noise as well, by the standard deviation of all rows.
        fresh: generator by number; one for every matrix.
    """

    times: int
    noise: float
    noise_router: bool
    fresh: Callable[[int], np.random.Generator]


def duplicated(tensors: Mapping[str, Tensor], mixture: Mixture, how: Duplication) -> Named:
    """A layer with `how.times` as many experts: the originals as they were, then their noisy copies.

    Args:
        tensors: of a layer, by what stands behind its number; experts one by one or all as one tensor, which get the
            same numbers. A layer without a router is given back.
        mixture: its experts.
        how: the numbers.
    """
    router, E = _router(mixture.kind, tensors), mixture.num_experts
    if router is None:
        return dict(tensors)
    naming, made = MIXTURES[mixture.kind], {}
    roles = {naming.gate: 0, naming.up: 1, naming.down: 2}
    single = re.compile(rf"({re.escape(naming.block)}\.experts\.)(\d+)\.(\w+)\.weight")
    for name, tensor in tensors.items():
        made[name] = tensor
        if name == router:
            noise = how.noise if how.noise_router else 0.0
            rows = [_noisy(tensor, noise, how.fresh(3 * E * how.times + copy)) for copy in range(1, how.times)]
            made[name] = torch.cat([tensor, *rows])
        elif match := single.fullmatch(name):
            for copy in range(1, how.times):
                expert = int(match[2]) + copy * E
                rng = how.fresh(3 * expert + roles[match[3]])
                made[f"{match[1]}{expert}.{match[3]}.weight"] = _noisy(tensor, how.noise, rng)
        elif name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            made[name] = _duplicated_whole(tensor, "gate_up" in name, E, how)
    return made


def _duplicated_whole(whole_EXY: Tensor, both: bool, E: int, how: Duplication) -> Tensor:
    """All experts of a layer as one tensor; gates and ups in one, shape (E, 2 I, D), are matrices of their own."""
    parts = [whole_EXY]
    for copy in range(1, how.times):
        for e in range(E):
            matrices = whole_EXY[e].chunk(2) if both else (whole_EXY[e],)
            drawn = [
                _noisy(matrix, how.noise, how.fresh(3 * (e + copy * E) + (role if both else 2)))
                for role, matrix in enumerate(matrices)
            ]
            parts.append(torch.cat(drawn)[None])
    return torch.cat(parts)


def original(name: str, mixture: Mixture | None) -> str:
    """The tensor of a layer that `duplicated` makes a tensor of, by what stands behind the layer's number."""
    match = re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)", name)
    return name if match is None or mixture is None else f"{match[1]}{int(match[2]) % mixture.num_experts}{match[3]}"


def _noisy(tensor: Tensor, noise: float, rng: np.random.Generator) -> Tensor:
    """A copy with noise of `noise` standard deviations of the matrix."""
    if noise == 0:
        return tensor.clone()
    drawn = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
    return (tensor.double() + noise * tensor.double().std() * drawn).to(tensor.dtype)


def check_top_k(mixture: Mixture, kept: bool) -> None:
    """Refuse to keep the number of experts of a token where their weights do not sum to one.

    Raises:
        ConfigError: saying what to do.
    """
    if kept and not mixture.normalized:
        raise ConfigError(
            f"`operator.scale_top_k` is false, and the weights of a token's experts are not normalised "
            f"(`norm_topk_prob` of `{mixture.kind}` is false): over more experts each becomes smaller. Use true, which "
            "keeps their sums."
        )


# ---------------------------------------------------------------------------------------------------------- norms


def feed_forward_norm(tensors: Mapping[str, Tensor]) -> float:
    """Mean of ||W|| / sqrt(numbers of W) over the matrices of a layer's feed-forward blocks or experts.

    In trained models it rises with depth, which is why copies fit better beside their layer than far from it
    (arXiv:2510.08008).
    """
    norms: list[Tensor] = []
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and re.match(r"(?:mlp|block_sparse_moe|fc\d)\b", name) and not name.endswith("gate.weight"):
            halves = tensor.chunk(2, 1) if name.endswith("experts.gate_up_proj") else (tensor,)
            norms += [half.double().square().mean((-1, -2)).sqrt().reshape(-1) for half in halves]
    return float(torch.cat(norms).mean()) if norms else 0.0

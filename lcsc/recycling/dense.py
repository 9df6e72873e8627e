"""Feed-forward blocks of dense models, and the mixtures that they can become. L = layers, E = experts, D = width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcsc.core.errors import BankError, ConfigError
from lcsc.recycling.defaults import filled_config
from lcsc.recycling.experts import expert_names, router_name
from lcsc.recycling.kinds import known_kind

Shape = tuple[int, ...]
_GATED = {"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"}
#: model_type -> names of a block's tensors below its stem, by role (`lcsc.recycling.upcycling.UNITS`)
FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _GATED),
    "t5": {"wi.weight": "up", "wo.weight": "down"},
    "vit": {
        **{"intermediate.dense.weight": "up", "intermediate.dense.bias": "up_bias"},
        **{"output.dense.weight": "down", "output.dense.bias": "down_bias"},
    },
}
#: where a layer's block lies; the first group is the layer's stem, the last the tensor
_PLACES = {
    "t5": r"((?:encoder|decoder)\.block\.\d+\.layer\.\d)\.DenseReluDense\.(.+)",
    "vit": r"((?:vit\.)?encoder\.layer\.\d+)\.((?:intermediate|output)\.dense\..+)",
}
_PLACE = r"((?:.+\.)?layers\.\d+)\.mlp\.(.+)"
#: model_type -> why not, for models that one might try
REFUSED = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "switch_transformers", "deepseek_v3"), "is a mixture already"
    ),
    **dict.fromkeys(("gpt2", "opt", "gpt_neox", "phi", "bert", "bart"), "has no mixture class of its form"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "olmo2", "cohere"), "has no mixture class of its form"),
    "phi3": "keeps gates and ups in one tensor",
}
#: how the names of classes end whose head the mixture has
_HEADS = {"t5": "ForConditionalGeneration", "vit": "ForImageClassification"}
#: what lcsc's mixture of a ViT knows
VIT_ACTIVATIONS = ("gelu", "relu", "silu")
_VIT_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias"),
)
#: units of the shared expert that every layer of a Qwen2-MoE has; they begin with an output of zero
SHARED = 16


@dataclass(frozen=True)
class Dense:
    """The feed-forward blocks of a model.

    Args:
        kind: its model_type.
        width: D.
        units: of every block.
        stems: of the layers, in their order (of an encoder and a decoder one after the other).
        blocks: for each layer the names of its tensors by role.
        encoder: how many of the layers are an encoder's, where there is a decoder besides.
        labels: classes of an image classifier.
    """

    kind: str
    width: int
    units: int
    stems: tuple[str, ...]
    blocks: tuple[Mapping[str, str], ...]
    encoder: int = 0
    labels: int = 0


def find_dense(arch: Mapping[str, Any], shapes: Mapping[str, Shape], path: Any) -> Dense:
    """The feed-forward blocks of a dense model that can become a mixture.

    Args:
        arch: `{"class", "config"}`.
        shapes: of all tensors, by name.
        path: of the model, for messages.

    Raises:
        BankError: a model of another family (named), a quantized one, one with a block that no mixture class has, or
            tensors that do not fit together.
    """
    otherwise = "is not among the dense models for which lcsc knows a mixture"
    kind = known_kind(arch, path, FAMILIES, REFUSED, otherwise, "model of transformers")
    config = arch["config"]
    if config.get("quantization_config") is not None:
        raise BankError(f"`{path}` holds quantized weights, which cannot be experts. Save it unquantized.")
    _check_kind(kind, config, shapes, path)
    if not str(arch["class"]).endswith(head := _HEADS.get(kind, "ForCausalLM")):
        raise BankError(
            f"`{path}` is a `{arch['class']}`, whose head its mixture does not have. Give a model of the class "
            f"`...{head}`."
        )
    roles, place = FAMILIES[kind], re.compile(_PLACES.get(kind, _PLACE))
    found: dict[str, dict[str, str]] = {}
    for name in shapes:
        if not (match := place.fullmatch(name)):
            continue
        if match[2] not in roles:
            raise BankError(f"`{path}` has `{name}`, which no expert of its mixture has. Take a model without it.")
        found.setdefault(match[1], {})[roles[match[2]]] = name
    stems = sorted(found, key=_order)
    blocks = tuple(found[stem] for stem in stems)
    first = {role: shapes[name] for role, name in blocks[0].items()} if blocks else {}
    for stem, block in zip(stems, blocks, strict=True):
        if {role: shapes[name] for role, name in block.items()} != first or set(block) != set(roles.values()):
            raise BankError(f"the feed-forward block of `{stem}` of `{path}` is not like that of `{stems[0]}`.")
    encoder = sum(stem.startswith("encoder.") for stem in stems) if kind == "t5" else 0
    if not blocks or len(blocks) != _num_layers(kind, config):
        raise BankError(f"`{path}` has {len(blocks)} feed-forward blocks, and its configuration says otherwise.")
    units, width = first["up"]
    labels = shapes["classifier.weight"][0] if kind == "vit" else 0
    return Dense(kind, width, units, tuple(stems), blocks, encoder, labels)


def _order(stem: str) -> tuple[bool, int]:
    return stem.startswith("decoder."), int(re.findall(r"\.(?:layers|layer|block)\.(\d+)", "." + stem)[0])


def _num_layers(kind: str, config: Mapping[str, Any]) -> int:
    if kind != "t5":
        return int(config.get("num_hidden_layers") or 0)
    own = int(config.get("num_layers") or 0)
    return own + int(config.get("num_decoder_layers") or own)


def _check_kind(kind: str, config: Mapping[str, Any], shapes: Mapping[str, Shape], path: Any) -> None:
    """Raise BankError for what the mixture class cannot say."""
    if kind in ("llama", "mistral") and (biased := [n for n in shapes if re.search(r"self_attn\..*_proj\.bias", n)]):
        raise BankError(f"`{path}` has `{biased[0]}`, and Mixtral has no biases. Take a model without them.")
    if kind in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        raise BankError(f"`{path}` has `use_sliding_window`, which its mixture class reads otherwise. Switch it off.")
    if kind == "vit" and not (config.get("hidden_act", "gelu") in VIT_ACTIVATIONS and "classifier.weight" in shapes):
        raise BankError(
            f"`{path}` is no ViTForImageClassification with one of the activations {', '.join(VIT_ACTIVATIONS)}, which "
            "lcsc's own mixture is."
        )
    if kind == "t5" and config.get("feed_forward_proj", "relu") != "relu":
        raise BankError(
            f"`{path}` has `feed_forward_proj` {config['feed_forward_proj']}; the experts of SwitchTransformers are "
            "those of the first T5, `relu`."
        )
    if kind == "t5" and False in (config.get("scale_decoder_outputs"), config.get("tie_word_embeddings")):
        raise BankError(
            f"`{path}` does not scale its decoder's output as the first T5 does, and SwitchTransformers does."
        )


# ------------------------------------------------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class Mixture:
    """The class that a dense model becomes.

    Args:
        name: of the class.
        kind: its model_type; None for a class of ours.
        normalizes: whether the weights of a token's experts can sum to one.
        choices: the numbers of experts of a token that it can have; None for any.
    """

    name: str
    kind: str | None
    normalizes: bool = True
    choices: tuple[int, ...] | None = None


MIXTRAL = Mixture("MixtralForCausalLM", "mixtral")
QWEN2 = Mixture("Qwen2MoeForCausalLM", "qwen2_moe")
QWEN3 = Mixture("Qwen3MoeForCausalLM", "qwen3_moe")
SWITCH = Mixture("SwitchTransformersForConditionalGeneration", "switch_transformers", False, (1,))
VIT = Mixture("MixtureViT", None)


def mixture_of(found: Dense, config: Mapping[str, Any], every: bool, path: Any) -> Mixture:
    """The class for a dense model; for Llama and Mistral it depends on whether every layer is to be a mixture.

    Raises:
        ConfigError: no class can say a choice of layers for this model.
    """
    if found.kind in ("llama", "mistral") and not every:
        sliding = config.get("sliding_window", 4096 if found.kind == "mistral" else None)
        if sliding is not None:
            raise ConfigError(
                f"`{path}` has `sliding_window` {sliding}: Mixtral makes every layer a mixture, and Qwen2-MoE, which "
                "can leave some dense, reads it otherwise. Use `operator.layers=all`."
            )
        return QWEN2
    by_kind = {"llama": MIXTRAL, "mistral": MIXTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "t5": SWITCH, "vit": VIT}
    return by_kind[found.kind]


def names_of(mixture: Mixture, stem: str, expert: int) -> dict[str, str]:
    """Names of one expert's tensors in files, by role."""
    if mixture is SWITCH:
        at = f"{stem}.mlp.experts.expert_{expert}"
        return {"up": f"{at}.wi.weight", "down": f"{at}.wo.weight"}
    if mixture is VIT:
        return {role: f"{stem}.mixture.experts.{expert}.{name}" for name, role in FAMILIES["vit"].items()}
    return expert_names(mixture.name, stem, expert)


def router_of(mixture: Mixture, stem: str) -> str:
    """Name of a layer's router in files."""
    if mixture is SWITCH:
        return f"{stem}.mlp.router.classifier.weight"
    return f"{stem}.mixture.router.weight" if mixture is VIT else router_name(mixture.name, stem)


def dense_name(mixture: Mixture, name: str) -> str:
    """What the mixture calls a tensor of a block that stays dense."""
    return name.replace(".DenseReluDense.", ".mlp.") if mixture is SWITCH else name


def switch_layers(chosen: tuple[int, ...], num_layers: int, where: str) -> int:
    """`num_sparse_*_layers` of a SwitchTransformers for a choice of layers of its encoder or decoder.

    The class makes a layer i a mixture where i % step == 1 (all, where step is 1), step = num_layers // number.

    Raises:
        ConfigError: no number says this choice.
    """
    for number in range(num_layers + 1):
        step = num_layers // number if number else num_layers
        if tuple(i for i in range(num_layers) if i % step == 1 or step == 1) == chosen:
            return number
    raise ConfigError(
        f"`operator.layers` chooses {list(chosen)} of the {num_layers} {where} layers, and SwitchTransformers can only "
        "say all, or one in so many beginning with the second. Use `all` or `alternate`."
    )


def mixture_config(
    found: Dense, mixture: Mixture, old: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of the mixture: what the dense model has, with defaults of its class that the other does not share,
    and without what the other does not know.

    Args:
        found: the dense model.
        mixture: the class.
        old: configuration of the dense model.
        changes: what is said of the experts.

    Raises:
        BankError: settings that transformers refuses.
        MissingExtraError: transformers, whose defaults they are, is not installed.
    """
    if mixture is VIT:
        full = filled_config("vit", old)
        own = {key: full[key] for key in _VIT_SETTINGS}
        return {"_class_name": mixture.name, **own, "num_labels": found.labels, **changes}
    config = {**old, "architectures": [mixture.name], "model_type": mixture.kind, **changes}
    dense, sparse = filled_config(found.kind, {}), filled_config(str(mixture.kind), {})
    unknown = set(dense) - set(sparse) - {"head_dim"}  # which is read undeclared
    config = {key: value for key, value in config.items() if key in changes or key not in unknown}
    before, after = filled_config(found.kind, old), filled_config(str(mixture.kind), config)
    said = {*changes, "architectures", "model_type", "transformers_version", "dtype", "torch_dtype"}
    differing = {
        key: value for key, value in before.items() if key in after and after[key] != value and key not in said
    }
    rope = differing.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in old:  # as transformers 4 reads it
        differing["rope_theta"] = rope["rope_theta"]
    return config | differing

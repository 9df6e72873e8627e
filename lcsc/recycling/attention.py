"""Where the attention heads of transformers' models lie, and which models have key/value heads of their own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcsc.core.errors import BankError
from lcsc.recycling.kinds import known_kind

#: the setting of transformers' configurations that counts them
HEADS = "num_key_value_heads"

#: model_type -> names of the projections q, k, v and o, and of the norms of queries and keys. All rotate in the
#: half-split layout; each is held to transformers' own forward pass by the tests.
_PLAIN = {role: f"{role}_proj" for role in "qkvo"}
_NORMED = {**_PLAIN, "q_norm": "q_norm", "k_norm": "k_norm"}
FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2"), _PLAIN),
    **dict.fromkeys(("qwen3", "qwen3_moe", "gemma3_text"), _NORMED),
    "phi": {**_PLAIN, "o": "dense"},
}
#: model_type -> why not, for models that one might try
REFUSED = {
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bert", "roberta", "t5", "mt5", "bart", "vit"),
        "has no key/value heads of its own (`num_key_value_heads` in its configuration would be ignored)",
    ),
    "falcon": "keeps queries, keys and values in one tensor",
    "phi3": "keeps queries, keys and values in one tensor",
}


@dataclass(frozen=True)
class Attention:
    """The attention of a model, the same in all layers.

    Args:
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor.
        head_size: numbers of a head.
        rotary_dims: how many of them are rotated.
        layers: for each layer the names of its tensors by role, as `lcsc.recycling.heads.regroup` takes them.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_dims: int
    layers: tuple[Mapping[str, str], ...]

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of groups into which the heads can be divided, increasing."""
        return tuple(n for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0)


def heads_settings(counts: Sequence[int]) -> dict[str, Any]:
    """Settings of a configuration with so many key/value heads in each layer."""
    most = max(counts)
    if len(set(counts)) == 1:
        return {HEADS: most}
    return {HEADS: most, "per_layer_config": {str(i): {HEADS: n} for i, n in enumerate(counts) if n != most}}


def find_attention(arch: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Any) -> Attention:
    """The attention of a model whose configuration has a real `num_key_value_heads`.

    Args:
        arch: `{"class", "config"}`.
        shapes: of all tensors, by name.
        path: of the model, for messages.

    Raises:
        BankError: a model of another family (named), a quantized one, or tensors that do not fit the configuration.
    """
    config = arch["config"]
    otherwise = "is not among the models whose heads lcsc knows how to turn"
    names = FAMILIES[known_kind(arch, path, FAMILIES, REFUSED, otherwise)]
    if config.get("quantization_config") is not None:
        raise BankError(f"`{path}` holds quantized weights, whose heads cannot be averaged. Save it unquantized.")
    found: dict[int, dict[str, str]] = {}
    by_module = {module: role for role, module in names.items()}
    for name in shapes:
        match = re.fullmatch(r"(?:.+\.)?layers\.(\d+)\.self_attn\.(\w+)\.(weight|bias)", name)
        if match and match[2] in by_module:
            found.setdefault(int(match[1]), {})[f"{by_module[match[2]]}.{match[3]}"] = name
        elif match:
            raise BankError(f"`{path}` has `{name}`, which the turns of heads do not know. Take a model without it.")
    num_layers = config.get("num_hidden_layers")
    if sorted(found) != list(range(len(found))) or not found or num_layers not in (None, len(found)):
        raise BankError(f"`{path}` has attention in layers {sorted(found)}, its configuration has {num_layers}.")
    layers = tuple(found[i] for i in range(len(found)))
    Q, H, d = _sizes(config, layers, shapes, path)
    return Attention(Q, H, d, _rotary_dims(config, d), layers)


def _sizes(
    config: Mapping[str, Any], layers: Collection[Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]], path: Any
) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size, by the tensors; the configuration has to agree."""
    rows = {"q": 0, "k": 0, "v": 0}
    Q = config.get("num_attention_heads")
    for i, layer in enumerate(layers):
        if missing := sorted({f"{role}.weight" for role in "qkvo"} - set(layer)):
            raise BankError(f"`{path}` lacks `{missing[0]}` of the attention of layer {i}; its weights are incomplete.")
        here = {role: shapes[layer[f"{role}.weight"]][0] for role in rows}
        if i and here != rows:
            raise BankError(f"the heads of layer {i} of `{path}` have {here} rows, those of layer 0 {rows}.")
        rows = here
    if not isinstance(Q, int) or Q < 1 or rows["q"] % Q or rows["k"] != rows["v"] or rows["k"] % (rows["q"] // Q):
        raise BankError(f"`{path}` has {rows} rows for `num_attention_heads` {Q}; the two do not fit together.")
    d = rows["q"] // Q
    H = rows["k"] // d
    if config.get("num_key_value_heads") not in (None, H) or Q % H:
        raise BankError(
            f"`{path}` holds {H} key/value heads for {Q} query heads, its configuration says "
            f"{config.get('num_key_value_heads')}. config.json and weights must be one save."
        )
    for layer in layers:
        for role, name in layer.items():
            if role.endswith("norm.weight") and shapes[name] != (d,):
                raise BankError(f"`{name}` of `{path}` has shape {shapes[name]}; a norm of each head has ({d},).")
    return Q, H, d


def _rotary_dims(config: Mapping[str, Any], d: int) -> int:
    """How many coordinates of a head are rotated; older files of Phi leave its default out."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    default = 0.5 if config["model_type"] == "phi" else 1.0
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", default))
    return int(d * share)

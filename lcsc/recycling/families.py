"""Encoders and decoders that a sequence-to-sequence model can begin as: what their tensors are called, and how large.

Names here are those below the base model (`embeddings.word_embeddings.weight`), without `bert.` or `transformer.`, and
those of the head. D = width, I = width of a feed-forward block, V = tokens, P = positions, T = token types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcsc.core.errors import BankError
from lcsc.recycling.kinds import known_kind

Shape = tuple[int, ...]

_ATTENTION = {
    **{f"self.{role}.weight": "DD" for role in ("query", "key", "value")},
    **{f"self.{role}.bias": "D" for role in ("query", "key", "value")},
    **{"output.dense.weight": "DD", "output.dense.bias": "D"},
    **{"output.LayerNorm.weight": "D", "output.LayerNorm.bias": "D"},
}
_BERT_LAYER = {
    **{f"attention.{name}": axes for name, axes in _ATTENTION.items()},
    **{"intermediate.dense.weight": "ID", "intermediate.dense.bias": "I"},
    **{"output.dense.weight": "DI", "output.dense.bias": "D"},
    **{"output.LayerNorm.weight": "D", "output.LayerNorm.bias": "D"},
}
_BERT_BASE = {
    **{"embeddings.word_embeddings.weight": "VD", "embeddings.position_embeddings.weight": "PD"},
    **{"embeddings.token_type_embeddings.weight": "TD"},
    **{"embeddings.LayerNorm.weight": "D", "embeddings.LayerNorm.bias": "D"},
}
_BERT_HEAD = {
    **{"cls.predictions.bias": "V", "cls.predictions.transform.dense.weight": "DD"},
    **{"cls.predictions.transform.dense.bias": "D", "cls.predictions.transform.LayerNorm.weight": "D"},
    **{"cls.predictions.transform.LayerNorm.bias": "D"},
}
_ROBERTA_HEAD = {
    **{"lm_head.bias": "V", "lm_head.dense.weight": "DD", "lm_head.dense.bias": "D"},
    **{"lm_head.layer_norm.weight": "D", "lm_head.layer_norm.bias": "D"},
}
#: weights of GPT-2's projections are stored (in, out); 2D and 3D are queries, keys and values side by side
_GPT_LAYER = {
    **{"ln_1.weight": "D", "ln_1.bias": "D", "ln_2.weight": "D", "ln_2.bias": "D"},
    **{"attn.c_attn.weight": "D3", "attn.c_attn.bias": "3", "attn.c_proj.weight": "DD", "attn.c_proj.bias": "D"},
    **{"mlp.c_fc.weight": "DI", "mlp.c_fc.bias": "I", "mlp.c_proj.weight": "ID", "mlp.c_proj.bias": "D"},
}
_GPT_CROSS = {
    **{"crossattention.c_attn.weight": "D2", "crossattention.c_attn.bias": "2"},
    **{"crossattention.q_attn.weight": "DD", "crossattention.q_attn.bias": "D"},
    **{"crossattention.c_proj.weight": "DD", "crossattention.c_proj.bias": "D"},
    **{"ln_cross_attn.weight": "D", "ln_cross_attn.bias": "D"},
}


@dataclass(frozen=True)
class Family:
    """The tensors of one kind of model.

    Args:
        kind: its `model_type`.
        prefix: of the base model in a model with a head.
        stem: of the layers.
        base: tensors before and behind the layers, with their axes.
        layer: those of a layer.
        cross: those that a layer has more where it attends to an encoder.
        head: those of the language model's head that are not tied to the embeddings.
        words: the embedding matrix.
        keys: what the configuration calls D, I, V, P, and the numbers of layers and heads.
        encodes: whether it can be an encoder.
    """

    kind: str
    prefix: str
    stem: str
    base: Mapping[str, str]
    layer: Mapping[str, str]
    cross: Mapping[str, str]
    head: Mapping[str, str]
    words: str
    keys: Mapping[str, str]
    encodes: bool

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Numbers by letter, `layers` and `heads` besides, from a configuration with all its defaults."""
        found = {letter: int(config[key] or 4 * config[self.keys["D"]]) for letter, key in self.keys.items()}
        return found | {"2": 2 * found["D"], "3": 3 * found["D"]}

    def shape(self, axes: str, sizes: Mapping[str, int]) -> Shape:
        """A tensor's shape from its axes."""
        return tuple(sizes[letter] for letter in axes)

    def in_layer(self, place: int, name: str) -> str:
        """Name of a layer's tensor below the base model."""
        return f"{self.stem}.{place}.{name}"

    def full(self, name: str) -> str:
        """Name in a language model; that of a head's tensor is the same."""
        return name if name in self.head else f"{self.prefix}.{name}"

    def keys_in(self, name: str) -> tuple[str, ...]:
        """What files may call a tensor: with and without the prefix, and as TensorFlow called its norms."""
        names = [self.full(name)] if name in self.head else [self.full(name), name]
        old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
        return (*names, *(n.replace(a, b) for n in names for a, b in old.items() if n.endswith(a)))


_BERT_KEYS = {
    **{"D": "hidden_size", "I": "intermediate_size", "V": "vocab_size", "P": "max_position_embeddings"},
    **{"T": "type_vocab_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"},
}
_GPT_KEYS = {
    **{"D": "n_embd", "I": "n_inner", "V": "vocab_size", "P": "n_positions", "layers": "n_layer", "heads": "n_head"},
}
_BERT_CROSS = {f"crossattention.{name}": axes for name, axes in _ATTENTION.items()}
_WORDS = "embeddings.word_embeddings.weight"
_BERT = ("encoder.layer", _BERT_BASE, _BERT_LAYER, _BERT_CROSS)
#: model_type -> its tensors
FAMILIES = {
    "bert": Family("bert", "bert", *_BERT, _BERT_HEAD, _WORDS, _BERT_KEYS, True),
    **{
        kind: Family(kind, "roberta", *_BERT, _ROBERTA_HEAD, _WORDS, _BERT_KEYS, True)
        for kind in ("camembert", "roberta", "xlm-roberta")
    },
    "gpt2": Family(
        "gpt2",
        "transformer",
        "h",
        {"wte.weight": "VD", "wpe.weight": "PD", "ln_f.weight": "D", "ln_f.bias": "D"},
        _GPT_LAYER,
        _GPT_CROSS,
        {},
        "wte.weight",
        _GPT_KEYS,
        False,
    ),
}
#: model_type -> why it is no decoder here, for models that one might try
_NO_CROSS = "has no attention to an encoder in transformers"
REFUSED = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "opt", "gpt_neox", "olmo"),
        _NO_CROSS,
    ),
    **dict.fromkeys(("distilbert", "albert", "mpnet", "deberta", "deberta-v2", "modernbert", "vit"), _NO_CROSS),
    **dict.fromkeys(("t5", "bart", "encoder-decoder", "lcsc-encoder-decoder"), "is an encoder and a decoder already"),
}


def find_family(arch: Mapping[str, Any] | None, path: Any, role: str) -> Family:
    """The family of a source.

    Args:
        arch: `{"class", "config"}`, None where no config.json says it.
        path: of the source, for messages.
        role: `encoder` or `decoder`.

    Raises:
        BankError: another kind of model (named, with the reason), one whose head is not tied to its embeddings,
            attention with other positions than learned ones, or a GPT-2 as an encoder.
    """
    config = (arch or {}).get("config", {})
    if arch is None or config.get("model_type") is None:
        raise BankError(f"`{path}` is no model of transformers with a config.json. Give one of: {', '.join(FAMILIES)}.")
    said = f"`{path}` is a `{arch['class']}`"
    otherwise = "is not among the models that lcsc can begin an encoder or a decoder from"
    kind = known_kind(arch, path, FAMILIES, REFUSED, otherwise)
    if config.get("quantization_config") is not None:
        raise BankError(f"{said} of quantized weights, which cannot be copied into a model to train. Save it plain.")
    if role == "encoder" and not FAMILIES[kind].encodes:
        raise BankError(
            f"{said}, which attends to earlier tokens only, also as an encoder. Give a BERT or RoBERTa as the encoder, "
            "or `operator.encoder=random`."
        )
    if config.get("tie_word_embeddings") is False:
        raise BankError(f"{said} whose head is not tied to its embeddings, which lcsc does not begin a decoder from.")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise BankError(f"{said} with `{config['position_embedding_type']}` positions; learned ones are needed.")
    return FAMILIES[kind]

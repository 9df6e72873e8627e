"""Language models of transformers: build, load and save them by class, and what their cache takes."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.models.mixed_heads import mixed_class
from lcsc.recycling.composite import SHARED, STOCK
from lcsc.recycling.experts import MIXTURES
from lcsc.recycling.families import FAMILIES

#: Classes of transformers that are built and loaded, whose forward pass takes `input_ids` and gives `logits`.
CAUSAL_LMS = (
    *("CohereForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "GemmaForCausalLM"),
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM"),
    *("OlmoForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM"),
    *("Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM"),
)

#: Classes of transformers that tell hidden tokens from those on both sides.
MASKED_LMS = ("BertForMaskedLM", "CamembertForMaskedLM", "RobertaForMaskedLM", "XLMRobertaForMaskedLM")

#: Kinds whose first token has the position behind that of padding, which is the padding token's number.
COUNTED_FROM_PADDING = ("camembert", "roberta", "xlm-roberta")

#: Tokens of a text of bytes, and rows that a network may have beyond the tokens of a tokenizer.
BYTES, SPARE_TOKENS = 256, 1024

#: Settings of a config.json that fetch and run kernels from a hub, or say what we say ourselves.
_LEFT_OUT = ("attn_implementation", "experts_implementation", "dtype", "torch_dtype", "auto_map")

#: Settings that classes read without declaring them, or that transformers translates.
_READ = ("head_dim", "per_layer_config", "rope_scaling", "rope_theta", "torch_dtype")


def build_causal_lm(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network in float32; raises what transformers raises for values that it refuses."""
    return mixed_class(cls, config)(_config(cls, config)).float()  # type: ignore[no-any-return]


def load_causal_lm(cls: Any, folder: Path, config: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network in `folder` in eval mode, float32, and transformers' notes on tensors that do not fit; offline."""
    return mixed_class(cls, config).from_pretrained(  # type: ignore[no-any-return]
        str(folder),
        config=_config(cls, config),
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )


def save_causal_lm(cls: Any, net: nn.Module, folder: Path, max_shard_size: str) -> None:
    """Write config.json and safetensors into `folder`, under the names that the tensors have in memory.

    Only experts of a mixture are cut one by one, as transformers does it by itself, so that its older versions open
    them too.
    """
    split = cls.__name__ in MIXTURES
    cls.save_pretrained(net, str(folder), max_shard_size=max_shard_size, save_original_format=split)


def saved_settings(arch: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of a transformers network in float32, None where `arch` is none."""
    config = {key: value for key, value in arch["config"].items() if key not in ("torch_dtype", "architectures")}
    if arch["class"] not in (*CAUSAL_LMS, *MASKED_LMS) and "model_type" not in config:
        return None
    if "model_type" not in config:
        import transformers

        config["model_type"] = getattr(transformers, arch["class"]).config_class.model_type
    return {"architectures": [arch["class"]], **config, "dtype": "float32"}


def unknown_settings(cls: Any, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys of `config` that the class's configuration does not have, and those it has.

    transformers keeps any key. One from a config.json may be a leftover; one that a user typed is a mistake.
    """
    own = cls.config_class()
    known = sorted({*own.to_dict(), *own.attribute_map, *_READ})
    return sorted(key for key in config if key not in known), known


def kv_cache_bytes(config: Any) -> int | None:
    """Bytes that one more token takes in the cache of keys and values; None where the configuration does not tell.

    2 x heads of keys x size of a head x bytes of a number of `config.dtype` (float32 where it is not set), over the
    layers, which may differ (`per_layer_config`). Layers with a sliding window stop growing at its length. transformers
    keeps keys that mean nothing to a class, so heads of keys and their size are believed where the class has grouped
    heads.

    Args:
        config: of a network, as transformers makes it.
    """
    num = getattr(config, "num_hidden_layers", None)
    mixed = getattr(config, "is_heterogeneous", False)
    layers = list(config.per_layer_config) if mixed else [config] * (num or 0)
    own = {field for base in type(config).__mro__ for field in vars(base).get("__annotations__", ())}
    numbers = [_cached_numbers(layer, "num_key_value_heads" in own) for layer in layers]
    if not numbers or None in numbers:
        return None
    dtype = getattr(config, "dtype", None)
    return 2 * sum(filter(None, numbers)) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)


def _cached_numbers(config: Any, grouped: bool) -> int | None:
    """Numbers of a token's keys in one layer."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not heads or not width:
        return None
    key_heads = (config.num_key_value_heads if grouped else None) or heads
    size = (getattr(config, "head_dim", None) if grouped else None) or width // heads
    return int(key_heads * size)


def active_parameters(net: nn.Module) -> int:
    """Parameters that one token uses, tied ones once: of a mixture's experts those that it is sent to.

    Every layer's experts are alike, so of `num_experts` (or `num_local_experts`) it uses `num_experts_per_tok` at most.
    """
    total = sum(parameter.numel() for parameter in net.parameters())
    names = ("num_experts", "num_local_experts")
    num = next((n for name in names if (n := getattr(net.config, name, None))), None)
    used = getattr(net.config, "num_experts_per_tok", None)
    if not num or not used:
        return total
    experts = sum(parameter.numel() for name, parameter in net.named_parameters() if ".experts." in name)
    return total - experts + experts * min(used, num) // num


def token_losses(net: nn.Module, ids_NT: Tensor) -> Tensor:
    """Cross-entropy of each token but the first given those before it, in nats, float32, shape (N, T - 1).

    transformers' own loss with `labels` is its mean, but for what a mixture adds to balance its experts in training.
    """
    logits_NTV = net(input_ids=ids_NT, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits_NTV[:, :-1].transpose(1, 2), ids_NT[:, 1:], reduction="none")


def check_text(config: Any, vocab_size: int, length: int) -> None:
    """Refuse a network that reads other tokens than a text's, or fewer at once than `length`.

    Networks often have a few more rows than their tokenizer has tokens, for shapes that are quick; a text of bytes has
    no such tokenizer.

    Raises:
        ConfigError: naming both numbers.
    """
    room = config.vocab_size - vocab_size
    if room < 0 or room > (0 if vocab_size <= BYTES else SPARE_TOKENS):
        raise ConfigError(
            f"the network has {config.vocab_size} tokens, and the text {vocab_size}: they would not mean the same. Use "
            f"a network with `vocab_size` {vocab_size}, trained on such tokens."
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and config.model_type in COUNTED_FROM_PADDING:
        most -= config.pad_token_id + 1
    if most is not None and length > most:
        raise ConfigError(
            f"`block_length` is {length}, and the network reads at most {most} tokens. Give shorter blocks, or a "
            "network with more `max_position_embeddings`."
        )


def _config(cls: Any, config: Mapping[str, Any]) -> Any:
    kept = _kept(config)
    if cls.__name__ in (STOCK[0], SHARED[0]):
        kept |= {role: _part(role, config.get(role)) for role in ("encoder", "decoder")}
    return cls.config_class(**kept)


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _LEFT_OUT}


def _part(role: str, config: Any) -> dict[str, Any]:
    """The configuration of an encoder or decoder; raises ConfigError for a kind that none is made of here."""
    kind = config.get("model_type") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or kind not in FAMILIES or config.get("quantization_config") is not None:
        raise ConfigError(f"the {role} is `{kind}`, or quantized; plain ones of {', '.join(FAMILIES)} are built.")
    return _kept(config)


@contextlib.contextmanager
def quiet(library: str = "transformers") -> Iterator[None]:
    """Silence a library's log below errors and its bars; `diffusers` has the same switches."""
    logging = importlib.import_module(f"{library}.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

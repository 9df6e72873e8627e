"""Configurations of sequence-to-sequence models that are put together from an encoder's and a decoder's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcsc.core.errors import ConfigError
from lcsc.recycling.families import Family
from lcsc.recycling.vocabulary import Vocabulary

#: class and `model_type` of transformers, and of lcsc where encoder and decoder share tensors, which transformers 5
#: does not: its own class would open such a folder with random numbers in place of the shared ones
STOCK = ("EncoderDecoderModel", "encoder-decoder")
SHARED = ("SharedEncoderDecoderModel", "lcsc-encoder-decoder")
#: name in the paper -> model_type of encoder and decoder (or `random`, `none`), and what they share
COMBINATIONS: dict[str, tuple[str, str, str]] = {
    "rnd2rnd": ("random", "random", "embeddings"),
    "bert2rnd": ("bert", "random", "embeddings"),
    "rnd2bert": ("random", "bert", "embeddings"),
    "bert2bert": ("bert", "bert", "embeddings"),
    "bertshare": ("bert", "bert", "all"),
    "robertashare": ("roberta", "roberta", "all"),
    "gpt": ("none", "gpt2", "none"),
    "rnd2gpt": ("random", "gpt2", "embeddings"),
    "bert2gpt": ("bert", "gpt2", "none"),
    "roberta2gpt": ("roberta", "gpt2", "none"),
}
#: of a source's configuration, what speaks of its files or of another task
_LEFT_OUT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "task_specific_params"),
    *("attn_implementation", "experts_implementation", "id2label", "label2id", "problem_type"),
}


@dataclass(frozen=True)
class Tokens:
    """What `generate` needs: the decoder's first token, the one that ends a text, and the one behind it."""

    start: int
    end: int
    pad: int


def part_config(family: Family, config: Mapping[str, Any], role: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of an encoder or a decoder.

    Args:
        family: of the new side.
        config: of its source, which is of another family where a random encoder has the sizes of a GPT-2.
        role: `encoder`, `decoder`, or `alone` for a decoder without an encoder.
        sizes: of the new side; see `Family.sizes`.
    """
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT and not key.startswith("_")}
    if config["model_type"] != family.kind:
        kept = {family.keys[letter]: sizes[letter] for letter in ("D", "I", "P", "heads")}
        kept |= {"model_type": family.kind, "pad_token_id": None}
    kept |= {family.keys[letter]: sizes[letter] for letter in ("layers", "V")}
    if role == "alone":
        return kept
    return {**kept, "is_decoder": role == "decoder", "add_cross_attention": role == "decoder"}


def composite_config(
    encoder: Mapping[str, Any], decoder: Mapping[str, Any], share: str, tokens: Tokens, dtype: str
) -> tuple[str, dict[str, Any]]:
    """Class and configuration of an encoder with a decoder."""
    name, kind = STOCK if share == "none" else SHARED
    config: dict[str, Any] = {
        "model_type": kind,
        "is_encoder_decoder": True,
        "encoder": dict(encoder),
        "decoder": dict(decoder),
        "decoder_start_token_id": tokens.start,
        "bos_token_id": tokens.start,
        "eos_token_id": tokens.end,
        "pad_token_id": tokens.pad,
        "dtype": dtype,
    }
    return name, config | ({} if share == "none" else {"share": share})


def find_tokens(
    config: Mapping[str, Any], known: Vocabulary | None, vocab_size: int, given: Mapping[str, int | None]
) -> Tokens:
    """The tokens of a decoder: as given, by its vocabulary, or by its configuration.

    A padding token must not be the first token: transformers hides every token like it from the decoder. Where there
    is none, as in GPT-2, it is the last one of the vocabulary, which is the rarest of a byte-pair encoding.

    Args:
        config: of the decoder's source.
        known: its vocabulary; None where no file lists it.
        vocab_size: of the decoder.
        given: numbers that were set, by `start`, `end` and `pad`.

    Raises:
        ConfigError: no first token or no last one is known, or numbers beyond the vocabulary.
    """
    found: dict[str, int | None] = {}
    for purpose, key in (("start", "bos_token_id"), ("end", "eos_token_id"), ("pad", "pad_token_id")):
        number = given[purpose]
        if number is not None and not 0 <= number < vocab_size:
            raise ConfigError(f"`operator.{purpose}_token` is {number}; the decoder has tokens 0 to {vocab_size - 1}.")
        if number is None and known is not None:
            number = known.special(purpose)
        if number is None and type(config.get(key)) is int:
            number = config[key]
        found[purpose] = number if number is not None and 0 <= number < vocab_size else None
    for purpose, what in (("start", "begins"), ("end", "ends")):
        if found[purpose] is None:
            raise ConfigError(
                f"neither config.json nor a vocabulary of the decoder says which token {what} a text. Give "
                f"`operator.{purpose}_token=NUMBER`."
            )
    start, end, pad = found["start"], found["end"], found["pad"]
    assert start is not None
    assert end is not None
    if given["pad"] is not None and given["pad"] == start:
        raise ConfigError(f"`operator.pad_token` is {pad}, which is the first token too. Give another one.")
    if pad is None or pad == start:
        pad = next(number for number in range(vocab_size - 1, -1, -1) if number not in (start, end))
    return Tokens(start, end, pad)

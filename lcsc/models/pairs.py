"""Sources and targets for models that write a text after reading another. S, T = tokens of a source, of a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.models.causal_lm import quiet
from lcsc.models.fit import Windows
from lcsc.models.generation import own_settings_aside

#: label of a token that no loss is of
IGNORED = -100


def is_composite(net: nn.Module) -> bool:
    """Whether a network has an encoder and a decoder; others read the source as the beginning of their text."""
    return bool(getattr(net.config, "is_encoder_decoder", False))


def inputs_of(net: nn.Module, ids_NL: Tensor, source: int) -> dict[str, Tensor]:
    """What a network is given for texts whose first `source` tokens are the source, and the labels of its loss.

    The decoder's inputs are said, because transformers' own ones would hide tokens that are like the padding token.

    Args:
        net: an encoder-decoder or a causal language model of transformers.
        ids_NL: int64, shape (..., S + T).
        source: S.
    """
    source_NS, target_NT = ids_NL[..., :source], ids_NL[..., source:]
    if not is_composite(net):
        labels_NL = torch.cat([torch.full_like(source_NS, IGNORED), target_NT], -1)
        return {"input_ids": ids_NL, "labels": labels_NL}
    config: Any = net.config
    start = torch.full_like(target_NT[..., :1], config.decoder_start_token_id)
    shifted_NT = torch.cat([start, target_NT[..., :-1]], -1)
    return {"input_ids": source_NS, "decoder_input_ids": shifted_NT, "labels": target_NT}


def pair_losses(net: nn.Module, ids_NL: Tensor, source: int) -> Tensor:
    """Cross-entropy of each token of the targets given source and tokens before it, in nats, float32, shape (N, T)."""
    inputs = inputs_of(net, ids_NL, source)
    del inputs["labels"]
    logits_NLV = net(**inputs, use_cache=False).logits.float()
    if not is_composite(net):
        logits_NLV = logits_NLV[:, source - 1 : -1]
    return nn.functional.cross_entropy(logits_NLV.transpose(1, 2), ids_NL[:, source:], reduction="none")


@torch.no_grad()
def write_targets(net: nn.Module, source_NS: Tensor, num_tokens: int) -> Tensor:
    """The likeliest next token after the other, as many as asked for, by transformers' `generate` with its cache.

    Args:
        net: as for `inputs_of`, in evaluation mode.
        source_NS: int64, on the network's device.
        num_tokens: T.

    Returns:
        int64, shape (N, T).
    """
    from transformers import GenerationConfig

    start = getattr(net.config, "decoder_start_token_id", None) if is_composite(net) else None
    how = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, use_cache=True, decoder_start_token_id=start, pad_token_id=0
    )
    with quiet(), own_settings_aside(net):
        mask_NS = torch.ones_like(source_NS)
        found = net.generate(source_NS, attention_mask=mask_NS, generation_config=how)  # type: ignore[operator]
    return found[:, -num_tokens:]  # type: ignore[no-any-return]


class PairWindows(Windows):
    """The windows of a training, each cut into source and target for one network; see `inputs_of`.

    Args:
        stretches_SL: the training text.
        fit: as for `Windows`.
        seeds: what they are drawn by.
        net: that they are for.
        source: tokens of a source.
        pairs: makes source and target, one behind the other, of a window's tokens; None takes them as they are.
    """

    def __init__(
        self,
        stretches_SL: Tensor,
        fit: Any,
        seeds: Any,
        net: nn.Module,
        source: int,
        pairs: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(stretches_SL, fit, seeds)
        self._net, self._source, self._pairs = net, source, pairs

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids_L = super().__getitem__(i)["input_ids"]
        return inputs_of(self._net, ids_L if self._pairs is None else self._pairs(ids_L), self._source)

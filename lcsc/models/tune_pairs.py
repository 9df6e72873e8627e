"""Texts and their tunes as a network of transformers reads them; their losses, and the batches of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.seeds import SeedRange
from lcsc.models.causal_lm import CAUSAL_LMS, check_text
from lcsc.models.fit import Windows
from lcsc.models.pairs import IGNORED, is_composite
from lcsc.music.pairs import Pair
from lcsc.music.tokens import END, PAD, TUNE, VOCAB_SIZE, encode, prompt_tokens
from lcsc.recycling.composite import SHARED, STOCK

#: Classes that read a text and write a tune.
TUNE_MODELS = (STOCK[0], SHARED[0], *CAUSAL_LMS)
#: Stream of the order of the pairs.
PASS = 4
#: Batches whose pairs are sorted by length among themselves, so that little of a batch is padding.
POOL = 16


def check_tunes(config: Any, most: int) -> None:
    """Refuse a network that reads other tokens than those of texts and tunes, or fewer at once than `most`.

    Args:
        config: of a class of `TUNE_MODELS`, as transformers makes it.
        most: tokens; of an encoder-decoder those that the decoder reads.

    Raises:
        ConfigError: naming both numbers.
    """
    if not getattr(config, "is_encoder_decoder", False):
        check_text(config, VOCAB_SIZE, most)
        return
    check_text(config.encoder, VOCAB_SIZE, 2)
    check_text(config.decoder, VOCAB_SIZE, most)


def tune_inputs(net: nn.Module, pairs: Sequence[Pair], *, texts: bool = True, most: int | None = None) -> Any:
    """What a network is given for N pairs, and the labels of its loss: the tokens of the tunes and their ends.

    A language model reads a text as the beginning of its tune; nothing looks ahead, so what pads a row behind its end
    changes nothing before it. An encoder-decoder reads the text with its encoder. The decoder's inputs are said,
    because transformers' own ones would hide tokens that are like the padding token.

    Args:
        net: of a class of `TUNE_MODELS`.
        pairs: N of them.
        texts: whether a language model reads the texts at all.
        most: tokens of a row at which it is cut.

    Returns:
        `input_ids`, `labels` and for an encoder-decoder `attention_mask` and `decoder_input_ids`, int64 (N, ...).
    """
    device = next(net.parameters()).device
    sources = [prompt_tokens(pair.text) if texts else [TUNE] for pair in pairs]
    targets = [[*encode(pair.tune), END] for pair in pairs]
    if not is_composite(net):
        rows = [source + target for source, target in zip(sources, targets, strict=True)]
        labels = [[IGNORED] * len(source) + target for source, target in zip(sources, targets, strict=True)]
        return {"input_ids": _padded(rows, PAD, most, device), "labels": _padded(labels, IGNORED, most, device)}
    config: Any = net.config
    shifted = [[config.decoder_start_token_id, *target[:-1]] for target in targets]
    return {
        "input_ids": _padded(sources, PAD, None, device),
        "attention_mask": _padded([[1] * len(source) for source in sources], 0, None, device),
        "decoder_input_ids": _padded(shifted, PAD, most, device),
        "labels": _padded(targets, IGNORED, most, device),
    }


def tune_losses(net: nn.Module, pairs: Sequence[Pair]) -> Tensor:
    """Mean cross-entropy of each tune's tokens and its end given the text, in nats, float32 (N,)."""
    inputs = tune_inputs(net, pairs)
    labels_NT = inputs.pop("labels")
    logits_NTV = net(**inputs, use_cache=False).logits.float()
    if not is_composite(net):
        logits_NTV, labels_NT = logits_NTV[:, :-1], labels_NT[:, 1:]
    losses_NT = nn.functional.cross_entropy(
        logits_NTV.transpose(1, 2), labels_NT, reduction="none", ignore_index=IGNORED
    )
    return losses_NT.sum(1) / (labels_NT != IGNORED).sum(1)


class TuneSteps(Windows):
    """The pairs of a training in their order: pass after pass, each drawn by (seed, pass) alone.

    Pairs of similar length stand together in a batch, and the batches of a pass in any order. What does not fill a
    batch is left out of a pass.

    Args:
        pairs: the training part.
        fit: how many steps there are, of how many pairs, and tokens at which a row is cut.
        seeds: what they are drawn by.
        net: that is trained.
        texts: see `tune_inputs`.

    Raises:
        ConfigError: rows are cut before their tunes begin, or an encoder-decoder would get no texts.
    """

    def __init__(self, pairs: Sequence[Pair], fit: Any, seeds: SeedRange, net: nn.Module, texts: bool = True) -> None:
        super().__init__(torch.zeros(0, 0), fit, seeds)
        if not texts and is_composite(net):
            raise ConfigError("an encoder-decoder reads texts; train it with `trainer.texts=true`.")
        source = 0 if is_composite(net) else max(len(prompt_tokens(p.text)) if texts else 1 for p in pairs)
        if fit.block_length <= source:  # a row would hold nothing of its tune
            raise ConfigError(
                f"`block_length` is {fit.block_length}, and the longest text takes {source} tokens before its tune "
                "begins. Give more, at best all of a pair."
            )
        self._pairs, self._net, self._texts, self._batch = pairs, net, texts, fit.batch_size
        self._lengths_N = np.array([len(encode(pair.tune)) + len(encode(pair.text)) * texts for pair in pairs])
        self._pass: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __getitem__(self, i: int) -> Pair:  # type: ignore[override]
        size = max(len(self._pairs) // self._batch, 1) * self._batch
        if self._pass[0] != i // size:
            self._pass = (i // size, self._order(i // size, size))
        return self._pairs[self._pass[1][i % size]]

    def collate(self, pairs: list[Pair]) -> Any:
        """See `Windows.collate`."""
        return tune_inputs(self._net, pairs, texts=self._texts, most=self._length)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the network, without padding."""
        lengths = {id(pair): n for pair, n in zip(self._pairs, self._lengths_N.tolist(), strict=True)}
        return sum(lengths[id(self[i])] for i in range(len(self)))

    def _order(self, number: int, size: int) -> np.ndarray:
        rng = self._seeds.generator(number, PASS)
        order_N = np.resize(rng.permutation(len(self._pairs)), size)
        pools = np.array_split(order_N, range(POOL * self._batch, size, POOL * self._batch))
        pools = [pool[np.argsort(self._lengths_N[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(pools).reshape(-1, self._batch)).reshape(-1)


def _padded(rows: Sequence[Sequence[int]], pad: int, most: int | None, device: torch.device) -> Tensor:
    tensors = [torch.tensor(row[:most]) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad).to(device)

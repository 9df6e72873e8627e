"""The loss of a language model on held-out text."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose
from lcsc.datasets.base import TextDataset, TextPart, need_text
from lcsc.datasets.content import text_digest
from lcsc.models.causal_lm import CAUSAL_LMS, active_parameters, check_text, kv_cache_bytes, token_losses
from lcsc.models.decoding import decode_speed
from lcsc.models.flat import LiveModel
from lcsc.objectives.mean_loss import MeanLoss
from lcsc.objectives.shared import KeptLive
from lcsc.operators.base import Candidate

#: texts that are continued at once when the speed is measured
DECODED = 8


@register("objective", "language_modeling", source="transformers' causal language modelling loss; Shannon 1951")
@dataclass(frozen=True)
class LanguageModeling(MeanLoss):
    """Mean cross-entropy of the next token on held-out text, in nats: no sampling, one network call a block.

    The stretches of the text's search half and report half are cut into blocks of `block_length` tokens, and the loss
    of a block is the mean over its tokens but the first. Image i of (seed, purpose) is a block; every block of the half
    comes up once before any comes up again. All candidates see the same blocks. The standard error takes blocks of one
    stretch together, because neighbours are alike.

    Full scores also hold `bits_per_byte` (where the text says which bytes its tokens are), `parameters` (tied ones
    once), of a mixture of experts `active_parameters` (those that a token uses) and, where the config tells,
    `kv_cache_bytes`: what one more token takes in the cache of keys and values in float32. After a search the speed of
    writing is measured, which is no part of a score.

    Args:
        dataset: the text.
        block_length: tokens of a block; the context that the last of them has, and one.
        batch_size: blocks per network call.
        device: torch device; `auto` takes the GPU where there is one.
        decode_tokens: that each of 8 texts is continued by when the speed is measured; 0 leaves it out.
    """

    dataset: TextDataset = field(metadata={"internal": True})
    block_length: int = 128
    batch_size: int = 64
    device: str = "auto"
    decode_tokens: int = 16

    name: ClassVar[str] = "language_modeling"
    forwards: ClassVar[tuple[int, int]] = (1, 3)
    #: classes that it runs
    classes: ClassVar[tuple[str, ...]] = CAUSAL_LMS

    def __post_init__(self) -> None:
        need_text(self.dataset, f"objective `{self.name}`")
        if self.batch_size < 1 or self.decode_tokens < 0:
            raise ConfigError(
                f"`objective.batch_size` is {self.batch_size} and `decode_tokens` {self.decode_tokens}; they must be "
                "at least 1, and at least 0."
            )
        stretch = self.dataset.tokens(TextPart.SEARCH).shape[1]
        if not 2 <= self.block_length <= stretch:
            raise ConfigError(
                f"`objective.block_length` is {self.block_length}; it must be at least 2 and at most the text's "
                f"stretch of {stretch} tokens."
            )
        self.__dict__["_kept"] = KeptLive()

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        for ids_NT in self._batches_of(live, self._rows(seed, purpose, images), purpose):
            yield token_losses(live.net, ids_NT).mean(1)

    def half(self, purpose: Purpose) -> np.ndarray:
        """See `MeanLoss.half`."""
        return np.arange(len(self._blocks(purpose)))

    def circumstances(self) -> dict[str, Any]:
        """Loss, text and library; `detector` is what turns a block into a number here."""
        settings = {"block_length": self.block_length, "transformers": importlib.metadata.version("transformers")}
        return {
            "metric": self.name,
            "detector": self.name,
            "detector_digest": value_digest({"name": self.name, **settings}),
            "nfe": self.forwards[0],
            "dataset": repr(self.dataset),
            "data_digest": self._data_digest,
            **settings,
        }

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        found: dict[str, dict[str, float]] = {}
        if hasattr(self.dataset, "byte_counts"):
            bytes_BT = self._in_blocks(self.dataset.byte_counts(_part(purpose)))
            bytes_NT = bytes_BT[torch.from_numpy(rows_N), self._first :]
            bits = bytes_NT.numel() / float(bytes_NT.sum()) / math.log(2)
            found["bits_per_byte"] = {"value": value * bits, **({} if se is None else {"se": se * bits})}
        return found | self._sizes(live)

    def _sizes(self, live: LiveModel) -> dict[str, dict[str, float]]:
        """Parameters and cache, as numbers of a full score."""
        sizes = {"parameters": sum(parameter.numel() for parameter in live.net.parameters())}
        if (active := active_parameters(live.net)) != sizes["parameters"]:
            sizes["active_parameters"] = active
        if (cache := kv_cache_bytes(live.net.config)) is not None:
            sizes["kv_cache_bytes"] = cache
        return {name: {"value": float(size), "se": 0.0} for name, size in sizes.items()}

    @property
    def _first(self) -> int:
        """The first token of a block that a loss is of; those before it are given."""
        return 1

    def speed(self, candidate: Candidate) -> Mapping[str, Any] | None:
        """See `Timed.speed`; the prompts are blocks of the search half, short enough to leave room for the rest."""
        num = min(self.decode_tokens, self.block_length - 1)
        if not num:
            return None
        live = self._live(candidate)
        blocks_NT = self._blocks(Purpose.SEARCH)[:DECODED, : self.block_length - num]
        return decode_speed(live.net, blocks_NT.to(live.theta_P.device).long(), num)

    def _groups(self, rows_N: np.ndarray) -> np.ndarray:
        """Blocks of one stretch go together."""
        return rows_N // (self.dataset.tokens(TextPart.SEARCH).shape[1] // self.block_length)

    def _batches_of(self, live: LiveModel, rows_N: np.ndarray, purpose: Purpose) -> Iterator[Tensor]:
        """Tokens of the blocks `rows_N` where the network runs, int64 (n, T) each."""
        blocks_BT = self._blocks(purpose)
        for start in range(0, len(rows_N), self.batch_size):
            rows = torch.from_numpy(rows_N[start : start + self.batch_size])
            yield blocks_BT[rows].to(live.theta_P.device).long()

    def _blocks(self, purpose: Purpose) -> Tensor:
        """All blocks of a purpose's half, shape (B, T), stretch after stretch; the rest of a stretch is left out."""
        return self._in_blocks(self.dataset.tokens(_part(purpose)))

    def _in_blocks(self, stretches_SL: Tensor) -> Tensor:
        num = stretches_SL.shape[1] // self.block_length
        return stretches_SL[:, : num * self.block_length].reshape(-1, self.block_length)

    @functools.cached_property
    def _data_digest(self) -> str:
        return text_digest(self.dataset)

    def _live(self, candidate: Candidate) -> LiveModel:
        arch = candidate.arch
        if arch is not None and arch.get("class") not in self.classes:
            raise ConfigError(
                f"objective `{self.name}` runs language models of transformers, and the checkpoints hold "
                f"`{arch.get('class')}`. Use one of: {', '.join(self.classes)}."
            )
        live = super()._live(candidate)
        self._check_tokens(live.net.config)
        return live

    def _check_tokens(self, config: Any) -> None:
        """Raise ConfigError where a network of this configuration does not read the text's tokens, or fewer at once."""
        check_text(config, self.dataset.vocab_size, self.block_length)


def _part(purpose: Purpose) -> TextPart:
    """The half of the text that a purpose reads."""
    return TextPart.REPORT if purpose is Purpose.REPORT else TextPart.SEARCH

"""The loss of a model that goes on with a text which its encoder, or its beginning, has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.causal_lm import CAUSAL_LMS, check_text
from lcsc.models.fit import Windows
from lcsc.models.flat import LiveModel
from lcsc.models.flops import pair_training_flops
from lcsc.models.pairs import PairWindows, is_composite, pair_losses
from lcsc.objectives.uptrained_loss import UptrainedLoss
from lcsc.operators.base import Candidate
from lcsc.recycling.composite import SHARED, STOCK


@register("objective", "seq2seq", source="arXiv:1907.12461; transformers' EncoderDecoderModel")
@dataclass(frozen=True)
class Seq2Seq(UptrainedLoss):
    """Mean cross-entropy of held-out targets given their sources, in nats, after a fixed budget of fine-tuning.

    A block of the text is a pair: its first `source_length` tokens are the source, the others the target. An
    encoder-decoder reads the source with its encoder, a language model as the beginning of its text. Everything else is
    as in `uptrained_loss`: the same pairs for all candidates, `num_steps` 0 for what operators make as it is.

    Args:
        source_length: tokens of a source; null is half of a block.
    """

    source_length: int | None = None
    num_steps: int = 0
    decode_tokens: int = 0

    name: ClassVar[str] = "seq2seq"
    classes: ClassVar[tuple[str, ...]] = (STOCK[0], SHARED[0], *CAUSAL_LMS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self._first < self.block_length:
            raise ConfigError(
                f"`objective.source_length` is {self.source_length}; it must be at least 1 and below `block_length` "
                f"{self.block_length}."
            )

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        blocks_BL, rows_N = self._blocks(purpose), self._rows(seed, purpose, images)
        for start in range(0, len(images), self.batch_size):
            rows = torch.from_numpy(rows_N[start : start + self.batch_size])
            ids_NL = blocks_BL[rows].to(live.theta_P.device).long()
            yield pair_losses(live.net, ids_NL, self._first).mean(1)

    def circumstances(self) -> dict[str, Any]:
        """What `uptrained_loss` says, and where a block is cut."""
        said = super().circumstances()
        digest = value_digest({"before": said["detector_digest"], "source_length": self._first})
        return {**said, "detector_digest": digest, "source_length": self._first}

    def speed(self, candidate: Candidate) -> None:
        """Not measured: encoder-decoders and language models write in other ways."""
        return

    @property
    def _first(self) -> int:
        return self.block_length // 2 if self.source_length is None else self.source_length

    def _training_flops(self, net: nn.Module) -> int:
        if not is_composite(net):
            return super()._training_flops(net)
        pairs = self.num_steps * self.train_batch_size
        return pair_training_flops(net, pairs, self._first, self.block_length - self._first)

    def _windows(self, net: nn.Module, seeds: SeedRange) -> Windows:
        return PairWindows(self.dataset.tokens(TextPart.TRAIN), self.fit, seeds, net, self._first)

    def _check_tokens(self, config: Any) -> None:
        if not getattr(config, "is_encoder_decoder", False):
            super()._check_tokens(config)
            return
        check_text(config.encoder, self.dataset.vocab_size, self._first)
        check_text(config.decoder, self.dataset.vocab_size, self.block_length - self._first)

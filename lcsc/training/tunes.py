"""Models of text and tune, trained on whole pairs; what they are saved as is a bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import SeedRange
from lcsc.datasets.base import PairDataset, TextDataset, TextPart, need_pairs
from lcsc.models.causal_lm import CAUSAL_LMS
from lcsc.models.fit import Windows
from lcsc.models.network import check_typed
from lcsc.models.tune_pairs import TUNE_MODELS, TuneSteps, check_tunes
from lcsc.training.language import LanguageTrainer


@register("trainer", "tunes", source="arXiv:2211.11216; transformers' Trainer")
@dataclass(frozen=True)
class TuneTrainer(LanguageTrainer):
    """As `causal_lm`, on whole pairs of text and tune: the loss is of the tune's tokens and its end.

    Every tune begins with its metre, unit and key, without which the length of a bar cannot be known; windows that are
    cut anywhere mostly lack them. Each pair comes up once before any comes up again, and pairs of similar length stand
    together. An encoder-decoder reads the text with its encoder, a language model as the beginning of the tune. The
    pairs of a pass follow from (seed, pass) alone.

    Args:
        batch_size: pairs a step.
        block_length: tokens at which a longer pair (of an encoder-decoder a tune) is cut.
        texts: whether a language model reads the texts; without them it learns the tunes alone, as a decoder for
            operator=warm_start does.
    """

    batch_size: int = 8
    block_length: int = 512
    texts: bool = True

    name: ClassVar[str] = "tunes"
    classes: ClassVar[tuple[str, ...]] = TUNE_MODELS

    def _check(self, arch: Mapping[str, Any], dataset: TextDataset) -> None:
        need_pairs(dataset, "trainer `tunes`")
        if arch.get("class") not in self.classes:
            raise ConfigError(
                f"trainer `tunes` makes language models and encoder-decoders of transformers, not "
                f"`{arch.get('class')}`. Use one of: {', '.join(self.classes)}."
            )
        if arch["class"] in CAUSAL_LMS:  # an encoder-decoder's comes from a file, with whatever that keeps
            check_typed(arch)

    def _check_network(self, net: nn.Module, dataset: TextDataset) -> None:
        check_tunes(net.config, self.block_length)

    def windows(self, net: nn.Module, dataset: TextDataset, seeds: SeedRange) -> Windows:
        return TuneSteps(cast(PairDataset, dataset).pairs(TextPart.TRAIN), self, seeds, net, self.texts)

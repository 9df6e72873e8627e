"""Masked language models, such as BERT, by transformers' `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import SeedRange
from lcsc.datasets.base import TextDataset, TextPart
from lcsc.models.causal_lm import MASKED_LMS
from lcsc.models.fit import Windows
from lcsc.models.masked import MaskedWindows
from lcsc.training.language import LanguageTrainer


@register("trainer", "masked_lm", source="arXiv:1810.04805 (BERT); transformers' DataCollatorForLanguageModeling")
@dataclass(frozen=True)
class MaskedLM(LanguageTrainer):
    """Trains a BERT or RoBERTa to tell hidden tokens of a text's training part with transformers' `Trainer`.

    Of the tokens of a window a share is chosen: 80 % of them become the mask, 10 % any token, 10 % stay, and the loss
    is of these. Everything else is as in `causal_lm`: same bank, same bits after an interruption.

    Args:
        num_steps: optimizer steps.
        batch_size: windows a step.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        save_every: steps between checkpoints.
        block_length: tokens of a window.
        schedule: of the learning rate, by its name in transformers.
        warmup_steps: steps in which the rate rises from 0, where the schedule has them.
        max_grad_norm: larger gradients are scaled down to it.
        mixed_precision: `no`, or `bf16` for matrix products in bfloat16; weights and optimizer stay float32.
        start: folder of a network whose weights are the first; None draws them. A new bank goes on from there.
        gradient_norms: as in `causal_lm`; refused for networks whose layers cannot be told apart.
        codec: `no`, or how the bank is coded: `lossless`, or `lossy`, where the bank holds nearly what was trained.
        mask_probability: share of the tokens that is chosen.
        mask_token: what hides a token, a number that the text does not have; a text of bytes has no 3.
    """

    mask_probability: float = 0.15
    mask_token: int = 3

    name: ClassVar[str] = "masked_lm"
    classes: ClassVar[tuple[str, ...]] = MASKED_LMS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_probability <= 1:
            raise ConfigError(f"`trainer.mask_probability` is {self.mask_probability}; it must be in (0, 1].")

    def windows(self, net: nn.Module, dataset: TextDataset, seeds: SeedRange) -> Windows:
        """See `LanguageTrainer.windows`.

        Raises:
            ConfigError: `mask_token` is no token, or one that the text has.
        """
        num, stretches_SL = dataset.vocab_size, dataset.tokens(TextPart.TRAIN)
        if not 0 <= self.mask_token < num or bool((stretches_SL == self.mask_token).any()):
            raise ConfigError(
                f"`trainer.mask_token` is {self.mask_token}; it must be a token from 0 to {num - 1} that the text does "
                "not have. A tokenizer's own is in its tokenizer_config.json."
            )
        return MaskedWindows(stretches_SL, self, seeds, num)

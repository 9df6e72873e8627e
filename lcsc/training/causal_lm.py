"""Causal language models by transformers' `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcsc.core.registry import register
from lcsc.models.causal_lm import CAUSAL_LMS
from lcsc.training.language import LanguageTrainer


@register("trainer", "causal_lm", source="transformers' Trainer; arXiv:1711.05101 (AdamW)")
@dataclass(frozen=True)
class CausalLM(LanguageTrainer):
    """Trains a language model on a text's training part with transformers' `Trainer`; raw weights are saved.

    Window i of the training is `block_length` neighbouring tokens drawn by (seed, i) alone, so a run that was
    interrupted, even killed, and started again gives the same bits on the same machine as an unbroken one (on a GPU up
    to rounding). One process and one device.

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
        gradient_norms: whether each checkpoint's folder gets the norms of its layers' gradients
            (`lcsc.recycling.stages.NORMS`), which operator=neighbor_recovery weighs stages by.
        codec: `no`, or how the bank is coded: `lossless`, or `lossy`, where the bank holds nearly what was trained.
    """

    name: ClassVar[str] = "causal_lm"
    classes: ClassVar[tuple[str, ...]] = CAUSAL_LMS

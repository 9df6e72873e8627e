"""The loss of a language model on held-out text after a short continued training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Fit, Windows
from lcsc.models.flat import LiveModel
from lcsc.models.flops import training_flops
from lcsc.objectives.language_modeling import LanguageModeling
from lcsc.objectives.uptraining import Uptraining


@register("objective", "uptrained_loss", source="lcsc; uptraining of arXiv:2305.13245 and arXiv:2212.05055")
@dataclass(frozen=True)
class UptrainedLoss(Uptraining, LanguageModeling):
    """`language_modeling` of what a fixed budget of continued training makes of a candidate.

    Each candidate is trained with transformers' `Trainer` from a new optimizer, on the same windows of the text's
    training part in the same order; the search and report halves are not trained on. With `num_steps` 0 it is
    `language_modeling` to the bit. The weights of a candidate stay what its operator made: an export is where a
    training begins (`trainer.start`), and it is scored by training it again.

    A score costs `3 x num_steps x train_batch_size` network calls beside its own. They are counted where a score
    begins, whether the trained network was still at hand or not, so that a journal does not tell what a worker did
    before. Full scores hold `trained_tokens` and `training_flops` too.

    Args:
        num_steps: optimizer steps of a candidate.
        learning_rate: of AdamW.
        warmup_steps: steps in which the rate rises from 0.
        schedule: of the learning rate, by its name in transformers.
        train_batch_size: blocks a step, of `block_length` tokens.
        weight_decay: of AdamW.
        max_grad_norm: larger gradients are scaled down to it.
        train_seed: of the windows; all candidates of all searches with it see the same.
        keep: trained networks held in memory, so that a candidate which is scored again is not trained again.
    """

    num_steps: int = 50

    name: ClassVar[str] = "uptrained_loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_training()

    @property
    def fit(self) -> Fit:
        """The training of a candidate."""
        return self._fit(self.block_length)

    def circumstances(self) -> dict[str, Any]:
        """What `language_modeling` says, and the training."""
        return self._with_training(super().circumstances())

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        tokens = self.num_steps * self.train_batch_size * self._window
        costs = {"trained_tokens": tokens, "training_flops": self._training_flops(live.net)}
        return {
            **super()._others(live, purpose, rows_N, value, se),
            **{name: {"value": float(cost), "se": 0.0} for name, cost in costs.items()},
        }

    def _training_flops(self, net: nn.Module) -> int:
        return training_flops(net, self.num_steps * self.train_batch_size * self._window, self._window)

    @property
    def _window(self) -> int:
        """Tokens of a window, as a network reads them."""
        return self.block_length

    def _windows(self, net: nn.Module, seeds: SeedRange) -> Windows:
        """What it trains on."""
        return Windows(self.dataset.tokens(TextPart.TRAIN), self.fit, seeds)

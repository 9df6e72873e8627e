"""Windows of a text in which tokens are hidden and to be told."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lcsc.core.seeds import SeedRange
from lcsc.models.fit import Windows

#: Stream of what is hidden in a window; see `lcsc.models.fit` for the others.
HIDDEN = 4


class MaskedWindows(Windows):
    """The windows of a training, hidden by transformers' `DataCollatorForLanguageModeling`.

    Of the tokens that are chosen 80 % become the mask, 10 % any token and 10 % stay (Devlin et al., arXiv:1810.04805);
    labels of all others are -100. What is chosen in window i follows from (seed, i) alone.

    Args:
        stretches_SL: the training text.
        fit: as for `Windows`; its `mask_probability` is the share that is chosen, and `mask_token` the mask.
        seeds: what windows and choices are drawn by.
        vocab_size: number of tokens.
    """

    def __init__(self, stretches_SL: Tensor, fit: Any, seeds: SeedRange, vocab_size: int) -> None:
        super().__init__(stretches_SL, fit, seeds)
        self._tokenizer, self._probability = _Tokenizer(fit.mask_token, vocab_size), fit.mask_probability

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids_1T = super().__getitem__(i)["input_ids"][None].clone()
        collator = self._collator
        collator.generator = torch.Generator().manual_seed(int(self._seeds.generator(i, HIDDEN).integers(2**63)))
        shown_1T, labels_1T = collator.torch_mask_tokens(ids_1T, special_tokens_mask=torch.zeros_like(ids_1T))
        return {"input_ids": shown_1T[0], "labels": labels_1T[0]}

    @cached_property
    def _collator(self) -> Any:
        from transformers import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(self._tokenizer, mlm_probability=self._probability)


class _Tokenizer:
    """As much of a tokenizer as the collator asks for: texts of bytes have none."""

    mask_token = "<mask>"

    def __init__(self, mask: int, vocab_size: int) -> None:
        self._mask, self._vocab_size = mask, vocab_size

    def __len__(self) -> int:
        return self._vocab_size

    def convert_tokens_to_ids(self, _: str) -> int:
        return self._mask

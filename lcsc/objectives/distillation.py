"""How far a language model's predictions lie from those of a teacher on held-out text."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.digests import file_sha256, value_digest
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose
from lcsc.models.flat import LiveModel
from lcsc.models.network import load_network
from lcsc.objectives.language_modeling import LanguageModeling
from lcsc.objectives.mean_loss import grouped_se
from lcsc.objectives.shared import choose_device


@register("objective", "distillation", source="arXiv:1503.02531, temperature 1; Kullback & Leibler 1951")
@dataclass(frozen=True)
class Distillation(LanguageModeling):
    """Mean Kullback-Leibler divergence of the next token's distribution from a teacher's on held-out text, in nats.

    KL(teacher || candidate), the mean over a block's tokens but the first, as in `language_modeling`. It is zero for
    the teacher and its derivative vanishes there, so a small change of the weights costs what it costs in the second
    order: a loss also moves by the first order, up or down by luck, which another text does not repeat. That makes it
    the finer measure of a compressed, pooled or pruned copy of a model.

    Full scores hold `parameters` and the like, as in `language_modeling`, and `agreement`, the share of tokens that
    both put first.

    Args:
        teacher: folder of a model (config.json and safetensors), such as the exact checkpoint.
    """

    teacher: str = ""

    name: ClassVar[str] = "distillation"
    forwards: ClassVar[tuple[int, int]] = (2, 4)  # the teacher's too

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ConfigError(
                "`objective.teacher` is not set; it must be the folder of a model that the candidates are to agree "
                "with, such as a checkpoint's."
            )
        if not (Path(self.teacher) / "config.json").is_file():
            raise ConfigError(
                f"`objective.teacher` is `{self.teacher}`, which holds no config.json; give the folder of a model."
            )

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        for ids_NT in self._batches_of(live, self._rows(seed, purpose, images), purpose):
            teacher_NTV, own_NTV = self._both(live, ids_NT)
            yield (teacher_NTV.exp() * (teacher_NTV - own_NTV)).sum(2).mean(1)

    def circumstances(self) -> dict[str, Any]:
        """Those of the text, and the teacher's files, wherever they lie."""
        found = super().circumstances()
        teacher = {"teacher_digest": self._teacher_digest}
        return found | teacher | {"detector_digest": value_digest([found["detector_digest"], teacher])}

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        same = []
        for ids_NT in self._batches_of(live, rows_N, purpose):
            teacher_NTV, own_NTV = self._both(live, ids_NT)
            same.append((teacher_NTV.argmax(2) == own_NTV.argmax(2)).float().mean(1))
        same_N = torch.cat(same).double().cpu().numpy()
        apart = grouped_se(same_N, self._groups(rows_N))
        agreement = {"value": float(same_N.mean()), **({} if apart is None else {"se": apart})}
        return self._sizes(live) | {"agreement": agreement}

    def _both(self, live: LiveModel, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next tokens, (N, T - 1, V) each: the teacher's, without derivative, and the own."""
        with torch.no_grad():
            teacher_NTV = _predictions(self._teacher, ids_NT)
        return teacher_NTV, _predictions(live.net, ids_NT)

    @functools.cached_property
    def _teacher(self) -> nn.Module:
        net = load_network(Path(self.teacher))
        if type(net).__name__ not in self.classes:
            raise ConfigError(
                f"`objective.teacher` is `{self.teacher}`, which holds `{type(net).__name__}`. Use one of: "
                f"{', '.join(self.classes)}."
            )
        try:
            self._check_tokens(net.config)
        except ConfigError as error:
            raise ConfigError(f"`objective.teacher` is `{self.teacher}`: {error}") from error
        return net.to(choose_device(self.device)).requires_grad_(False)

    @functools.cached_property
    def _teacher_digest(self) -> str:
        files = [Path(self.teacher) / "config.json", *sorted(Path(self.teacher).glob("*.safetensors"))]
        try:
            return value_digest([file_sha256(file) for file in files])
        except OSError as error:
            raise BankError(f"`objective.teacher` `{self.teacher}` cannot be read: {error.strerror}.") from error


def _predictions(net: nn.Module, ids_NT: Tensor) -> Tensor:
    """Log-probabilities of each token but the first given those before it, float32, (N, T - 1, V)."""
    logits_NTV: Tensor = net(input_ids=ids_NT, use_cache=False).logits[:, :-1]
    return logits_NTV.float().log_softmax(2)

"""How well a classifier does on held-out images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose
from lcsc.datasets.base import Dataset, need_images
from lcsc.datasets.content import data_digest
from lcsc.datasets.split import split_three
from lcsc.models.flat import LiveModel
from lcsc.models.many_classifiers import METRICS
from lcsc.objectives.mean_loss import MeanLoss, grouped_se
from lcsc.objectives.shared import KeptLive


@register("objective", "classification", source="cross-entropy in nats, and the share of wrong answers")
@dataclass(frozen=True)
class Classification(MeanLoss):
    """Mean cross-entropy, or the share of images that are classified wrongly, on images that no run was trained on.

    Of the images half are for training (`lcsc.datasets.split.split_three`), a quarter is searched on and a quarter
    reported. Image i of (seed, purpose) is one of the quarter; every one comes up once before any comes up again. Full
    scores hold the other one of the two numbers too.

    Args:
        dataset: images with labels.
        score: `loss` or `error`.
        batch_size: images per network call.
        split_seed: of the cut of the images.
        device: torch device; `auto` takes the GPU where there is one.
    """

    dataset: Dataset = field(metadata={"internal": True})
    score: str = "loss"
    batch_size: int = 500
    split_seed: int = 0
    device: str = "auto"

    forwards: ClassVar[tuple[int, int]] = (1, 3)

    def __post_init__(self) -> None:
        need_images(self.dataset, "objective `classification`")
        if self.score not in METRICS:
            raise ConfigError(f"`objective.score` is `{self.score}`.{did_you_mean(self.score, METRICS)}")
        if self.batch_size < 1:
            raise ConfigError(f"`objective.batch_size` is {self.batch_size}; it must be at least 1.")
        if self.dataset.labels() is None:
            raise ConfigError(f"data set `{self.dataset.name}` has no labels, which `classification` compares with.")
        self.__dict__["_kept"] = KeptLive()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the number."""
        return f"classification_{self.score}"

    @property
    def no_gradient(self) -> str | None:
        """See `Differentiable.no_gradient`."""
        return "the share of wrong answers has no derivative" if self.score == "error" else None

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        yield from self._values(live, self._rows(seed, purpose, images), self.score)

    def half(self, purpose: Purpose) -> np.ndarray:
        """See `MeanLoss.half`; here it is a quarter."""
        return self._parts[1 + (purpose is Purpose.REPORT)]

    def circumstances(self) -> dict[str, Any]:
        """Number and images; `detector` is what turns an image into a number here."""
        return {
            "metric": self.name,
            "detector": self.name,
            "detector_digest": value_digest({"name": self.name}),
            "nfe": self.forwards[0],
            "dataset": repr(self.dataset),
            "data_digest": self._data_digest,
            "split_seed": self.split_seed,
        }

    def _values(self, live: LiveModel, rows_N: np.ndarray, score: str) -> Iterator[Tensor]:
        images_NCHW, labels_N = self.dataset.images(), self.dataset.labels()
        assert labels_N is not None, "checked on making"
        device = live.theta_P.device
        for start in range(0, len(rows_N), self.batch_size):
            rows = torch.from_numpy(rows_N[start : start + self.batch_size])
            logits_NC, wanted_N = live.net(images_NCHW[rows].to(device)).logits, labels_N[rows].to(device)
            if score == "error":
                yield (logits_NC.argmax(1) != wanted_N).float()
            else:
                yield nn.functional.cross_entropy(logits_NC, wanted_N, reduction="none")

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        """The other one of the two numbers."""
        other = next(name for name in METRICS if name != self.score)
        values_N = torch.cat(list(self._values(live, rows_N, other))).double().cpu().numpy()
        error = grouped_se(values_N, self._groups(rows_N))
        return {
            f"classification_{other}": {"value": float(values_N.mean()), **({} if error is None else {"se": error})}
        }

    @functools.cached_property
    def _data_digest(self) -> str:
        return data_digest(self.dataset)

    @functools.cached_property
    def _parts(self) -> tuple[np.ndarray, ...]:
        labels_N = self.dataset.labels()
        return split_three(len(self.dataset.images()), self.split_seed, None if labels_N is None else labels_N.numpy())

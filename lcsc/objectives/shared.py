"""What objectives that run networks share: the device, the live network, the halves of the real images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lcsc.bank.layout import Layout
from lcsc.core.errors import EvaluationError
from lcsc.datasets.base import Dataset
from lcsc.datasets.split import split_halves
from lcsc.models.flat import LiveModel
from lcsc.operators.base import Candidate


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def halves_of(dataset: Dataset, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the search half and of the report half of a data set, int64; see `split_halves`."""
    labels_N = dataset.labels()
    labels = None if labels_N is None else labels_N.numpy()
    return split_halves(len(dataset.images()), split_seed, labels)


def check_weights(tensors: Iterable[Tensor]) -> None:
    """Raise EvaluationError for weights that are not finite: a candidate that diverged."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise EvaluationError("the combined weights hold NaN or Inf; the coefficients are too large for float32.")


class KeptLive:
    """The live network of the last candidate, kept while candidates share its layout and nobody moved or cast it."""

    def __init__(self) -> None:
        self._kept: tuple[Layout, LiveModel] | None = None

    def filled(self, candidate: Candidate, device: torch.device) -> LiveModel:
        """The network with the candidate's weights.

        Args:
            candidate: has an architecture.
            device: where the network runs; the same in every call.

        Raises:
            EvaluationError: the weights are not finite.
        """
        if self._kept is None or self._kept[0] is not candidate.layout or not self._kept[1].intact:
            self._kept = (candidate.layout, LiveModel(candidate.arch, candidate.layout, candidate.constants, device))
        live = self._kept[1]
        live.fill(candidate.write)
        check_weights([live.theta_P])
        return live

    def forget(self) -> None:
        """Leave the network to whoever got it last."""
        self._kept = None

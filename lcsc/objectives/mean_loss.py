"""What losses that are a mean over held-out items share: scores, races, derivatives and the order of the items."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import EvaluationError
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.metrics.paired import paired_draws
from lcsc.models.flat import LiveModel
from lcsc.objectives.base import Blocks, Score, Slope, spending
from lcsc.objectives.shared import choose_device
from lcsc.operators.base import Candidate

#: Stream of a purpose: the order of the items.
ORDER = 2


class MeanLoss:
    """A mean of losses of single held-out items, such as images; a subclass says what they are.

    Item i of (seed, purpose) is one of the search or the report half; every one of the half comes up once before any
    comes up again. A subclass is a frozen dataclass with the fields below and puts a `KeptLive` into `_kept`.
    """

    #: fields of the subclass: torch device
    device: str
    #: name of the number
    name: ClassVar[str]
    #: network evaluations of one item in a score, and in a slope (a backward pass counts two)
    forwards: ClassVar[tuple[int, int]]
    #: fewest items with a spread
    min_images: ClassVar[int] = 2

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """Losses of the items, batch by batch, shape (N,) each, differentiable by the network's weights."""
        raise NotImplementedError

    def half(self, purpose: Purpose) -> np.ndarray:
        """Rows of the half that a purpose draws from, int64."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`; the standard error is that of a mean over groups, by their spread."""
        live = self._live(candidate)
        rows_N = self._rows(seed, purpose, images)
        losses_N = torch.cat(list(self.batches(live, seed, purpose, images))).double().cpu().numpy()
        with spending(self.forwards[0] * len(images)):
            value = _checked(float(losses_N.mean()))
        if not full:
            return Score(value, len(images), self.forwards[0])
        se = grouped_se(losses_N, self._groups(rows_N))
        return Score(value, len(images), self.forwards[0], se, self._others(live, purpose, rows_N, value, se))

    def block_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int
    ) -> Blocks:
        """See `Raceable.block_states`; a state is the number of items and the sum of their losses, float64 (2,)."""
        return self._states(self._live(candidate), seed, purpose, images, num_blocks)

    @torch.no_grad()
    def _states(self, live: LiveModel, seed: int, purpose: Purpose, images: range, num_blocks: int) -> Blocks:
        losses_N = torch.cat(list(self.batches(live, seed, purpose, images))).double().cpu().numpy()
        blocks = np.array_split(losses_N, min(num_blocks, len(losses_N)))
        states = tuple(np.array([len(block), block.sum()]) for block in blocks)
        return Blocks(states, len(images) * self.forwards[0])

    @staticmethod
    def merge_states(states: Sequence[Any]) -> Any:
        """See `Raceable.merge_states`."""
        return np.sum(states, axis=0)

    def value_of(self, states: Sequence[Any], purpose: Purpose) -> float:
        """See `Raceable.value_of`."""
        count, total = self.merge_states(states)
        return _checked(float(total / count))

    def resampled(self, states: Sequence[Any], purpose: Purpose) -> np.ndarray:
        """See `Raceable.resampled`."""
        counts_R, totals_R = np.stack(states)[paired_draws(len(states))].sum(1).T
        return totals_R / counts_R  # type: ignore[no-any-return]

    def slope(self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range) -> Slope:
        """Backward through one batch after the other, so memory is that of one batch.

        Raises:
            EvaluationError: the candidate diverged.
        """
        live, total = self._live(candidate), 0.0
        with live.collecting() as grad_P:
            for losses_N in self.batches(live, seed, purpose, images):
                total += float(losses_N.detach().double().sum())
                (losses_N.sum() / len(images)).backward()  # type: ignore[no-untyped-call]
        with spending(self.forwards[1] * len(images)):
            value = _checked(total / len(images))
            if not torch.isfinite(grad_P).all():
                raise EvaluationError("the derivative of the loss is not finite; the candidate diverged.")
        return Slope(value, grad_P, self.forwards[1] * len(images))

    @property
    def no_gradient(self) -> str | None:
        """See `Differentiable.no_gradient`."""
        return None

    def floor(self) -> None:
        """None: the least loss of a finite set of items is not known."""
        return

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        """Further numbers of a full score; see `Score.others`."""
        return {}

    def _groups(self, rows_N: np.ndarray) -> np.ndarray:
        """Items of one group are no independent draws; each row is a group of its own."""
        return rows_N

    def _rows(self, seed: int, purpose: Purpose, images: range) -> np.ndarray:
        """Which item each of them is, int64 (N,): pass after pass over the half, each in an order of its own."""
        half_H = self.half(purpose)
        seeds, places_N = SeedRange(seed, purpose), np.asarray(images)
        rows_N = np.empty(len(places_N), dtype=np.int64)
        for turn in np.unique(places_N // len(half_H)):
            mine = places_N // len(half_H) == turn
            order = seeds.generator(int(turn), ORDER).permutation(len(half_H))
            rows_N[mine] = half_H[order[places_N[mine] % len(half_H)]]
        return rows_N

    def _live(self, candidate: Candidate) -> LiveModel:
        live: LiveModel = self.__dict__["_kept"].filled(candidate, choose_device(self.device))
        return live


def grouped_se(losses_N: np.ndarray, groups_N: np.ndarray) -> float | None:
    """Standard error of the mean when losses of one group (noisy versions of one real image) go together.

    sqrt(G / (G - 1) sum_g (sum over g of (loss - mean))^2) / N, the linearised error of a mean over G groups; with one
    loss a group it is the usual s / sqrt(N). None for a single group.
    """
    _, inverse_N = np.unique(groups_N, return_inverse=True)
    sums_G = np.bincount(inverse_N, losses_N - losses_N.mean())
    if len(sums_G) < 2:
        return None
    return float(np.sqrt(len(sums_G) / (len(sums_G) - 1) * (sums_G**2).sum()) / len(losses_N))


def _checked(value: float) -> float:
    if not math.isfinite(value):
        raise EvaluationError(f"the loss is {value}; the candidate diverged.")
    return value

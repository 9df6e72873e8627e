"""Standard error of any metric by resampling blocks of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcsc.core.errors import EvaluationError
from lcsc.metrics.base import Metric, Reference, State


def bootstrap(
    metric: Metric[State, Reference],
    states: Sequence[State],
    reference: Reference,
    *,
    rng: np.random.Generator,
    num_resamples: int = 100,
) -> tuple[float, list[float]]:
    """Standard error of `metric.compute(merge of states)` by the bootstrap (Efron, 1979) over blocks, and the scores
    of the resamples, R of them. Equal generators draw equally many blocks alike, so that candidates' scores pair up.

    Each resample draws B of the B blocks with replacement and merges them; the standard error is the
    standard deviation (ddof=1) of the scores. It covers the noise of the sampled images, with the reference
    held fixed. For B blocks of equal size it is low by the factor sqrt((B - 1) / B), so use ten or more.

    A metric may offer `compute_resampled(states, reference, counts_RB)`, which gives all scores at once.

    Args:
        metric: the metric whose score is in question.
        states: one state per block of images, B of them.
        reference: the factored reference, as for `metric.compute`.
        rng: source of the draws; the same generator state gives the same answer.
        num_resamples: number of resamples R; the relative error of the answer is about 1 / sqrt(2 R).

    Raises:
        EvaluationError: fewer than 2 blocks or 2 resamples, or a resample that cannot be scored.
    """
    if len(states) < 2 or num_resamples < 2:
        raise EvaluationError(
            f"a bootstrap needs at least 2 blocks of images and 2 resamples, got {len(states)} and {num_resamples}. "
            "Cut the images into more blocks (10 or more) or raise the number of resamples."
        )
    draws_RB = rng.integers(len(states), size=(num_resamples, len(states)))
    scores = resampled_scores(metric, states, reference, draws_RB)
    return float(np.std(scores, ddof=1)), scores


def resampled_scores(
    metric: Metric[State, Reference], states: Sequence[State], reference: Reference, draws_RB: np.ndarray
) -> list[float]:
    """The score of each resample, where resample r is made of the blocks `draws_RB[r]`; R floats."""
    compute_resampled = getattr(metric, "compute_resampled", None)
    if compute_resampled is None:
        return [_score(metric, states, reference, draws) for draws in draws_RB]
    counts_RB = np.stack([np.bincount(draws, minlength=len(states)) for draws in draws_RB])
    values: list[float] = compute_resampled(states, reference, counts_RB)
    return values


def _score(
    metric: Metric[State, Reference], states: Sequence[State], reference: Reference, draws_B: np.ndarray
) -> float:
    """Score of the merged blocks `draws_B`."""
    merged = metric.zeros()
    for index in draws_B:
        merged = metric.merge(merged, states[int(index)])
    return metric.compute(merged, reference)

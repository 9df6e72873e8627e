"""Bootstrap resamples that are drawn alike for all candidates, so that their scores can be compared pair by pair."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from lcsc.core.seeds import Purpose, SeedRange
from lcsc.metrics.base import Metric, Reference, State
from lcsc.metrics.bootstrap import resampled_scores
from lcsc.metrics.frechet import FrechetDistance, FrechetReference, FrechetState

#: Resamples of a comparison: a share of 0.05 is then known to 0.011.
NUM_RESAMPLES = 400


def paired_scores(metric: Metric[State, Reference], states: Sequence[State], reference: Reference) -> np.ndarray:
    """Scores of resamples of the blocks, shape (R,), float64; equally many blocks are always drawn alike.

    The Fréchet distance is taken to first order in the covariance: one eigendecomposition in all instead of one a
    resample, and closer to the truth, because exact scores of resamples carry a bias and a scatter of their own (a
    resample holds two thirds of the images). Other metrics are scored exactly.
    """
    draws_RB = paired_draws(len(states))
    if isinstance(metric, FrechetDistance):
        counts_RB = np.stack([np.bincount(draws, minlength=len(states)) for draws in draws_RB])
        return frechet_to_first_order(metric, states, reference, counts_RB)  # type: ignore[arg-type]
    return np.array(resampled_scores(metric, states, reference, draws_RB))


def paired_draws(num_blocks: int) -> np.ndarray:
    """Which blocks make up each resample, int64, shape (R, B); the same for all candidates."""
    rng = SeedRange(0, Purpose.BOOTSTRAP).generator(index=1)
    return rng.integers(num_blocks, size=(NUM_RESAMPLES, num_blocks))


def frechet_to_first_order(
    metric: FrechetDistance, states: Sequence[FrechetState], reference: FrechetReference, counts_RB: np.ndarray
) -> np.ndarray:
    """d(m, S) + |m_r - m1|^2 - |m - m1|^2 + <G, S_r - S> for each resample r; shape (R,), float64.

    m and S are mean and covariance of all images, m_r and S_r exactly those of the resample in which block b occurs
    `counts_RB[r, b]` times, and G is the derivative of the distance by the covariance.

    Raises:
        EvaluationError: as `FrechetDistance.compute`.
    """
    whole = functools.reduce(metric.merge, states)
    mean_D, cov_DD = whole.mean_D, whole.cov_DD
    slope, eye_DD = metric.gradient(whole, reference), torch.eye(len(mean_D), dtype=torch.float64, device=mean_D.device)
    # the derivative by the features is affine in them, with matrix 2 G / (n - 1)
    by_cov_DD = (slope(eye_DD) - slope(torch.zeros_like(eye_DD))) * (whole.count - 1) / 2
    counts = torch.as_tensor(counts_RB, dtype=torch.float64, device=mean_D.device)
    count_R = counts @ torch.stack([state.count.to(mean_D) for state in states])
    mean_RD = counts @ torch.stack([state.sum_D for state in states]) / count_R[:, None]
    outer_R = counts @ torch.stack([(state.outer_DD * by_cov_DD).sum() for state in states])
    cov_R = (outer_R - count_R * ((mean_RD @ by_cov_DD) * mean_RD).sum(1)) / (count_R - 1)
    gap_R = (mean_RD - reference.mean_D).square().sum(1) - (mean_D - reference.mean_D).square().sum()
    values_R = metric.compute(whole, reference) + gap_R + cov_R - (cov_DD * by_cov_DD).sum()
    return values_R.cpu().numpy()


def chance_better(ours_R: np.ndarray, theirs_R: np.ndarray) -> float:
    """Share of resamples in which our score is the lower one; equal scores count half."""
    return float(np.mean(ours_R < theirs_R) + np.mean(ours_R == theirs_R) / 2)

"""Fréchet distance between Gaussians fitted to features (FID when the features are Inception's)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lcsc.core.errors import EvaluationError
from lcsc.core.registry import register
from lcsc.metrics.base import (
    FeatureMetric,
    checked_features,
    require_finite_score,
    require_same_width,
    require_samples,
    state_width,
)

#: Eigenvalues below this share of the largest are left out of the derivative, which is unbounded at zero.
SMALLEST = 1e-10

SOURCE = "arXiv:1706.08500, Eq. 6; conventions of torchmetrics FrechetInceptionDistance"


@dataclass(frozen=True, eq=False)
class FrechetState:
    """Float64 sums over images: their number, the features and the features' outer products.

    The sums are not shifted by a mean. A shift would tie a state to one reference, and states must add up
    whoever made them; in float64 the cancellation in the covariance costs eps * (mean/std)^2, that is
    1e-12 relative for features whose mean is a hundred times their spread.
    `sum_D` and `outer_DD` are scalar zeros until the first image tells D.
    """

    count: Tensor
    sum_D: Tensor
    outer_DD: Tensor

    @property
    def mean_D(self) -> Tensor:
        """Mean, shape (D,)."""
        return self.sum_D / self.count

    @property
    def cov_DD(self) -> Tensor:
        """Unbiased covariance (ddof=1), shape (D, D), exactly symmetric."""
        cov = (self.outer_DD - torch.outer(self.sum_D, self.mean_D)) / (self.count - 1)
        return (cov + cov.T) / 2


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """The reference side of the distance, factored: mean, a root and the trace of the covariance.

    `root_DD` = F = V sqrt(l) with the eigenvalues l of the covariance ascending, so that S1 = F F^T. The
    symmetric root is R = F V^T.
    """

    mean_D: Tensor
    root_DD: Tensor
    trace: Tensor


@register("metric", "fid", source=SOURCE, detector="inception")
@register("metric", "fid_classifier", source=SOURCE, detector="classifier")
@register("metric", "fid_digits", source=SOURCE, detector="digits")
@register("metric", "fid_pixels", source=SOURCE, detector="pixels")
@dataclass(frozen=True)
class FrechetDistance(FeatureMetric):
    """Fréchet distance between two Gaussians fitted to a detector's features; lower is better."""

    family: ClassVar[str] = "fid"

    def rank_deficient(self, num_images: int, num_features: int | None = None) -> bool:
        """Whether `num_images` give a singular covariance: num_images <= D.

        The distance is defined all the same (torchmetrics computes it too) but its bias is large, so it
        only compares with values from equally many images. `num_features` defaults to the detector's; where
        that is unknown beforehand (0, `pixels`) and not given, the answer is False.
        """
        width = self.load_detector().num_features if num_features is None else num_features
        return width > 0 and num_images <= width

    def zeros(self) -> FrechetState:
        """The state of no images."""
        zero = torch.zeros((), dtype=torch.float64)
        return FrechetState(zero, zero, zero)

    def update(self, state: FrechetState, features_ND: Tensor) -> FrechetState:
        """The state with N more images; features of any float dtype are summed in float64.

        Raises:
            EvaluationError: features that are not (N, D) with the D seen before, or NaN or Inf among them.
        """
        features = checked_features(features_ND, state_width(state.sum_D))
        return FrechetState(
            state.count + features.shape[0],
            state.sum_D + features.sum(0),
            state.outer_DD + features.T @ features,
        )

    def merge(self, a: FrechetState, b: FrechetState) -> FrechetState:
        """The state of both sets together: the sums add."""
        require_same_width(state_width(a.sum_D), state_width(b.sum_D))
        return FrechetState(a.count + b.count, a.sum_D + b.sum_D, a.outer_DD + b.outer_DD)

    def mixed(self, states: Sequence[FrechetState], weights: Sequence[float]) -> FrechetState:
        """The state in which each image of `states[i]` counts `weights[i]` > 0, relative to the others.

        Its count is Kish's effective number (sum w)^2 / sum w^2, with which `cov_DD` is the unbiased weighted
        covariance sum w (f - m)(f - m)^T / (1 - sum w^2), for weights that sum to one and are chosen before the images.
        """
        counts = [float(state.count) for state in states]
        factor = sum(map(operator.mul, weights, counts)) / sum(w * w * n for w, n in zip(weights, counts, strict=True))
        parts = [
            FrechetState(s.count * (w * factor), s.sum_D * (w * factor), s.outer_DD * (w * factor))
            for s, w in zip(states, weights, strict=True)
        ]
        return functools.reduce(self.merge, parts)

    def reference(self, state: FrechetState) -> FrechetReference:
        """Mean and square root of the covariance, by eigh in float64; negative eigenvalues (rounding) count as 0.

        Raises:
            EvaluationError: fewer than 2 images.
        """
        require_samples(self.name, int(state.count), self.min_samples)
        cov_DD = state.cov_DD
        values_D, vectors_DD = torch.linalg.eigh(cov_DD)
        root_DD = vectors_DD * values_D.clamp(min=0).sqrt()
        return FrechetReference(state.mean_D, root_DD, cov_DD.trace())

    def compute(self, state: FrechetState, reference: FrechetReference) -> float:
        """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) (arXiv:1706.08500, Eq. 6), at least 0.

        tr (S1 S2)^(1/2) = tr (R S2 R)^(1/2) = tr (F^T S2 F)^(1/2) with S1 = R^2 = F F^T. Both inner matrices are
        symmetric, so their eigenvalues are real and safe, where those of S1 S2 in float32 were seen to be
        percents off. F^T S2 F is taken because it is graded: small entries stay beside small ones, and its small
        eigenvalues, whose square roots count, keep their digits even when the covariances are singular.

        Raises:
            EvaluationError: fewer than 2 images, another D than the reference, or a result that overflows.
        """
        require_samples(self.name, int(state.count), self.min_samples)
        require_same_width(state_width(state.sum_D), state_width(reference.mean_D))
        cov_DD = state.cov_DD
        inner_DD = reference.root_DD.T @ cov_DD @ reference.root_DD
        if not torch.isfinite(inner_DD).all():  # eigvalsh would raise something less clear
            raise EvaluationError(
                f"`{self.name}` overflows float64: the features are too large. Treat the candidate as failed."
            )
        # "U" suits the ascending grading: on singular covariances "L" was 30 to 1e6 times less exact.
        values_D = torch.linalg.eigvalsh((inner_DD + inner_DD.T) / 2, UPLO="U")
        cross = values_D.clamp(min=0).sqrt().sum()
        gap = (state.mean_D - reference.mean_D).square().sum()
        value = require_finite_score(self.name, float(gap + reference.trace + cov_DD.trace() - 2 * cross))
        return max(value, 0.0)  # rounding alone takes equal sets below zero

    def gradient(self, state: FrechetState, reference: FrechetReference) -> Callable[[Tensor], Tensor]:
        """The exact derivative by the features.

        With M = F^T S2 F, d tr M^(1/2) = tr(M^(-1/2) dM) / 2, so the derivative by the covariance is
        G = I - F M^(-1/2) F^T, that by the mean 2 (m2 - m1), and for image i of n

            d/df_i = 2 (m2 - m1) / n + 2 G (f_i - m2) / (n - 1).

        Where M is singular (fewer images than features) the root has no derivative along its null space; these
        directions are left out.

        Raises:
            EvaluationError: as `compute`.
        """
        require_samples(self.name, int(state.count), self.min_samples)
        require_same_width(state_width(state.sum_D), state_width(reference.mean_D))
        cov_DD, mean_D, count = state.cov_DD, state.mean_D, state.count
        inner_DD = reference.root_DD.T @ cov_DD @ reference.root_DD
        if not torch.isfinite(inner_DD).all():
            raise EvaluationError(f"`{self.name}` overflows float64: the features are too large.")
        values_D, vectors_DD = torch.linalg.eigh((inner_DD + inner_DD.T) / 2, UPLO="U")
        kept_D = values_D > SMALLEST * values_D[-1].clamp(min=0)
        scaled_DD = reference.root_DD @ (vectors_DD * torch.where(kept_D, values_D.clamp(min=1e-300), 1.0) ** -0.25)
        scaled_DD = scaled_DD * kept_D
        by_cov_DD = torch.eye(len(mean_D), dtype=torch.float64, device=mean_D.device) - scaled_DD @ scaled_DD.T
        by_mean_D = 2 * (mean_D - reference.mean_D)

        def at(features_ND: Tensor) -> Tensor:
            return by_mean_D / count + (features_ND.to(torch.float64) - mean_D) @ by_cov_DD * (2 / (count - 1))

        return at

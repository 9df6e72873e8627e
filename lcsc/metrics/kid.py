"""Kernel distance between feature sets (KID when the features are Inception's)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcsc.core.registry import register
from lcsc.metrics.base import (
    FeatureMetric,
    as_plain_counts,
    checked_features,
    require_finite_score,
    require_same_width,
    require_samples,
)
from lcsc.metrics.features import FeatureState

SOURCE = "arXiv:1801.01401, Sec. 4; the whole U-statistic instead of random subsets"

#: Rows of the kernel matrix held at a time: bounds the memory at 1024 x N x 8 bytes.
CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class KernelReference:
    """The reference features, shape (N, D), and the mean of k over their ordered pairs of different images."""

    features_ND: Tensor
    mean_kernel: Tensor


@register("metric", "kid", source=SOURCE, detector="inception")
@register("metric", "kid_classifier", source=SOURCE, detector="classifier")
@register("metric", "kid_digits", source=SOURCE, detector="digits")
@register("metric", "kid_pixels", source=SOURCE, detector="pixels")
@dataclass(frozen=True)
class KernelDistance(FeatureMetric):
    """Unbiased squared MMD with the kernel (x.y/D + 1)^3 on a detector's features; lower is better.

    Every pair of images counts once (the full U-statistic), so the score is a function of its images: no
    subsets are drawn. Being unbiased it may be slightly negative, and it is left so. With as many images as
    reference images it equals torchmetrics' KernelInceptionDistance(subsets=1, subset_size=N).
    """

    family: ClassVar[str] = "kid"

    def zeros(self) -> FeatureState:
        """The state of no images."""
        return FeatureState(())

    def update(self, state: FeatureState, features_ND: Tensor) -> FeatureState:
        """The state with N more images.

        Raises:
            EvaluationError: features that are not (N, D) with the D seen before, or NaN or Inf among them.
        """
        return FeatureState((*state.chunks, checked_features(features_ND, state.width)))

    def merge(self, a: FeatureState, b: FeatureState) -> FeatureState:
        """The state of both sets together: the lists join."""
        require_same_width(a.width, b.width)
        return FeatureState(a.chunks + b.chunks)

    def reference(self, state: FeatureState) -> KernelReference:
        """Reference features and the part of the score that depends on them alone.

        Raises:
            EvaluationError: fewer than 2 images.
        """
        require_samples(self.name, state.count, self.min_samples)
        features_ND = state.features()
        return KernelReference(features_ND, _mean_of_pairs(features_ND))

    def compute(self, state: FeatureState, reference: KernelReference) -> float:
        """MMD_u^2 of arXiv:1801.01401, Eq. 4: mean k(x,x') + mean k(y,y') - 2 mean k(x,y), x != x', y != y'.

        Raises:
            EvaluationError: fewer than 2 images, another D than the reference, or a result that overflows.
        """
        require_samples(self.name, state.count, self.min_samples)
        require_same_width(state.width, reference.features_ND.shape[1])
        x_ND = state.features()
        num_cross = x_ND.shape[0] * reference.features_ND.shape[0]
        cross = _kernel_sum(x_ND, reference.features_ND) / num_cross
        return require_finite_score(self.name, float(_mean_of_pairs(x_ND) + reference.mean_kernel - 2 * cross))

    def compute_resampled(
        self, states: Sequence[FeatureState], reference: KernelReference, counts_RB: Any
    ) -> list[float]:
        """`compute` of each resample, where resample r holds block b `counts_RB[r, b]` times.

        Kernel sums between blocks are taken once, so R resamples cost about as much as one score.
        """
        counts = as_plain_counts(counts_RB, len(states))
        blocks = [state.features() for state in states]
        sums_BB = torch.stack([torch.stack([_kernel_sum(a, b) for b in blocks]) for a in blocks])
        self_B = torch.stack([_diagonal_sum(block) for block in blocks])
        cross_B = torch.stack([_kernel_sum(block, reference.features_ND) for block in blocks])
        size_B = torch.tensor([float(len(block)) for block in blocks], dtype=torch.float64, device=sums_BB.device)
        counts = counts.to(sums_BB.device)
        num_R = counts @ size_B
        # A copy of an image is another image to the U-statistic: only each image's own diagonal term is left out.
        pairs_R = ((counts @ sums_BB * counts).sum(1) - counts @ self_B) / (num_R * (num_R - 1))
        cross_R = counts @ cross_B / (num_R * len(reference.features_ND))
        return (pairs_R + reference.mean_kernel - 2 * cross_R).tolist()

    def gradient(self, state: FeatureState, reference: KernelReference) -> Callable[[Tensor], Tensor]:
        """The exact derivative by the features.

        With k'(x, y) = 3 (x.y/D + 1)^2 y / D, it is 2 sum_j k'(x_i, x_j) / (n (n - 1)) over the other images, less
        2 sum_m k'(x_i, y_m) / (n m) over the reference.

        Raises:
            EvaluationError: as `compute`.
        """
        require_samples(self.name, state.count, self.min_samples)
        require_same_width(state.width, reference.features_ND.shape[1])
        all_ND, n, m = state.features(), state.count, len(reference.features_ND)

        def at(features_ND: Tensor) -> Tensor:
            x_ND = features_ND.to(torch.float64)
            own_N1 = _slopes(x_ND.square().sum(1, keepdim=True), x_ND.shape[1])
            among = (_slope_sum(x_ND, all_ND) - own_N1 * x_ND) * (2 / (n * (n - 1)))
            return among - _slope_sum(x_ND, reference.features_ND) * (2 / (n * m))

        return at


def _kernel_sum(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Sum of (x.y/D + 1)^3 over all pairs, float64 scalar."""
    total = x_ND.new_zeros(())
    for chunk in x_ND.split(CHUNK_ROWS):
        inner = (chunk @ y_MD.T).div_(x_ND.shape[1]).add_(1)
        total = total + (inner * inner * inner).sum()
    return total


def _slopes(inner: Tensor, num_features: int) -> Tensor:
    """3 (x.y/D + 1)^2 / D of inner products x.y: what multiplies y in the kernel's derivative by x."""
    return (inner / num_features + 1).square() * (3 / num_features)


def _slope_sum(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Sum over y of the kernel's derivative by each x, shape (N, D)."""
    return torch.cat([_slopes(chunk @ y_MD.T, x_ND.shape[1]) @ y_MD for chunk in x_ND.split(CHUNK_ROWS)])


def _diagonal_sum(x_ND: Tensor) -> Tensor:
    """Sum of k(x, x), float64 scalar."""
    return (x_ND.square().sum(1) / x_ND.shape[1] + 1).pow(3).sum()


def _mean_of_pairs(x_ND: Tensor) -> Tensor:
    """Mean of k over ordered pairs of different rows, float64 scalar."""
    num = x_ND.shape[0]
    return (_kernel_sum(x_ND, x_ND) - _diagonal_sum(x_ND)) / (num * (num - 1))

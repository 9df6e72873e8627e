"""The bootstrap standard error against analytic ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lcsc.core.errors import EvaluationError
from lcsc.metrics.bootstrap import bootstrap
from lcsc.metrics.frechet import FrechetDistance
from lcsc.metrics.kid import KernelDistance


@dataclass(frozen=True)
class MeanMetric:
    """The mean of the values; a state is (count, sum)."""

    name: str = "mean"
    detector: str = "none"
    higher_is_better: bool = False
    min_samples: int = 1

    def load_detector(self) -> None:
        return None

    def zeros(self) -> tuple[int, float]:
        return (0, 0.0)

    def update(self, state: tuple[int, float], values: np.ndarray) -> tuple[int, float]:
        return (state[0] + len(values), state[1] + float(values.sum()))

    def merge(self, a: tuple[int, float], b: tuple[int, float]) -> tuple[int, float]:
        return (a[0] + b[0], a[1] + b[1])

    def reference(self, state: tuple[int, float]) -> float:
        return state[1] / state[0]

    def compute(self, state: tuple[int, float], reference: float) -> float:
        return state[1] / state[0] - reference


def blocks_of_mean(values: np.ndarray, num_blocks: int) -> list[tuple[int, float]]:
    metric = MeanMetric()
    return [metric.update(metric.zeros(), block) for block in np.split(values, num_blocks)]


@pytest.mark.parametrize("num_blocks", [50, 200])
def test_standard_error_of_a_mean(num_blocks: int) -> None:
    """Blocks of independent values: the standard error of the mean is std / sqrt(n)."""
    values = np.random.default_rng(3).normal(5.0, 2.0, 4000)
    blocks = blocks_of_mean(values, num_blocks)
    got = bootstrap(MeanMetric(), blocks, 0.0, rng=np.random.default_rng(4), num_resamples=2000)[0]
    plug_in = np.std([total / count for count, total in blocks]) / np.sqrt(num_blocks)
    assert got == pytest.approx(plug_in, rel=0.05)  # what the bootstrap converges to
    assert got == pytest.approx(2.0 / np.sqrt(4000), rel=0.10)


def test_scatter_inside_blocks_is_not_counted() -> None:
    """Blocks are resampled, not images: equal blocks have no error."""
    blocks = blocks_of_mean(np.tile([1.0, 9.0], 40), 20)
    assert bootstrap(MeanMetric(), blocks, 0.0, rng=np.random.default_rng(0))[0] == 0.0


def test_same_generator_same_answer() -> None:
    blocks = blocks_of_mean(np.random.default_rng(5).normal(size=60), 20)
    first, second = (bootstrap(MeanMetric(), blocks, 0.0, rng=np.random.default_rng(6))[0] for _ in range(2))
    other = bootstrap(MeanMetric(), blocks, 0.0, rng=np.random.default_rng(7))[0]
    assert first == second != other


@pytest.mark.parametrize("metric", [FrechetDistance(detector="pixels"), KernelDistance(detector="pixels")])
def test_meets_the_scatter_of_fresh_samples(metric: FrechetDistance | KernelDistance) -> None:
    """The standard error must be the spread of the score over independent sample sets (within 35 %)."""
    import torch

    rng = np.random.default_rng(8)

    def draw(num: int, shift: float) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((num, 3)) + shift)

    reference = metric.reference(metric.update(metric.zeros(), draw(2000, 0.0)))
    scores = [metric.compute(metric.update(metric.zeros(), draw(400, 1.0)), reference) for _ in range(200)]
    blocks = [metric.update(metric.zeros(), chunk) for chunk in draw(400, 1.0).split(10)]
    got = bootstrap(metric, blocks, reference, rng=np.random.default_rng(9), num_resamples=300)[0]
    assert got == pytest.approx(np.std(scores, ddof=1), rel=0.35)


def test_too_few_blocks() -> None:
    blocks = blocks_of_mean(np.arange(6.0), 2)
    with pytest.raises(EvaluationError, match=r"at least 2 blocks .* got 1 and 100"):
        bootstrap(MeanMetric(), blocks[:1], 0.0, rng=np.random.default_rng(0))
    with pytest.raises(EvaluationError, match="got 2 and 1"):
        bootstrap(MeanMetric(), blocks, 0.0, rng=np.random.default_rng(0), num_resamples=1)

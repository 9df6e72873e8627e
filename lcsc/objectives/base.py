"""What an objective is: candidate -> score. Lower is better, always."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from lcsc.core.seeds import Purpose
from lcsc.operators.base import Candidate


@dataclass(frozen=True)
class Score:
    """A number and how it came about.

    Args:
        value: the score; lower is better.
        se: standard error over the generated images (bootstrap), None when it was not asked for.
        num_images: images generated.
        nfe: network evaluations per image.
        others: scores of further metrics on the same images, `{name: {"value", "se"}}`.
    """

    value: float
    num_images: int
    nfe: int
    se: float | None = None
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """Scores candidates under one fixed set of circumstances."""

    @property
    def name(self) -> str:
        """Name of the number, such as `fid_digits`."""
        ...

    @property
    def min_images(self) -> int:
        """Fewest images a score can be made of."""
        ...

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, num_images: int, full: bool = False
    ) -> Score:
        """Score `candidate` on the images of `(seed, purpose)`; `full` adds the standard error and the other metrics.

        Raises:
            EvaluationError: the candidate produced something that cannot be scored.
        """
        ...

    def floor(self) -> float | None:
        """The score of real data against real data, None when there is no such thing."""
        ...

    def circumstances(self) -> dict[str, Any]:
        """Plain values that identify the evaluator; scores are comparable only where these agree."""
        ...

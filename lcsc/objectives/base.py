"""What an objective is: candidate -> score. Lower is better, always."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lcsc.core.seeds import Purpose
from lcsc.operators.base import Candidate, PullsBack

if TYPE_CHECKING:
    from torch import Tensor


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

    @property
    def image_forwards(self) -> int:
        """Network evaluations of one image that it took."""
        return self.num_images * self.nfe


@dataclass(frozen=True, eq=False)
class Slope:
    """A value and its derivative.

    Args:
        value: the score; lower is better.
        grad_P: derivative with respect to the candidate's flat weights, float32, shape (P,).
        image_forwards: what it cost in network evaluations of one image; a backward pass counts two.
    """

    value: float
    grad_P: Tensor
    image_forwards: int


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
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """Score `candidate` on `images` of `(seed, purpose)`; `full` adds the standard error and the other metrics.

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


@runtime_checkable
class Differentiable(Protocol):
    """What an objective offers beside `Objective` when it can be differentiated."""

    @property
    def no_gradient(self) -> str | None:
        """Why this objective, as configured, has no derivative, as a clause; None when it has one."""
        ...

    def slope(self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range) -> Slope:
        """Value and derivative on the noise of `images` of `(seed, purpose)`.

        Raises:
            EvaluationError: the candidate produced something that cannot be scored.
        """
        ...


def why_no_gradient(objective: Objective, operator: object) -> str | None:
    """Why a problem has no gradient, None when it has one."""
    if not isinstance(objective, Differentiable):
        return f"objective `{objective.name}` has no derivative"
    if objective.no_gradient is not None:
        return objective.no_gradient
    return None if isinstance(operator, PullsBack) else f"operator `{type(operator).__name__}` is not differentiable"

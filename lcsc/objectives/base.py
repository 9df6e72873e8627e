"""What an objective is: candidate -> score. Lower is better, always."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.seeds import Purpose
from lcsc.core.space import Point, SearchSpace
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
        resamples: the others' scores on bootstrap resamples of the images, by name; resample r holds the same images
            for all candidates scored on as many.
        further: network evaluations of one image besides, such as those of a training.
    """

    value: float
    num_images: int
    nfe: int
    se: float | None = None
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    resamples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    further: int = 0

    @property
    def image_forwards(self) -> int:
        """Network evaluations of one image that it took."""
        return self.num_images * self.nfe + self.further


@dataclass(frozen=True, eq=False)
class Slope:
    """A value and its derivative.

    Args:
        value: the score; lower is better.
        grad_P: derivative with respect to the candidate's flat weights, float32, shape (P,).
        image_forwards: what it cost in network evaluations of one image; a backward pass counts two.
        own: derivative with respect to the objective's own boxes, by name (`Tunable`).
        seen: what the images leave for later derivatives (`Remembering`); None where nothing does.
    """

    value: float
    grad_P: Tensor
    image_forwards: int
    own: Mapping[str, np.ndarray] = field(default_factory=dict)
    seen: Any = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Images of one candidate, cut into blocks and summed up block by block.

    Args:
        states: one mergeable state a block, in the order of the images.
        image_forwards: what they cost in network evaluations of one image.
    """

    states: tuple[Any, ...]
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
            EvaluationError: the candidate produced something that cannot be scored; says what that cost.
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


@runtime_checkable
class Remembering(Protocol):
    """What an objective offers beside `Differentiable` when its statistics may hold images of earlier candidates.

    A score that is no mean over images, such as the Fréchet distance, is biased on few images, and so is its
    derivative. With the images of the last candidates in its statistics a few new ones are enough.
    """

    @property
    def no_memory(self) -> str | None:
        """Why this objective, as configured, cannot weigh images, as a clause; None when it can."""
        ...

    def seen(self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range) -> Any:
        """What `slope` on these images leaves behind, `Slope.seen`, bit for bit.

        Raises:
            EvaluationError: the candidate produced something that cannot be scored.
        """
        ...

    def slope(
        self,
        candidate: Candidate,
        *,
        seed: int,
        purpose: Purpose,
        images: range,
        earlier: Sequence[tuple[Any, float]] = (),
    ) -> Slope:
        """`Differentiable.slope` with statistics of the new images and of `earlier` ones.

        The derivative is that of the score by the statistics, as if all their images moved like the new ones.

        Args:
            candidate, seed, purpose, images: of the new images.
            earlier: what earlier candidates left, and how much an image of theirs counts beside a new one, above 0.
        """
        ...


@runtime_checkable
class Raceable(Protocol):
    """What an objective offers beside `Objective` when it can score a few images first and add more later.

    A score is then a function of block states: the value of two lists of states joined is the score of their images
    together.
    """

    def block_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int
    ) -> Blocks:
        """`images` of `(seed, purpose)` as `num_blocks` blocks of nearly equal size; fewer where images are fewer.

        Raises:
            EvaluationError: the candidate produced something that cannot be scored.
        """
        ...

    def merge_states(self, states: Sequence[Any]) -> Any:
        """The state of several blocks, at least one, as one block."""
        ...

    def value_of(self, states: Sequence[Any], purpose: Purpose) -> float:
        """The score of all blocks together.

        Raises:
            EvaluationError: they cannot be scored.
        """
        ...

    def resampled(self, states: Sequence[Any], purpose: Purpose) -> np.ndarray:
        """Scores of bootstrap resamples of the blocks, shape (R,), float64.

        Equally many blocks are drawn alike, so resample r of two candidates holds the same images.
        """
        ...


@runtime_checkable
class RaceableBySteps(Raceable, Protocol):
    """What an objective offers beside `Raceable` when it trains candidates and can look at them on the way."""

    #: steps of a candidate's training
    num_steps: int

    def leg_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int, steps: range
    ) -> Blocks:
        """As `block_states`, after `steps.stop` of its steps, of which those before `steps` were paid for already.

        A candidate that is asked about again with more steps goes on where it was; behind all of them it is, to the
        bit, what it is without a stop.

        Raises:
            EvaluationError: the candidate produced something that cannot be scored.
        """
        ...


@runtime_checkable
class Timed(Protocol):
    """What an objective offers beside `Objective` when its candidates have a speed: measured once, after the search.

    A speed differs from run to run, so it is no part of a score or of the journal.
    """

    def speed(self, candidate: Candidate) -> Mapping[str, Any] | None:
        """Plain values for summary.json; None where it is not asked for."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """What an objective offers beside `Objective` when something of its own can be searched along with the weights."""

    def space(self) -> SearchSpace:
        """Boxes of its own, all idle at zero; empty where there is nothing to vary."""
        ...

    def at(self, point: Point) -> Objective:
        """The objective with its own boxes at `point`, which may hold other boxes too."""
        ...


@contextlib.contextmanager
def spending(image_forwards: int) -> Iterator[None]:
    """Add what was spent before, in network evaluations of one image, to the cost of a failure inside."""
    try:
        yield
    except EvaluationError as error:
        error.image_forwards += image_forwards
        raise


def joint_space(space: SearchSpace, objective: Objective) -> SearchSpace:
    """An operator's space with the objective's own boxes behind it.

    Raises:
        ConfigError: both have a box of one name.
    """
    own = objective.space() if isinstance(objective, Tunable) else SearchSpace()
    if twice := {box.name for box in space.boxes} & {box.name for box in own.boxes}:
        raise ConfigError(f"operator and objective both search a box `{sorted(twice)[0]}`; rename one.")
    return SearchSpace((*space.boxes, *own.boxes))


def tuned(objective: Objective, point: Point) -> Objective:
    """The objective at a point of the joint space."""
    return objective.at(point) if isinstance(objective, Tunable) else objective


def why_no_gradient(objective: Objective, operator: object) -> str | None:
    """Why a problem has no gradient, None when it has one."""
    if not isinstance(objective, Differentiable):
        return f"objective `{objective.name}` has no derivative"
    if objective.no_gradient is not None:
        return objective.no_gradient
    return None if isinstance(operator, PullsBack) else f"operator `{type(operator).__name__}` is not differentiable"


def why_no_memory(objective: Objective) -> str | None:
    """Why images of earlier candidates cannot count in a problem's derivative, None when they can."""
    if not isinstance(objective, Remembering):
        return f"objective `{objective.name}` keeps no statistics of images"
    return objective.no_memory

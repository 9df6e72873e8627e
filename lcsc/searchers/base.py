"""What a searcher is: it proposes vectors and hears values. It sees boxes and floats only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.space import SearchSpace


@dataclass(frozen=True, eq=False)
class Earlier:
    """An earlier proposal whose images count in a later one's statistics.

    Args:
        vector, block: its own; of equally many images.
        weight: how much an image of it counts beside a new one, above 0.
    """

    vector: np.ndarray
    block: int
    weight: float


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a session wants to know.

    Args:
        uid: its number, counted from 0.
        vector: float64, shape (space.size,).
        gradient: whether the derivative of the value with respect to the vector is wanted too.
        block: which block of noise of its own to use; None takes the noise that all trials of a search share. Equal
            blocks are the same noise, different blocks are independent.
        num_images: how many images to score it on; None takes the budget's. A block belongs to one number of images.
        earlier: with a gradient: whose images count beside its own; needs a task without `no_memory`.
        may_win: False for one that only informs the session, such as one beyond a budget.
    """

    uid: int
    vector: np.ndarray
    gradient: bool = False
    block: int | None = None
    num_images: int | None = None
    earlier: tuple[Earlier, ...] = ()
    may_win: bool = True


@dataclass(frozen=True, eq=False)
class Start:
    """A point that was scored before the search: a baseline, the family it is the member of, and what else it tells."""

    vector: np.ndarray
    value: float
    label: str
    family: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Task:
    """What a searcher is given to work on.

    Args:
        space: what to vary.
        num_trials: number of proposals that will be asked for in all.
        seed: of the proposals.
        starts: scored points to begin from, best first.
        no_gradient: why the problem has no gradient, as a clause; None when it has one.
        min_images: fewest images that a proposal can be scored on.
        no_memory: why images of earlier proposals cannot count in a gradient, as a clause; None when they can.
    """

    space: SearchSpace
    num_trials: int
    seed: int
    starts: tuple[Start, ...] = ()
    no_gradient: str | None = "nobody said that there is one"
    min_images: int = 1
    no_memory: str | None = "nobody said that they can"

    def begin(self) -> np.ndarray:
        """Where to begin, shape (space.size,): the best start, else the middle of the boxes, zero without bounds.

        Raises:
            ConfigError: there is nothing to search.
        """
        space = self.space
        if space.size == 0:
            raise ConfigError("the operator declares nothing to search. Use it by hand, or choose another operator.")
        if self.starts:
            return self.starts[0].vector.copy()
        bounded = np.isfinite(space.lower) & np.isfinite(space.upper)
        with np.errstate(invalid="ignore"):
            return np.where(bounded, (space.lower + space.upper) / 2, 0.0)

    def need_images(self, name: str, num_images: int | None) -> None:
        """Raise ConfigError where a searcher's setting asks for fewer images than a score takes."""
        if num_images is not None and num_images < self.min_images:
            raise ConfigError(
                f"`searcher.{name}` is {num_images}: too few images for this objective; it needs at least "
                f"{self.min_images}. Raise it, or take null for the budget's."
            )


def check_told(uid: int, value: float) -> None:
    """Raise EvaluationError for a value that no searcher may hear."""
    if not np.isfinite(value):
        raise EvaluationError(f"a searcher was told {value} for trial {uid}; only finite values may reach it.")


class Session(Protocol):
    """One search under way. The same task and the same values give the same proposals, bit for bit.

    A session that may be asked again before its last proposals are told, in whatever order, says so by an attribute
    `width`: how many proposals may be open at a time. Without it that is one.
    """

    def ask(self) -> Proposal:
        """The next proposal."""
        ...

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        """The value of proposal `uid`, finite, lower is better; its gradient if one was wanted and could be had."""
        ...

    def best(self) -> np.ndarray:
        """The vector the searcher would recommend now, shape (space.size,)."""
        ...

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]] | None:
        """At most `count` labelled vectors to choose the winner from on fresh seeds, likeliest first.

        None leaves it to the caller, who takes the trials with the best values.
        """
        ...


@runtime_checkable
class Weighing(Protocol):
    """What a session offers beside `Session` when it weighs the value against further numbers of the records."""

    weighed: tuple[str, ...]

    def weigh(self, uid: int, numbers: tuple[float, ...] | None) -> None:
        """The numbers called `weighed` of proposal `uid`, before its value is told; None where the proposal failed."""
        ...


@runtime_checkable
class Accountable(Protocol):
    """What a session offers beside `Session` when it has something to tell about its way."""

    def account(self) -> list[str]:
        """How the search went, in sentences; depends on what was told alone."""
        ...


def width_of(session: Session) -> float:
    """Proposals of a session that may be open at a time."""
    return getattr(session, "width", 1)


def ran(session: Session) -> str | None:
    """Name of the searcher that a session chose to run, where the choice was its own (attribute `ran`); else None."""
    return getattr(session, "ran", None)


def learns(searcher: Searcher) -> bool:
    """Whether a searcher compares baselines' scores with its trials': it says so (attribute `learns`)."""
    return bool(getattr(searcher, "learns", False))


def allows(session: Session, numbers: Mapping[str, float]) -> bool:
    """Whether a candidate that tells these numbers may win: a session that has a limit says so (method `allows`)."""
    within = getattr(session, "allows", None)
    return within is None or bool(within(numbers))


@runtime_checkable
class Searcher(Protocol):
    """Configuration of a search strategy."""

    def start(self, task: Task) -> Session:
        """Begin.

        Raises:
            ConfigError: the searcher cannot work on such a task.
        """
        ...

"""What an engine is: it takes jobs and gives results back, in any order. It sees neither searcher nor journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # engines have processes that evaluate nothing; torch would take them seconds
    from lcsc.search.evaluate import Row
    from lcsc.search.job import Job
    from lcsc.search.problem import Problem


@dataclass(frozen=True)
class Site:
    """What an engine is given to work with.

    Args:
        problem: what the jobs are about, for an engine that works in this process.
        config: plain values that `build_problem` makes the problem of again, for workers elsewhere.
        fingerprints: of the problem; a worker whose problem has others must not work.
        folder: the run directory.
        note: hears sentences for the user.
    """

    problem: Problem
    config: Mapping[str, Any]
    fingerprints: Mapping[str, Any]
    folder: Path
    note: Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Args:
        uid: of the job.
        row: see `lcsc.search.evaluate`.
        seconds: that the evaluation took, on the worker's clock.
        worker: who did it; empty for this process.
    """

    uid: str
    row: Row
    seconds: float
    worker: str = ""


@runtime_checkable
class Crew(Protocol):
    """Workers of one search, at work until they are closed."""

    @property
    def slots(self) -> int:
        """Evaluations that run at a time, as far as is known now; at least 1."""
        ...

    def submit(self, job: Job) -> None:
        """Hand a job in; the same job may come twice and counts once."""
        ...

    def collect(self, timeout: float | None = None) -> Sequence[Result]:
        """Results that came since the last call, at least one; none where `timeout` seconds passed before.

        A job may give several results, after a worker was taken for dead; they are equal but for chance.

        Raises:
            LcscError: no worker can work: the problem is wrong, or all workers die.
        """
        ...

    def close(self) -> None:
        """Stop all workers; what they have not finished is lost."""
        ...

    def __enter__(self) -> Crew: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Engine(Protocol):
    """Configuration of a crew."""

    def start(self, site: Site) -> Crew:
        """Begin; may return before any worker is ready.

        Raises:
            LcscError: the engine cannot run here.
        """
        ...


class Closing:
    """`with` for crews: closed at the end, whatever happened."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to stop."""

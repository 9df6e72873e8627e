"""How long an evaluation may take before it counts as hung: as the user says, else judged by the run's others."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parent of an evaluating process has no need of torch
    from lcsc.search.engines.base import Result
    from lcsc.search.job import Job

#: An evaluation that takes so many times what others took is hung, but never before so many seconds.
MULTIPLE, LEAST = 10.0, 60.0
#: So many have to be done before one is judged by them; of more than so many the last ones count.
ENOUGH, KEPT = 5, 100
#: So much more time has one that is unlike the others: the first of its process, which loads what the objective needs,
#: or one of a kind of which too few are done, judged by all kinds.
STRANGE = 10.0
#: Name of all kinds together.
ALL = "all"

#: By kind of evaluation: how many are done, and the medians of their images and seconds; plain values.
Paces = Mapping[str, tuple[int, float, float]]


class Patience:
    """Judges the evaluations of one session.

    Args:
        given: seconds, as the user said; None judges by what others took.
    """

    def __init__(self, given: float | None = None) -> None:
        self.given = given
        self._took: defaultdict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._paces: dict[str, tuple[int, float, float]] = {}

    def add(self, job: Job, result: Result) -> None:
        """An evaluation is done; one that failed says nothing of how long others take."""
        if result.row.get("value") is None or self.given is not None:
            return
        kind, images = kind_of(vars(job))
        for name in (kind, ALL):
            took = self._took[name]
            took.append((result.row.get("images", images), result.seconds))  # a race may have ended before
            self._paces[name] = (len(took), median(num for num, _ in took), median(seconds for _, seconds in took))

    @property
    def paces(self) -> Paces:
        """What is known; empty where the user gave a limit."""
        return self._paces

    def limit(self, job: Job, first: bool) -> float | None:
        """Seconds that an evaluation may take, None while nothing can be said.

        Args:
            job: what is done.
            first: whether its process has done nothing before.
        """
        return self.given if self.given is not None else judged(self._paces, *kind_of(vars(job)), first)


def kind_of(job: Mapping[str, Any]) -> tuple[str, int]:
    """What kind of evaluation the fields of a job are, and of how many images."""
    extras = [name for name in ("full", "resamples") if job[name]]
    begin, end = job["images"]
    return " ".join([job["call"], *extras]), end - begin


def judged(paces: Paces, kind: str, images: int, first: bool) -> float | None:
    """The limit by what others took; more images take longer in proportion, fewer may take as long."""
    own = kind in paces and paces[kind][0] >= ENOUGH
    num, usual, seconds = paces.get(kind if own else ALL, (0, 1, 0.0))
    if num < ENOUGH:
        return None
    limit = max(LEAST, MULTIPLE * seconds * max(1.0, images / usual))
    return limit * math.prod(STRANGE for strange in (first, not own) if strange)


def too_long(limit: float, given: bool) -> str:
    """Why an evaluation that took longer than its limit has failed."""
    if given:
        return f"took longer than `engine.timeout_seconds`, {limit:g} s, and was killed"
    return (
        f"took longer than {limit:.3g} s, {MULTIPLE:g} times what others of this run take or more, and was killed; "
        "`engine.timeout_seconds` sets another limit"
    )

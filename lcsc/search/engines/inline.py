"""Evaluations one after the other in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lcsc.core.registry import register
from lcsc.search.engines.base import Closing, Result, Site
from lcsc.search.job import Job, Performer


class InlineCrew(Closing):
    """Does a job when a result is asked for."""

    slots = 1

    def __init__(self, performer: Performer) -> None:
        self._performer, self._waiting = performer, deque[Job]()

    def submit(self, job: Job) -> None:
        """See `Crew.submit`."""
        self._waiting.append(job)

    def collect(self, timeout: float | None = None) -> Sequence[Result]:
        """See `Crew.collect`."""
        job = self._waiting.popleft()
        began = time.monotonic()
        row = self._performer.perform(job)
        return [Result(job.uid, row, time.monotonic() - began)]


@register("engine", "inline", source="lcsc")
@dataclass(frozen=True)
class Inline:
    """One evaluation after the other, in this process."""

    def start(self, site: Site) -> InlineCrew:
        """See `Engine.start`."""
        return InlineCrew(Performer(site.problem))

"""Between the search and an engine: each evaluation is waited for by its identity and counted once."""

from __future__ import annotations

import time
from collections.abc import Container

from lcsc.search.engines.base import Crew, Result
from lcsc.search.job import Job


class Dispatcher:
    """Hands jobs to a crew and keeps what comes back until it is asked for.

    Args:
        crew: who does them.
        run: identity of the run, part of every job's identity.
    """

    def __init__(self, crew: Crew, run: str) -> None:
        self._crew, self._run = crew, run
        self._open: set[str] = set()
        self._done: dict[str, Result] = {}
        self._began: float | None = None
        #: seconds that workers spent on evaluations, and slots x seconds since the first job was handed in
        self.busy, self.capacity = 0.0, 0.0

    @property
    def slots(self) -> int:
        """Evaluations that run at a time."""
        return max(1, self._crew.slots)

    @property
    def idle_share(self) -> float | None:
        """Share of their time that workers waited; None before the first result."""
        return max(0.0, 1 - self.busy / self.capacity) if self.capacity else None

    def submit(self, job: Job, place: str) -> str:
        """Hand in the job of a place in the plan; returns its identity."""
        named = job.named(self._run, place)
        self._tick()
        self._open.add(named.uid)
        self._crew.submit(named)
        return named.uid

    def one(self, uid: str) -> Result:
        """The result of a job."""
        while uid not in self._done:
            self._collect()
        return self._done.pop(uid)

    def first(self, uids: Container[str]) -> Result:
        """The result of one of these, whichever came first; takes no longer where there are thousands."""
        while (found := next((uid for uid in self._done if uid in uids), None)) is None:
            self._collect()
        return self._done.pop(found)

    def _collect(self) -> None:
        for result in self._crew.collect():
            self._tick()
            if result.uid in self._open:  # a second result of one job, or of an earlier session, counts for nothing
                self._open.discard(result.uid)
                self._done[result.uid] = result
                self.busy += result.seconds

    def _tick(self) -> None:
        now = time.monotonic()
        if self._began is not None:
            self.capacity += (now - self._began) * self.slots
        self._began = now

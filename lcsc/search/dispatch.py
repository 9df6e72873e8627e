"""Between the search and an engine: each evaluation is waited for by its identity and counted once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container, Mapping

from lcsc.search.budget import Budget
from lcsc.search.engines.base import Crew, Result
from lcsc.search.evaluate import Row
from lcsc.search.job import Job
from lcsc.search.rows import checked


class Dispatcher:
    """Hands jobs to a crew and keeps what comes back until it is asked for, each row with the key of its job.

    Args:
        crew: who does them.
        run: identity of the run, part of every job's identity.
        budget: of the search.
        inherited: rows that are there already, by the key of their job.
    """

    def __init__(self, crew: Crew, run: str, budget: Budget, inherited: Mapping[str, Row] | None = None) -> None:
        self._crew, self._run, self._budget, self._inherited = crew, run, budget, inherited or {}
        self._open: dict[str, tuple[str, Job]] = {}  # by identity: key and job
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
        key = job.key(self._budget)
        if key in self._inherited and not job.resamples:  # which no record keeps
            self._done[named.uid] = Result(named.uid, {**self._inherited[key], "job": key}, 0.0)
            return named.uid
        self._tick()
        self._open[named.uid] = key, named
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
                key, job = self._open.pop(result.uid)
                row = {**checked(result.row, job), "job": key}
                self._done[result.uid] = dataclasses.replace(result, row=row)
                self.busy += result.seconds

    def _tick(self) -> None:
        now = time.monotonic()
        if self._began is not None:
            self.capacity += (now - self._began) * self.slots
        self._began = now

"""The driver's side of a folder queue: offers jobs, takes results, and offers again what a dead worker had."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from lcsc.search.engines.base import Result
from lcsc.search.engines.common import TRIES
from lcsc.search.evaluate import failed_row
from lcsc.search.job import Job
from lcsc.search.lease import Facts, Leases, read_beats
from lcsc.search.patience import Patience
from lcsc.search.queue import Entry, Queue


class Desk:
    """Keeps the books of one session of a driver.

    Args:
        queue: the folders; jobs that an earlier session left unclaimed are withdrawn, results and claims stay.
        lease_seconds: a worker that has not beaten for so long is lost.
        timeout_seconds: that an evaluation may take; None has workers judge it by `patience`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: Queue,
        lease_seconds: float,
        timeout_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._clock = queue, clock
        #: what evaluations took, for the driver's beat
        self.patience = Patience(timeout_seconds)
        self._leases = Leases(lease_seconds, clock)
        for uid in queue.waiting():
            queue.drop(uid)
        self._claimed = {uid for uid, _ in queue.claims()}
        self._open: dict[str, Job] = {}
        self._found: list[Result] = []
        self._lost: Counter[str] = Counter()
        self._missing: dict[str, float] = {}
        #: what the beats of the living workers say, by worker, and of those that ended because they cannot work
        self.alive: dict[str, Facts] = {}
        self.broken: dict[str, Facts] = {}

    @property
    def num_open(self) -> int:
        """Jobs without a result."""
        return len(self._open)

    def submit(self, job: Job) -> None:
        """Offer a job, unless an earlier session's worker has it or has done it. What failed then is tried again."""
        self._open[job.uid] = job
        for result in self._queue.results([job.uid]):
            if result.row.get("value") is not None:
                return
            (self._queue.folder / "results" / f"{job.uid}.json").unlink(missing_ok=True)
        if job.uid not in self._claimed:
            self._offer(job)

    def results(self) -> list[Result]:
        """Results that came since the last call, each job's first."""
        self._take()
        found, self._found = self._found, []
        return found

    def audit(self, gone: Callable[[str], bool] = lambda worker: False) -> None:
        """See who is alive, and offer again what nobody does.

        Args:
            gone: whether a worker is known to have ended, whatever its beat says.
        """
        folder = self._queue.folder / "beats"
        beats = read_beats(folder)
        self.broken = {name: facts for name, facts in beats.items() if facts.get("error")}
        living = {name for name, facts in beats.items() if self._leases.alive(name, facts) and not gone(name)}
        for name in set(beats) - living - set(self.broken):
            (folder / f"{name}.json").unlink(missing_ok=True)  # one that was only stopped beats again
        self.alive = {name: beats[name] for name in sorted(living - set(self.broken))}
        waiting, claims = self._queue.waiting(), self._queue.claims()  # jobs move this way: none is overlooked
        self._take()
        for uid, worker in claims:
            if gone(worker) or worker in self.broken or not self._leases.alive(worker, beats.get(worker)):
                self._give_up(uid, worker)
        self._claimed = {uid for uid, _ in claims}
        self._offer_missing(waiting | self._claimed)

    def _take(self) -> None:
        for result in self._queue.results(self._open):
            self._close(result)
            if self._lost[result.uid]:
                self._queue.drop(result.uid)  # its first worker was slow, not dead

    def _close(self, result: Result) -> None:
        self.patience.add(self._open.pop(result.uid), result)
        self._missing.pop(result.uid, None)
        self._found.append(result)

    def _give_up(self, uid: str, worker: str) -> None:
        """A claim of a dead worker."""
        if uid not in self._open:
            self._queue.drop(uid, worker)
            return
        self._lost[uid] += 1
        if self._lost[uid] < TRIES:
            self._queue.give_back(uid, worker)
            return
        self._queue.drop(uid, worker)
        reason = f"{TRIES} workers were lost while they evaluated it"
        self._close(Result(uid, failed_row({}, reason, 0, cause="killed"), 0.0, worker))

    def _offer_missing(self, there: set[str]) -> None:
        """A job that is nowhere for the length of a lease was removed by somebody, or its result is damaged."""
        now = self._clock()
        self._missing = {uid: self._missing.get(uid, now) for uid in self._open if uid not in there}
        for uid, since in list(self._missing.items()):
            if now - since >= self._leases.seconds:
                del self._missing[uid]
                self._offer(self._open[uid])

    def _offer(self, job: Job) -> None:
        self._queue.put(Entry(job.uid, job.to_plain(), self.patience.given))

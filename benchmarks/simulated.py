"""Workers that only pass the time: a crew in virtual time, for a driver that is real.

What the driver does between two calls costs the wall time that it takes, added to the virtual clock; an evaluation
costs what it was drawn to cost and is not done. Not in it: the network between driver and workers, and what an engine
itself does when it hands a job over.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lcsc.core.space import Box, SearchSpace
from lcsc.search.engines.base import Closing, Result
from lcsc.search.evaluate import Row, done_row
from lcsc.search.job import Job

#: 0, 5, ..., 100 % of the seconds of 6,000 evaluations: all trials of three finished searches of experiment=digits
#: (searcher=lcsc_evolution, 500 images a trial, two processor cores shared with other work)
MEASURED = (
    0.704, 0.854, 0.894, 0.926, 0.96, 0.994, 1.042, 1.095, 1.173, 1.232, 1.276,
    1.319, 1.372, 1.441, 1.529, 1.632, 1.785, 2.094, 2.681, 3.695, 6.8,
)  # fmt: skip
#: the same of 58 evaluations of one search (searcher=cma) with less beside it, so with less spread
NARROW = (
    0.527, 0.535, 0.573, 0.596, 0.613, 0.664, 0.706, 0.751, 0.765, 0.776, 0.812,
    0.836, 0.855, 0.884, 0.909, 0.922, 0.929, 0.96, 1.005, 1.028, 1.145,
)  # fmt: skip
STRAGGLERS, SLOWER, DEATHS = 0.02, 10.0, 0.01
#: seconds until a death is noticed, and from there until the worker is back
LEASE, RESTART = 30.0, 10.0
#: times that one evaluation may be lost; the next attempt lives
MOST_DEATHS = 3


@dataclass(frozen=True, eq=False)
class Luck:
    """What every evaluation will cost, on any crew.

    Args:
        seconds_AJ: of each attempt at each job, float64, shape (attempts, jobs).
        dies_AJ: share of the attempt after which its worker dies; NaN where it lives.
    """

    seconds_AJ: np.ndarray
    dies_AJ: np.ndarray

    @classmethod
    def drawn(
        cls,
        jobs: int,
        seed: int,
        scale: float = 1.0,
        *,
        stragglers: float = STRAGGLERS,
        deaths: float = DEATHS,
        measured: Sequence[float] = MEASURED,
    ) -> Luck:
        """From measured quantiles times `scale`, with stragglers from their lognormal fit and with deaths."""
        rng, shape = np.random.default_rng(seed), (MOST_DEATHS + 1, jobs)
        seconds = np.interp(rng.random(shape), np.linspace(0, 1, len(measured)), measured)
        middle, width = lognormal_fit(measured)
        slow = SLOWER * rng.lognormal(middle, width, shape)
        dies = np.where(rng.random(shape) < deaths, rng.random(shape), math.nan)
        dies[-1] = math.nan
        return cls(scale * np.where(rng.random(shape) < stragglers, slow, seconds), dies)

    @property
    def mean(self) -> float:
        """Seconds of an evaluation that nothing happens to."""
        return float(self.seconds_AJ[0].mean())

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Luck:
        """These seconds, and nobody dies."""
        return cls(np.array([seconds], float), np.full((1, len(seconds)), math.nan))


def lognormal_fit(measured: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm of the measured seconds."""
    logs = np.log(np.interp(np.linspace(0.005, 0.995, 100), np.linspace(0, 1, len(measured)), measured))
    return float(logs.mean()), float(logs.std())


@dataclass(frozen=True)
class Loss:
    """`count` workers die at a moment; they come back, or never do."""

    at: float
    count: int
    comes_back: bool


@dataclass(eq=False)
class _Run:
    """An attempt at a job under way."""

    job: int
    attempt: int
    since: float


class SimulatedCrew(Closing):
    """Passes the virtual time of `luck`; see `Crew`.

    The first jobs that come in are those of `luck`; later ones take no time and belong to no figure.

    Args:
        workers: that there are.
        luck: of the jobs, in the order in which they come.
        lease: seconds after which a death is noticed; then the evaluation is handed to the next free worker.
        restart: seconds from there until the worker is back.
        clock: what the driver's time is measured with.
        loss: workers that die together.
    """

    def __init__(
        self,
        workers: int,
        luck: Luck,
        *,
        lease: float = LEASE,
        restart: float = RESTART,
        clock: Callable[[], float] = time.perf_counter,
        loss: Loss | None = None,
    ) -> None:
        self.workers, self.slots, self.luck = workers, workers, luck
        self.lease, self.restart, self.loss = lease, restart, loss
        self.now = self.driver = 0.0
        self.done_at: list[float] = []  # of drawn jobs
        self.asked_at = self.ended_at = 0.0  # when the last drawn job came in, and when the driver was done with them
        self.spans: list[tuple[float, float, str]] = []  # of workers: from, to, "useful", "lost" or "dead"
        self._clock, self._mark = clock, math.nan  # nan: what the driver does before its first job is no overhead
        self._jobs: list[Job] = []
        self._queue: deque[tuple[int, int]] = deque()  # job and attempt
        self._free = deque(range(workers))
        self._running: dict[int, _Run] = {}  # by worker
        self._dead: dict[int, float] = {}  # worker: since when
        self._events: list[tuple[float, int, Callable[[float], None]]] = []  # at, tie breaker, what happens
        self._ties = itertools.count()
        self._ready: list[Result] = []
        if loss:
            self._later(loss.at, self._lose)

    # ----------------------------------------------------------------------------------------- what the driver calls

    def submit(self, job: Job) -> None:
        """See `Crew.submit`."""
        self._charge()
        if len(self._jobs) < self._drawn:
            self.asked_at = self.now
        elif len(self._jobs) == self._drawn:
            self.ended_at = self.now
        self._jobs.append(job)
        self._pass(self.now)  # what became free meanwhile takes what waits, then this
        self._queue.append((len(self._jobs) - 1, 0))
        self._assign(self.now)
        self._mark = self._clock()

    def collect(self, timeout: float | None = None) -> Sequence[Result]:
        """See `Crew.collect`."""
        self._charge()
        self._pass(self.now)
        while not self._ready:
            assert self._events, "all workers wait, and so does the driver"
            self.now = max(self.now, self._events[0][0])
            self._pass(self.now)
        ready, self._ready = self._ready, []
        self._mark = self._clock()
        return ready

    # ------------------------------------------------------------------------------------------------------- figures

    def shares(self, until: float) -> dict[str, float]:
        """Of all workers' seconds from 0 to `until`: useful, lost (to be repeated), dead and idle."""
        capacity, sums = self.workers * until, dict.fromkeys(("useful", "lost", "dead"), 0.0)
        running = [(run.since, until, "useful") for run in self._running.values()]
        dead = [(since, until, "dead") for since in self._dead.values()]
        for begin, end, kind in (*self.spans, *running, *dead):
            sums[kind] += max(0.0, min(end, until) - min(begin, until))
        shares = {kind: value / capacity for kind, value in sums.items()}
        return {**shares, "idle": max(0.0, 1 - sum(shares.values()))}

    def lost_seconds(self) -> float:
        """Worker-seconds of evaluations that had to be repeated."""
        return sum(end - begin for begin, end, kind in self.spans if kind == "lost")

    def at_work(self, at: float) -> int:
        """Workers that were evaluating at a moment of the past."""
        return sum(begin <= at < end for begin, end, kind in self.spans if kind != "dead")

    # -------------------------------------------------------------------------------------------------------- inside

    @property
    def _drawn(self) -> int:
        return self.luck.seconds_AJ.shape[1]

    def _charge(self) -> None:
        spent = 0.0 if math.isnan(self._mark) else self._clock() - self._mark
        self.now += spent
        if len(self._jobs) <= self._drawn:
            self.driver += spent

    def _later(self, at: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._ties), what))

    def _pass(self, now: float) -> None:
        """All that happens up to now."""
        while self._events and self._events[0][0] <= now:
            at, _, what = heapq.heappop(self._events)
            what(at)
            self._assign(at)

    def _assign(self, now: float) -> None:
        while self._queue and self._free:
            worker, run = self._free.popleft(), _Run(*self._queue.popleft(), now)
            seconds, share = 0.0, math.nan
            if run.job < self._drawn:
                place = min(run.attempt, len(self.luck.seconds_AJ) - 1), run.job
                seconds, share = float(self.luck.seconds_AJ[place]), float(self.luck.dies_AJ[place])
            self._running[worker] = run
            if math.isnan(share):
                self._later(now + seconds, partial(self._done, worker, run))
            else:
                self._later(now + share * seconds, partial(self._dies, worker, run, True))

    def _done(self, worker: int, run: _Run, now: float) -> None:
        if self._running.get(worker) is not run:  # it died meanwhile
            return
        self._end(worker, now, "useful")
        self._free.append(worker)
        job = self._jobs[run.job]
        self._ready.append(Result(job.uid, row_of(job), now - run.since, str(worker)))
        if run.job < self._drawn:
            self.done_at.append(now)

    def _dies(self, worker: int, run: _Run | None, comes_back: bool, now: float) -> None:
        if run is not None and self._running.get(worker) is not run:
            return
        if run is not None:
            self._end(worker, now, "lost")
        self._dead[worker] = now
        self._later(now + self.lease, partial(self._found, worker, run, comes_back))

    def _found(self, worker: int, run: _Run | None, comes_back: bool, now: float) -> None:
        if run is not None:
            self._queue.appendleft((run.job, run.attempt + 1))
        if comes_back:
            self._later(now + self.restart, partial(self._back, worker))
        else:
            self.slots -= 1

    def _back(self, worker: int, now: float) -> None:
        self.spans.append((self._dead.pop(worker), now, "dead"))
        self._free.append(worker)

    def _lose(self, now: float) -> None:
        assert self.loss is not None
        for worker in range(self.loss.count):
            if worker in self._dead:
                continue
            if worker in self._free:
                self._free.remove(worker)
            self._dies(worker, self._running.get(worker), self.loss.comes_back, now)

    def _end(self, worker: int, now: float, kind: str) -> None:
        self.spans.append((self._running.pop(worker).since, now, kind))


def row_of(job: Job) -> Row:
    """A row like those of the linear operator: as many coefficients as there are numbers, and a bowl's value."""
    vector = np.array(job.vector)
    num = job.images[1] - job.images[0]
    tail = {"se": 0.1, "others": {}, "num_images": num} if job.full else {}
    return done_row({"coef": vector.tolist()}, float(((vector - 0.3) ** 2).sum()) + 1, num, tail)


class Coefficients:
    """An operator as far as the driver sees one: K numbers, and no baseline, so that trials are the first jobs."""

    def __init__(self, num_coefficients: int) -> None:
        self.num_coefficients = num_coefficients

    def space(self, bank: Any) -> SearchSpace:
        """See `Operator.space`."""
        return SearchSpace((Box("coef", self.num_coefficients),))

    def apply(self, bank: Any, point: Any) -> Any:
        """No candidate is built: nothing is evaluated."""
        raise AssertionError("a simulated worker evaluates nothing")

    def baselines(self, bank: Any) -> list[Any]:
        """None."""
        return []


@dataclass(frozen=True)
class Nothing:
    """An objective that is never asked."""

    name: str = "bowl"
    min_images: int = 2

    def floor(self) -> None:
        """None: no score is suspicious."""
        return

    def circumstances(self) -> dict[str, Any]:
        """Of nothing."""
        return {"nfe": 1}

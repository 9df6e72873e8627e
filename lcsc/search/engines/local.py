"""Evaluations in processes beside this one."""

from __future__ import annotations

import os
import select
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lcsc.core.errors import ConfigError, LcscError
from lcsc.core.files import writing
from lcsc.core.registry import register
from lcsc.search.deaths import Death, OomCounter, end_marked, explain
from lcsc.search.engines._local_process import Process
from lcsc.search.engines.base import Closing, Result, Site
from lcsc.search.engines.common import TRIES, check_settings
from lcsc.search.evaluate import failed_row
from lcsc.search.job import Job
from lcsc.search.packed_bank import BANKS, share_bank
from lcsc.search.patience import Patience, too_long
from lcsc.search.worker import RESULTS, order, read_result

#: Seconds between looks at processes that say nothing.
TICK = 0.5
#: So many deaths for lack of memory within so many evaluations take one worker away.
DEATHS, EVALUATIONS = 2, 10
#: Where libraries read how many threads to use, when they are loaded.
THREADS = tuple(f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA", "NUMEXPR"))


@dataclass
class _Task:
    """A job that has no result yet, and how many workers died of it."""

    job: Job
    deaths: int = 0


class LocalCrew(Closing):
    """Worker processes on this machine; each has one job at work and at most one waiting.

    Args:
        site: see `Site`.
        what: the order of the workers.
        envs: environment of each worker; a new one in place of a dead one takes its environment.
        timeout_seconds: of one evaluation; None judges it by the others, see `lcsc.search.patience`.
        leave: called when the workers are gone.
    """

    def __init__(
        self,
        site: Site,
        what: Mapping[str, Any],
        envs: Sequence[Mapping[str, str]],
        timeout_seconds: float | None,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._leave = leave
        self._note, self._order, self._patience = site.note, what, Patience(timeout_seconds)
        self._work, self._results = site.folder / "work", site.folder / RESULTS
        self._tasks: dict[str, _Task] = {}
        self._pending: deque[str] = deque()
        self._out: list[Result] = []
        self._envs, self._crew_id, self._born = deque(envs), uuid.uuid4().hex[:8], 0
        self._workers: dict[Process, Mapping[str, str]] = {}
        self._failed_starts, self._finished = 0, 0
        self._oom, self._oom_at = OomCounter(), deque[int](maxlen=DEATHS)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> int:
        """Living workers, those that are starting too."""
        return max(1, len(self._workers))

    def submit(self, job: Job) -> None:
        """See `Crew.submit`; a result that an interrupted session left is not computed again."""
        if job.uid in self._tasks:
            return
        found = read_result(self._results, job.uid)
        if found is not None and found.row["value"] is not None:  # a failure's cause may be mended by now
            self._out.append(found)
            return
        self._tasks[job.uid] = _Task(job)
        self._pending.append(job.uid)
        self._hand_out()

    def collect(self, timeout: float | None = None) -> Sequence[Result]:
        """See `Crew.collect`."""
        limit = None if timeout is None else time.monotonic() + timeout
        while not self._out:
            left = TICK if limit is None else min(TICK, limit - time.monotonic())
            if left < 0:
                return []
            self._turn(left)
        out, self._out = self._out, []
        return out

    def close(self) -> None:
        """See `Crew.close`."""
        workers, self._workers = list(self._workers), {}
        for worker in workers:
            worker.kill()
        end_marked([worker.mark for worker in workers])
        for worker in workers:
            worker.end()
        leave, self._leave = self._leave, lambda: None
        leave()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:  # the search is over and all of it is in the journal
            shutil.rmtree(self._work, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ what happens

    def _turn(self, seconds: float) -> None:
        """Wait until something happens, at most so long, and see to it."""
        poll = select.poll()
        for worker in self._workers:
            if worker.wire.near >= 0:
                poll.register(worker.wire.near, select.POLLIN)
            if worker.wire.full is not None:
                poll.register(worker.wire.full, select.POLLOUT)
        poll.poll(1000 * seconds)
        for worker in list(self._workers):
            worker.wire.flush()
            self._heard(worker, worker.wire.hear())
            if (code := worker.ended()) is not None:
                self._bury(worker, code)
            elif (limit := self._limit(worker)) is not None and time.monotonic() - worker.since > limit:
                self._out_of_time(worker, limit)
        self._fill()
        self._hand_out()

    def _heard(self, worker: Process, said: Sequence[tuple[str, str]]) -> None:
        for word, value in said:
            if word == "ready":
                worker.ready, self._failed_starts = True, 0
            elif word == "begin":
                worker.begun(value)
            elif word == "done":
                worker.done(value)
                self._finish(value)
            elif word == "cannot":
                worker.sentence = value
            else:  # the problem is wrong, not a candidate
                raise LcscError(value)

    def _finish(self, uid: str) -> bool:
        """Answer with the result that a worker left; whether there is one."""
        found = read_result(self._results, uid)
        if found is None:
            self._lose(uid, Death("crashed", f"its result in `{self._results}` cannot be read"), "")
            return False
        if task := self._tasks.pop(uid, None):
            self._finished += 1
            self._patience.add(task.job, found)
            self._out.append(found)
        return True

    def _fail(self, uid: str, cause: str, reason: str, seconds: float, worker: str) -> None:
        """Answer that a job has failed; nobody else is to begin it."""
        for other in self._workers:
            if uid in other.held and other.running != uid:
                other.drop(uid)
        del self._tasks[uid]
        self._finished += 1
        self._out.append(Result(uid, failed_row({}, reason, 0, cause), seconds, worker))

    def _lose(self, uid: str, death: Death, worker: str, seconds: float = 0.0) -> None:
        """A worker died of a job: once more, or given up."""
        task = self._tasks.get(uid)
        if task is None:
            return
        task.deaths += 1
        if task.deaths >= TRIES:
            self._fail(uid, death.cause, death.reason, seconds, worker)
        elif not any(uid in other.held for other in self._workers):
            self._pending.appendleft(uid)
            self._note(f"note: {worker or 'a worker'}: {death.reason}; its evaluation is tried once more")

    def _remove(self, worker: Process) -> str | None:
        """End a worker; what it had not begun goes back. What it had at work, where that has no result."""
        env = self._workers.pop(worker)
        self._envs.appendleft(env)
        worker.kill()
        end_marked([worker.mark])
        self._heard(worker, worker.end())
        for uid in reversed(worker.held):
            if uid != worker.running and uid in self._tasks and not any(uid in w.held for w in self._workers):
                self._pending.appendleft(uid)
        begun = worker.running
        if begun not in self._tasks or (read_result(self._results, begun) is not None and self._finish(begun)):
            return None
        return begun

    def _bury(self, worker: Process, code: int) -> None:
        """A process ended by itself, or somebody killed it."""
        seconds = time.monotonic() - worker.since
        uid = self._remove(worker)
        death = explain(code, worker.last_line(), self._oom)
        if death.cause == "oom":
            self._spare_memory()
        if not worker.ready:
            self._not_started(worker, death)
        elif uid is not None:
            self._lose(uid, death, worker.name, seconds)

    def _not_started(self, worker: Process, death: Death) -> None:
        self._failed_starts += 1
        if self._failed_starts < TRIES:
            return
        text = worker.sentence or f"{death.reason}. See `{worker.log}`"
        if not any(other.ready for other in self._workers):
            raise LcscError(f"no worker can start: {text.rstrip('.')}. Mend the cause, or use engine=inline.")
        self._failed_starts = 0
        self._shrink(f"a worker cannot be started again: {text}")

    def _spare_memory(self) -> None:
        """Go on with one worker less where they died for lack of memory again and again."""
        self._oom_at.append(self._finished)
        if len(self._oom_at) == DEATHS and self._finished - self._oom_at[0] <= EVALUATIONS:
            self._oom_at.clear()
            self._shrink(f"the system killed {DEATHS} workers for lack of memory")

    def _shrink(self, why: str) -> None:
        """One worker less from now on, where there is more than one."""
        left = len(self._workers) + len(self._envs) - 1
        if self._envs and left:
            self._envs.popleft()
            self._note(f"note: {why.rstrip('.')}; going on with {left}")

    def _limit(self, worker: Process) -> float | None:
        """Seconds that it may be at the job it has, None for any."""
        if not worker.held:
            return None
        task = self._tasks.get(worker.held[0])
        return self._patience.given if task is None else self._patience.limit(task.job, worker.fresh)

    def _out_of_time(self, worker: Process, limit: float) -> None:
        first, was = worker.held[0], worker.running
        seconds = time.monotonic() - worker.since
        uid = self._remove(worker)
        if uid is not None and uid == was:
            self._fail(uid, "timeout", too_long(limit, self._patience.given is not None), seconds, worker.name)
            return
        if uid is not None:  # begun in this very moment
            self._pending.appendleft(uid)
        if was is None and first in self._tasks:  # stopped before it could begin: not the candidate's fault
            if first in self._pending:
                self._pending.remove(first)
            self._lose(first, Death("timeout", f"no worker began it within {limit:g} s"), worker.name, seconds)

    # ------------------------------------------------------------------------------------------------------- work

    def _fill(self) -> None:
        """Start a worker for every environment that has none."""
        while self._envs:
            env = self._envs.popleft()
            mark = f"{self._crew_id}:local-{self._born}"
            try:
                worker = Process(mark, self._order, self._work / f"local-{self._born}.log", env)
            except OSError as error:
                if not self._workers:
                    raise LcscError(f"no worker can start: {error.strerror}. Use engine=inline.") from error
                self._note(f"note: a worker cannot start: {error.strerror}; {len(self._workers)} go on")
                continue
            self._born += 1
            self._workers[worker] = env

    def _hand_out(self) -> None:
        """A job for everyone who has none, then a second one for everyone, so that none waits for this process."""
        ready = [worker for worker in self._workers if worker.ready]
        for worker in ready:
            if not worker.held and (uid := self._next() or self._taken_back()) is not None:
                worker.give(self._tasks[uid].job)
        for worker in ready:
            if len(worker.held) == 1 and (uid := self._next()) is not None:
                worker.give(self._tasks[uid].job)

    def _next(self) -> str | None:
        """The next job that has no result yet."""
        while self._pending:
            uid = self._pending.popleft()
            if uid in self._tasks:
                return uid
        return None

    def _taken_back(self) -> str | None:
        """A job that waits at a worker which has another one to do first."""
        for worker in self._workers:
            if len(worker.held) == 2 and worker.running in (None, worker.held[0]) and worker.held[1] in self._tasks:
                uid = worker.held[1]
                worker.drop(uid)
                return uid
        return None


@register("engine", "local", source="lcsc")
@dataclass(frozen=True)
class Local:
    """Processes beside this one, one for each GPU or core.

    Args:
        num_workers: how many; None takes one for each GPU that is visible, else one for every `threads` cores that this
            process may use.
        timeout_seconds: an evaluation that takes longer is killed and has failed; None for ten times what others take,
            see `lcsc.search.patience`. The first one of a worker also loads what the objective needs.
        threads: of each worker; None shares the cores among them.
        devices: `CUDA_VISIBLE_DEVICES` of the workers, in turn; None gives each one of the GPUs that are visible.
    """

    num_workers: int | None = None
    timeout_seconds: float | None = None
    threads: int | None = None
    devices: list[str] | None = None

    def __post_init__(self) -> None:
        check_settings(self, {"num_workers": 1, "threads": 1}, above_zero=["timeout_seconds"])
        if self.devices is not None and not self.devices:
            raise ConfigError("`engine.devices` is empty; name at least one, such as [0, 1], or write null.")

    def start(self, site: Site) -> LocalCrew:
        """See `Engine.start`."""
        envs = self.environments()
        what = order(site)
        results = site.folder / RESULTS
        with writing(results):
            results.mkdir(parents=True, exist_ok=True)
            for left in results.glob(".*.tmp"):  # by what was killed in a write
                left.unlink(missing_ok=True)
        if len(envs) == 1:
            return LocalCrew(site, what, envs, self.timeout_seconds)
        shared, leave = share_bank(what["config"]["bank"], site.problem.bank, site.folder.parent / BANKS, site.note)
        what = {**what, "config": {**what["config"], "bank": shared}}
        return LocalCrew(site, what, envs, self.timeout_seconds, leave)

    def environments(self) -> list[dict[str, str]]:
        """Environment of each worker."""
        cores = len(os.sched_getaffinity(0))
        gpus = list(map(str, self.devices)) if self.devices else list(visible_gpus())
        num = self.num_workers or len(gpus) or max(1, cores // (self.threads or 1))
        threads = dict.fromkeys(THREADS, str(self.threads or max(1, cores // num)))
        own = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(num)]
        return [{**os.environ, **threads, **device} for device in own]


def visible_gpus() -> Iterator[str]:
    """Names of the GPUs that torch sees, as `CUDA_VISIBLE_DEVICES` spells them."""
    import torch

    if not torch.cuda.is_available():
        return
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    for i in range(torch.cuda.device_count()):
        yield named[i] if i < len(named) and named[i] else str(i)

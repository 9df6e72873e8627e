"""Evaluations by the workers of a SLURM job array, submitted with submitit; they share a folder and nothing else.

The driver, on a login node or itself in a job, offers jobs as files; workers take them while their time lasts (see
`lcsc.search.queue` for the files, `lcsc.search.shift` for a worker). submitit requeues workers that are preempted; that
is a convenience: a worker keeps nothing that would be lost with it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from lcsc.core.errors import ConfigError, LcscError, not_installed
from lcsc.core.files import write_json
from lcsc.core.registry import register
from lcsc.search.engines.base import Closing, Result, Site
from lcsc.search.engines.common import check_settings
from lcsc.search.lease import DRIVER, Beat, beat_seconds
from lcsc.search.queue import Queue
from lcsc.search.shift import SHORT_PAUSE, Shift, Terms

if TYPE_CHECKING:  # a worker's parent imports this module and has no need of torch
    from lcsc.search.job import Job

#: Lines of a worker's log that an error shows.
TAIL = 12


class ArrayTask:
    """What submitit runs on a node: one worker."""

    def __init__(self, folder: Path, terms: Terms) -> None:
        self._folder, self._terms = folder, terms
        self._shift: Shift | None = None

    def __call__(self, number: int) -> int:
        """Jobs done by worker `number`; raises LcscError where the problem cannot be worked on."""
        import submitit

        name = f"{submitit.JobEnvironment().job_id}-{secrets.token_hex(3)}"
        self._shift = Shift(self._folder, name, self._terms)
        return self._shift.run()

    def checkpoint(self, number: int) -> Any:
        """Preempted, or out of time: the job at hand goes to another worker, this one begins anew later."""
        import submitit

        if self._shift is not None:
            self._shift.release()
        return submitit.helpers.DelayedSubmission(ArrayTask(self._folder, self._terms), number)


class Array:
    """The workers' jobs on the cluster, as submitit knows them.

    Args:
        settings: of the engine.
        folder: of the queue; submitit's files and logs go to `submitit` in it.
        name: of the run.

    Raises:
        LcscError: submitit is not installed, or there is no such cluster here, or a setting that it does not know.
    """

    def __init__(self, settings: Slurm, folder: Path, name: str) -> None:
        try:
            import submitit
        except ImportError as error:
            raise not_installed("engine `slurm`", "submitit", "slurm") from error
        self._submitit, self._settings, self._folder = submitit, settings, folder
        self._logs, self._cluster = folder / "submitit", settings.cluster or "slurm"
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            self._executor = submitit.AutoExecutor(folder=self._logs, cluster=self._cluster)
            self._executor.update_parameters(**_parameters(settings, name))
        except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
            raise ConfigError(
                f"`engine=slurm` with cluster `{self._cluster}`: {_one_line(error)} Start it where sbatch and srun are "
                "and give settings that submitit knows."
            ) from error
        self._roster = self._logs / "roster.json"
        #: jobs that have not ended, as far as is known
        self.jobs: list[Any] = self._earlier()
        #: ids of those that have, and the last of them
        self.ended: set[str] = set()
        self.last: Any = None

    def submit(self, num: int) -> None:
        """So many more workers; raises ConfigError where the cluster refuses them."""
        settings = self._settings
        lease, driver, poll = settings.lease_seconds, settings.driver_lease_seconds, settings.poll_seconds
        task = ArrayTask(self._folder, Terms(lease, driver, poll, 60.0 * settings.time_minutes))
        try:
            with self._submitit.helpers.clean_env():  # the driver may be a job itself
                self.jobs += self._executor.map_array(task, range(num))
        except Exception as error:
            raise ConfigError(
                f"`engine=slurm` could not submit {num} workers: {_one_line(error)} Mend the settings under `engine`."
            ) from error
        self._write_roster()

    def look(self, suspects: set[str]) -> None:
        """See which jobs have ended; `suspects` are ids of those to ask the cluster about at once."""
        for job in list(self.jobs):
            if job.done(force_check=job.job_id in suspects):
                self.jobs.remove(job)
                self.ended.add(job.job_id)
                self.last = job

    def states(self) -> str:
        """How many jobs are in which state."""
        return ", ".join(f"{num} {state}" for state, num in sorted(Counter(job.state for job in self.jobs).items()))

    def log(self) -> str:
        """Where the log of the job that ended last is, and its last lines."""
        if self.last is None:
            return ""
        path = self.last.paths.stdout
        try:
            tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        except OSError:
            tail = ["(there is no such file)"]
        return f"The log of one of them, `{path}`, ends:\n" + "\n".join(f"    {line[:300]}" for line in tail)

    def cancel(self) -> None:
        """End all jobs. Those of this machine are given a moment to end by themselves, and are waited for."""
        patience = time.monotonic() + (2.0 if self._cluster == "local" else 0.0)
        while any(not job.done() for job in self.jobs) and time.monotonic() < patience:
            time.sleep(SHORT_PAUSE)
        for number, job in {job.job_id.partition("_")[0]: job for job in self.jobs}.items():
            whole = job if job.job_id == number else type(job)(folder=self._logs, job_id=number)
            with contextlib.suppress(OSError):
                whole.cancel(check=False)
        while self._cluster == "local" and any(not job.done() for job in self.jobs):
            time.sleep(SHORT_PAUSE)
        self.jobs = []
        self._write_roster()

    def _earlier(self) -> list[Any]:
        """Jobs of a driver that was killed: they serve the next one. (On this machine they serve too, but unlisted.)"""
        try:
            found = json.loads(self._roster.read_bytes())
            if self._cluster != "slurm" or found["cluster"] != "slurm":
                return []
            return [self._submitit.SlurmJob(folder=self._logs, job_id=str(job)) for job in found["jobs"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _write_roster(self) -> None:
        write_json(self._roster, {"cluster": self._cluster, "jobs": [job.job_id for job in self.jobs]})


class SlurmCrew(Closing):
    """A queue, its driver's beat, and the array that works on it."""

    def __init__(self, site: Site, settings: Slurm) -> None:
        from lcsc.search.desk import Desk
        from lcsc.search.worker import order

        self._settings, self._note = settings, site.note
        self._queue = Queue(site.folder.resolve() / "work")
        write_json(self._queue.folder / "order.json", order(site))
        self._array = Array(settings, self._queue.folder, site.folder.name)
        self._beats, self._stop = self._queue.folder / "beats", self._queue.folder / "stop"
        for path in self._beats.glob("*.json"):  # whoever lives beats again
            path.unlink(missing_ok=True)
        self._desk = Desk(self._queue, settings.lease_seconds, settings.timeout_seconds)
        self._restarts, self._started, self._next_audit = 0, False, 0.0
        self._told: set[str] = set()
        self._began = time.monotonic()
        self._open = contextlib.ExitStack()
        self._beat = self._open.enter_context(Beat(self._beats, DRIVER, beat_seconds(settings.driver_lease_seconds)))
        self._stop.unlink(missing_ok=True)
        try:
            self._array.look(set())
            missing = settings.num_workers - len(self._array.jobs)
            if missing > 0:
                self._array.submit(missing)
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> int:
        """See `Crew.slots`: workers that beat; as many as were asked for while none does."""
        return len(self._desk.alive) or self._settings.num_workers

    def submit(self, job: Job) -> None:
        """See `Crew.submit`."""
        self._desk.submit(job)

    def collect(self, timeout: float | None = None) -> Sequence[Result]:
        """See `Crew.collect`."""
        began, pause = time.monotonic(), SHORT_PAUSE
        while True:
            if time.monotonic() >= self._next_audit:
                self._audit()
                self._next_audit = time.monotonic() + beat_seconds(self._settings.lease_seconds)
            found = self._desk.results()
            if found:
                self._restarts, self._started = 0, True
                return found
            if timeout is not None and time.monotonic() - began >= timeout:
                return []
            time.sleep(pause)
            pause = min(1.5 * pause, self._settings.poll_seconds)

    def close(self) -> None:
        """See `Crew.close`."""
        self._stop.touch()
        self._array.cancel()
        for uid in self._queue.waiting():
            self._queue.drop(uid)
        for uid, worker in self._queue.claims():
            self._queue.drop(uid, worker)
        self._open.close()

    def _audit(self) -> None:
        before = set(self._desk.alive)
        self._desk.audit(lambda worker: _job_id(worker) in self._array.ended)
        self._beat.say(patience=self._desk.patience.paces)
        self._array.look({_job_id(worker) for worker in before - set(self._desk.alive)})
        self._started = self._started or bool(self._desk.alive or self._desk.broken)
        for worker, facts in self._desk.broken.items():
            self._say(worker, f"note: worker {worker} on {facts.get('host')} cannot work: {facts['error']}")
        if not self._desk.alive and time.monotonic() - self._began > self._settings.lease_seconds:
            self._say("waiting", f"note: no worker is alive; waiting for {self._array.states()}")
        if self._desk.num_open:
            self._replace()

    def _replace(self) -> None:
        """Submit workers in place of those that ended, unless that has helped nothing."""
        missing, most = self._settings.num_workers - len(self._array.jobs), self._settings.max_restarts
        if missing <= 0:
            return
        if not self._array.jobs:
            broken = [facts["error"] for facts in self._desk.broken.values()]
            if broken:
                raise LcscError(f"no worker can work: {broken[0]}")
            if not self._started:
                raise LcscError(f"none of {missing} workers started. {self._array.log()}")
            if self._restarts >= most:
                raise LcscError(
                    f"all workers ended, {most} times after a new start, and left no result. The same line continues. "
                    f"{self._array.log()}"
                )
        if self._restarts < most:
            self._restarts += 1
            self._array.submit(missing)

    def _say(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._note(text)


@register("engine", "slurm", source="submitit, github.com/facebookincubator/submitit")
@dataclass(frozen=True)
class Slurm:
    """The workers of a SLURM job array, for as long as they live; any file system that they share will do.

    Args:
        num_workers: jobs of the array; each evaluates one candidate at a time.
        cluster: of submitit; None is SLURM, `local` starts the workers on this machine.
        partition, account: as sbatch has them; None for the cluster's defaults.
        gpus_per_node, cpus_per_task, mem_gb: of each worker; None for the cluster's defaults.
        time_minutes: that each worker may run; it takes no work that would not be done by then, and is replaced.
        extra: more of submitit's parameters for SLURM, such as `{qos: high, constraint: a100}`, or None; what submitit
            does not know goes into `additional_parameters`.
        lease_seconds: a worker that has not beaten for so long is lost, and its job is done by another.
        driver_lease_seconds: workers whose driver has not beaten for so long end.
        timeout_seconds: that an evaluation may take before it is a failure; None for ten times what others take, see
            `lcsc.search.patience`.
        poll_seconds: longest pause between two looks into the folder.
        max_restarts: rounds of new workers in place of those that ended, without a result in between, before the search
            stops.
    """

    num_workers: int = 4
    cluster: Optional[str] = None  # noqa: UP045 - OmegaConf reads this spelling on every version
    partition: Optional[str] = None  # noqa: UP045
    account: Optional[str] = None  # noqa: UP045
    gpus_per_node: Optional[int] = None  # noqa: UP045
    cpus_per_task: Optional[int] = None  # noqa: UP045
    mem_gb: Optional[float] = None  # noqa: UP045
    time_minutes: int = 240
    extra: Any = None
    lease_seconds: float = 120.0
    driver_lease_seconds: float = 600.0
    timeout_seconds: Optional[float] = None  # noqa: UP045
    poll_seconds: float = 2.0
    max_restarts: int = 3

    def __post_init__(self) -> None:
        seconds = ("lease_seconds", "driver_lease_seconds", "timeout_seconds", "poll_seconds")
        check_settings(self, {"num_workers": 1, "time_minutes": 1, "max_restarts": 0}, above_zero=seconds)
        if not isinstance(self.extra, Mapping | None):
            raise ConfigError(f"`engine.extra` is `{self.extra}`; write parameters by name: {{qos: high}}.")

    def start(self, site: Site) -> SlurmCrew:
        """See `Engine.start`."""
        return SlurmCrew(site, self)


def _parameters(settings: Slurm, name: str) -> dict[str, Any]:
    """What submitit is told; it drops what is None."""
    return {
        "name": f"lcsc-{name}",
        "timeout_min": settings.time_minutes,
        "nodes": 1,
        "tasks_per_node": 1,
        "gpus_per_node": settings.gpus_per_node,
        "cpus_per_task": settings.cpus_per_task,
        "mem_gb": settings.mem_gb,
        "stderr_to_stdout": True,
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_array_parallelism": settings.num_workers,
        **{f"slurm_{key}": value for key, value in (settings.extra or {}).items()},
    }


def _job_id(worker: str) -> str:
    """The job that a worker is of."""
    return worker.rpartition("-")[0]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return text if text.endswith(".") else f"{text}."

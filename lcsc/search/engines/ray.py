"""Evaluations on a Ray cluster: actors that hold a worker each. The only file that imports ray, where it is used."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from lcsc.core.errors import ConfigError, LcscError, not_installed
from lcsc.core.registry import register
from lcsc.search.engines.base import Closing, Result, Site
from lcsc.search.engines.common import TRIES, check_settings
from lcsc.search.engines.ray_cluster import Cluster, last_words
from lcsc.search.evaluate import failed_row
from lcsc.search.job import Job
from lcsc.search.packed_bank import forget, pack_section, packed, unpack_once
from lcsc.search.patience import Patience, too_long
from lcsc.search.worker import Worker, guarded, order

BANKS = ("auto", "path", "store")
#: Evaluations that an actor has at most: the one it does, and the next, so that it need not wait for the driver.
DEPTH = 2
#: Seconds after which the user hears that no worker has begun yet.
PATIENCE = 60.0
#: Seconds at the end for removing the bank's files.
FAREWELL = 10.0
#: Seconds that a process may take longer for its first evaluation, which imports what the problem needs.
WARM_UP = 60.0


@register("engine", "ray", source="arXiv:1712.05889")
@dataclass(frozen=True)
class Ray:
    """Actors on a Ray cluster, or on a Ray of its own on this machine.

    Args:
        address: `auto` or host:port of a cluster to join; it is left running. None starts Ray here, and stops it.
        num_workers: actors; None: as many as the cluster has room for now.
        cpus_per_worker: processors of an actor, and threads it computes with.
        gpus_per_worker: GPUs of an actor, also parts of one; None: 1 where the cluster has GPUs, else 0.
        max_restarts: times that Ray starts an actor's process again (-1: always). An actor that used them up is
            replaced, unless it never finished an evaluation.
        timeout_seconds: an evaluation that takes longer (a minute more for a process's first) is a failure, and its
            process is killed; None: ten times what others take, see `lcsc.search.patience`.
        bank: `path`: workers read the checkpoints under the driver's path; `store`: they get them through Ray's object
            store; `auto`: through the store where a node does not have the path.
    """

    address: str | None = None
    num_workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    max_restarts: int = 3
    timeout_seconds: float | None = None
    bank: str = "auto"

    def __post_init__(self) -> None:
        least = {"num_workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0.0, "max_restarts": -1}
        check_settings(self, least, above_zero=["timeout_seconds"])
        if self.bank not in BANKS:
            raise ConfigError(f"`engine.bank` is `{self.bank}`; it must be one of {', '.join(BANKS)}.")

    def start(self, site: Site) -> RayCrew:
        """See `Engine.start`.

        Raises:
            MissingExtraError: ray is not installed.
            ConfigError: no cluster at the address, no room for a worker, or a problem that is not made of parts.
        """
        try:
            import ray
        except ImportError as error:
            raise not_installed("engine `ray`", "ray", "ray") from error
        plan = order(site)
        plan["packed"] = pack_section(plan["config"]["bank"], site.problem.bank)
        crew = RayCrew(self, site, plan, Cluster(ray, self.address, (self.num_workers or 0) * self.cpus_per_worker))
        try:
            crew.begin()
        except BaseException:
            crew.close()
            raise
        return crew


def session_folder() -> Path:
    """Where Ray keeps this node's files."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    sockets = [node["ObjectStoreSocketName"] for node in ray.nodes() if node["NodeID"] == own]
    return Path(sockets[0]).parents[1]


class Host:
    """The far side: an actor with a worker in it.

    Args:
        order: see `lcsc.search.worker.order`; `packed` opens a packed copy of the bank.
        name: of the worker.
        bank: see `Ray`.
    """

    def __init__(self, order: Mapping[str, Any], name: str, bank: str) -> None:
        self._order, self._name, self._bank = dict(order), name, bank
        self._worker: Worker | None = None
        self._words: IO[str] | None = None  # open until the process ends
        self._file = Path()  # of the bank's bytes, on this node
        self._lock: IO[bytes] | None = None  # says that the file is in use

    def ready(self, data: np.ndarray | None) -> dict[str, Any]:
        """Build the worker, from the bank's bytes where they are given; what the driver should know.

        Returns:
            `absent`: the bank is not here, and its bytes are wanted; `error`: why this worker cannot work, or None;
            `node`, `pid`, `file` (of the bank's bytes) and `last_words`: where this process is, and where it writes
            how it crashed.
        """
        import ray

        folder = session_folder()
        words = folder / "logs" / f"lcsc-{os.getpid()}.crash"
        if self._words is None:
            self._words = open(words, "w")  # noqa: SIM115
            faulthandler.enable(self._words, all_threads=False)
        told = {"absent": False, "error": None, "file": None, "last_words": str(words), "pid": os.getpid()}
        told["node"] = ray.get_runtime_context().get_node_id()
        if not Path(self._order["cwd"]).is_dir():
            self._order["cwd"] = os.getcwd()  # the driver's folder is not on this node
        if data is None and self._bank == "auto":
            there = Path(self._order["cwd"], self._order["config"]["bank"]["path"])
            if not there.exists():
                return {**told, "absent": True}
        self._file = folder / self._order["packed"]["path"]
        self._worker, error = guarded(lambda: self._build(data))
        return {**told, "error": error, "file": None if data is None else self._file}

    def _build(self, data: np.ndarray | None) -> Worker:
        if data is not None:
            self._lock = unpack_once(data, self._file)
            bank = {**self._order["packed"], "path": str(self._file)}
            self._order["config"] = {**self._order["config"], "bank": bank}
        return Worker(self._order, self._name)

    def leave(self) -> None:
        """Remove the bank's file, if this is the last process here that uses it."""
        if self._lock is not None:
            self._lock.close()
            forget(self._file)

    def do(self, job: Job) -> tuple[Result | None, str | None]:
        """The result, or what is wrong with the problem; neither where the process was started again meanwhile."""
        worker = self._worker
        return (None, None) if worker is None else guarded(lambda: worker.do(job))


@dataclass
class Member:
    """An actor as the driver sees it."""

    name: str
    actor: Any = None
    starting: Any = None  # its `ready` call, while that runs
    told: dict[str, Any] = field(default_factory=dict)  # by its last `ready`
    jobs: deque[tuple[Any, Job]] = field(default_factory=deque)  # in the order in which it does them
    began: float = math.inf  # when it was given the first of them
    fresh: bool = True  # its first start
    proven: bool = False  # this actor finished an evaluation
    warm: bool = False  # this process did


class RayCrew(Closing):
    """Actors of one search.

    Args:
        engine: settings.
        site: the problem; its bank is packed where workers need that.
        plan: the workers' order.
        cluster: where they are.
    """

    def __init__(self, engine: Ray, site: Site, plan: dict[str, Any], cluster: Cluster) -> None:
        self._engine, self._site, self._plan = engine, site, plan
        self._cluster, self._ray = cluster, cluster.ray
        self._members: list[Member] = []
        self._gpus = 0.0
        self._waiting: deque[Job] = deque()
        self._deaths: Counter[str] = Counter()
        self._results: list[Result] = []
        self._limits = Patience(engine.timeout_seconds)
        self._data: Any = None  # the bank in the object store
        self._patience = time.monotonic() + PATIENCE

    def begin(self) -> None:
        """Ask for the actors.

        Raises:
            ConfigError: no node has room for one, or the bank cannot be sent to them.
        """
        engine, all_gpus = self._engine, self._ray.cluster_resources().get("GPU", 0)
        self._gpus = min(1.0, all_gpus) if engine.gpus_per_worker is None else engine.gpus_per_worker
        room, most = self._cluster.room({"CPU": engine.cpus_per_worker, "GPU": self._gpus})
        if not room and (engine.num_workers is None or self._cluster.own):  # else the cluster may grow
            raise ConfigError(
                f"no node has room for a worker of {engine.cpus_per_worker} CPUs and {self._gpus:g} GPUs; the largest "
                f"has {most['CPU']:g} and {most['GPU']:g}. Set `engine.cpus_per_worker` and `engine.gpus_per_worker`."
            )
        if engine.bank == "store":
            self._store_bank()
        for n in range(engine.num_workers or room):
            self._members.append(Member(f"ray-{n}"))
            self._hire(self._members[-1])

    @property
    def slots(self) -> int:
        """See `Crew.slots`: actors at work and those that start for the first time."""
        return max(1, sum(member.starting is None or member.fresh for member in self._members))

    def submit(self, job: Job) -> None:
        """See `Crew.submit`."""
        self._waiting.append(job)

    def collect(self, timeout: float | None = None) -> Sequence[Result]:
        """See `Crew.collect`."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            self._hand_out()
            self._look(max(0.0, min(1.0, end - time.monotonic())))
            if self._results or time.monotonic() >= end:
                found, self._results = self._results, []
                return found

    def close(self) -> None:
        """See `Crew.close`."""
        with contextlib.suppress(Exception):  # a cluster that is gone needs no farewell
            idle = [] if self._cluster.own else [m for m in self._members if m.told.get("file") and not m.jobs]
            calls = [member.actor.leave.remote() for member in idle]
            if calls:
                self._ray.wait(calls, num_returns=len(calls), timeout=FAREWELL)
            for member in self._members:
                self._ray.kill(member.actor)
        self._cluster.leave()

    def _hire(self, member: Member) -> None:
        """A new actor for a member; it waits for room in the cluster."""
        member.proven = False
        options = {
            "num_cpus": self._engine.cpus_per_worker,
            "num_gpus": self._gpus,
            "max_restarts": self._engine.max_restarts,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self._engine.cpus_per_worker)}},
        }
        member.actor = self._ray.remote(Host).options(**options).remote(self._plan, member.name, self._engine.bank)
        self._prepare(member)

    def _prepare(self, member: Member) -> None:
        """Have its worker built; tried again by Ray until the actor is there, however often it is started again."""
        member.told, member.warm = {}, False
        member.starting = member.actor.ready.options(max_task_retries=-1).remote(self._data)

    def _store_bank(self) -> None:
        if self._data is not None:
            return
        with packed(self._site.problem.bank) as data:
            try:
                self._data = self._ray.put(data)
            except self._ray.exceptions.RayError as error:
                raise ConfigError(
                    f"the bank ({data.nbytes} bytes) does not fit into Ray's object store. Use `engine.bank=path`."
                ) from error

    def _started(self, member: Member) -> None:
        """Its `ready` call is over."""
        call, member.starting = member.starting, None
        try:
            member.told = self._ray.get(call)
        except self._ray.exceptions.RayError as error:  # also after all restarts
            if member.proven:
                self._hire(member)
            else:
                self._dismiss(member, f"it could not be started: {error}")
            return
        member.fresh = False
        if member.told["absent"]:
            try:
                self._store_bank()
            except ConfigError as error:
                self._dismiss(member, f"its node does not have the bank's path, and {error}")
            else:
                self._prepare(member)
        elif member.told["error"] is not None:
            self._dismiss(member, member.told["error"])

    def _dismiss(self, member: Member, reason: str) -> None:
        """Go on without it.

        Raises:
            LcscError: it was the last one.
        """
        self._ray.kill(member.actor)
        self._members.remove(member)
        reason = " ".join(reason.split())[:1000]
        if not self._members:
            raise LcscError(f"no Ray worker can work: {reason}")
        self._site.note(f"note: worker {member.name} cannot work, the others go on: {reason}")

    def _hand_out(self) -> None:
        """Give waiting jobs to actors with the fewest."""
        while self._waiting:
            able = [member for member in self._members if member.starting is None and len(member.jobs) < DEPTH]
            if not able:
                return
            member, job = min(able, key=lambda m: len(m.jobs)), self._waiting.popleft()
            if not member.jobs:
                member.began = time.monotonic()
            member.jobs.append((member.actor.do.remote(job), job))

    def _look(self, seconds: float) -> None:
        """Wait so long for news, and take all that there are."""
        calls = {m.starting: m for m in self._members if m.starting is not None}
        calls |= {m.jobs[0][0]: m for m in self._members if m.jobs}
        self._ray.wait(list(calls), timeout=seconds, fetch_local=False)
        done, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
        for call in done:
            member = calls[call]
            if call == member.starting:
                self._started(member)
            else:
                self._done(member)
        for member in [member for member in self._members if member.jobs]:
            call, job = member.jobs[0]
            limit = self._limits.limit(job, first=not member.warm)
            if limit is None:
                continue
            more = 0 if member.warm or self._limits.given is None else WARM_UP
            late = time.monotonic() - member.began > limit + more
            if late and not self._ray.wait([call], timeout=0)[0]:
                self._hung(member, limit)
        if time.monotonic() > self._patience and all(member.fresh for member in self._members):
            self._patience = math.inf
            self._site.note("note: no Ray worker has begun yet; the cluster has no room, or is slow to start it")

    def _done(self, member: Member) -> None:
        """The first call of an actor is over; raises LcscError where the problem is wrong."""
        call, job = member.jobs[0]
        try:
            result, error = self._ray.get(call)
        except self._ray.exceptions.RayError:
            self._died(member)
            return
        if error is not None:
            raise LcscError(f"worker {member.name}: {error}")
        if result is None:  # its process died while it had nothing to do
            self._take_back(member)
            self._prepare(member)
            return
        member.jobs.popleft()
        member.proven, member.warm, member.began = True, True, time.monotonic()
        self._deaths.pop(job.uid, None)
        self._limits.add(job, result)
        self._results.append(result)

    def _died(self, member: Member) -> None:
        """Its process is gone: the evaluation that ran is tried once more, those behind it never began."""
        _, job = member.jobs.popleft()
        self._take_back(member)
        self._deaths[job.uid] += 1
        if self._deaths[job.uid] < TRIES:
            self._waiting.appendleft(job)
        else:
            words = self._cluster.errand(member.told["node"], last_words, member.told["last_words"])
            how = f"crashed {TRIES} times ({words})" if words else f"was killed {TRIES} times; often memory ran out"
            self._fail(member, job, f"the process of its worker {how}", "crashed" if words else "killed")
        self._prepare(member)

    def _hung(self, member: Member, limit: float) -> None:
        self._ray.kill(member.actor)
        _, job = member.jobs.popleft()
        self._take_back(member)
        self._fail(member, job, too_long(limit, self._limits.given is not None), "timeout")
        self._hire(member)

    def _take_back(self, member: Member) -> None:
        self._waiting.extendleft(job for _, job in reversed(member.jobs))
        member.jobs.clear()

    def _fail(self, member: Member, job: Job, reason: str, cause: str) -> None:
        self._deaths.pop(job.uid, None)
        row = failed_row({}, reason, 0, cause=cause)
        self._results.append(Result(job.uid, row, time.monotonic() - member.began, member.name))

"""A worker of a folder queue: a small process that claims jobs and has them done by a child, whatever becomes of it.

The child evaluates (`lcsc.search.child`); it may hang, crash or be killed. Then its parent says so in the result's
place, or has the job done by another child. The parent holds no network and no bank, so that little can happen to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lcsc.core.errors import LcscError
from lcsc.search.deaths import Death, OomCounter, explain
from lcsc.search.engines.common import TRIES
from lcsc.search.lease import DRIVER, Beat, Leases, beat_seconds, read_beat
from lcsc.search.patience import Paces, judged, kind_of, too_long
from lcsc.search.queue import Entry, Queue, deliver

#: Share of the longest evaluation so far that must be left of a worker's time for another one.
RESERVE = 1.5

#: Time kept free at the end for that the cluster warns before it kills; at most a tenth of all.
MARGIN_SECONDS = 120.0

#: First pause of whoever has nothing to do; it grows.
SHORT_PAUSE = 0.02


@dataclass(frozen=True)
class Terms:
    """What a worker keeps to.

    Args:
        lease_seconds: as the driver judges workers.
        driver_lease_seconds: a driver that has not beaten for so long is gone, and so is its worker then.
        poll_seconds: longest pause between two looks for a job.
        seconds: that the worker may run; None for any.
    """

    lease_seconds: float
    driver_lease_seconds: float
    poll_seconds: float
    seconds: float | None


class Child:
    """The evaluating process of a worker."""

    def __init__(self, folder: Path, name: str) -> None:
        self._oom = OomCounter()
        cwd = json.loads((folder / "order.json").read_bytes())["cwd"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lcsc.search.child", str(folder), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cwd,  # where modules of the user's are found
            start_new_session=True,  # ended as a group, with what evaluations started
        )
        self.pid = self._process.pid
        #: whether it has done no job yet
        self.fresh = True
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def send(self, job: Any) -> None:
        """Hand over a job; a dead process is noticed by its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line, None where the process died.

        Raises:
            queue.Empty: it has said nothing for so long.
        """
        return self._answers.get(timeout=seconds)

    def end(self) -> Death:
        """Kill it with all that it started; how it ended by itself, if it did."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.2)  # its pipe closes a moment before it is dead
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):  # what it did not read
            if self._process.stdin is not None:
                self._process.stdin.close()
        return explain(self._process.wait(), "", self._oom, who="the evaluating process")

    def _listen(self, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self._answers.put(json.loads(line))
        self._answers.put(None)


class Shift:
    """Works until there is nobody to work for, or no time.

    Args:
        folder: of the queue.
        name: of the worker, unlike all others.
        terms: what it keeps to.
    """

    def __init__(self, folder: Path, name: str, terms: Terms) -> None:
        self._queue, self._name, self._terms = Queue(folder), name, terms
        self._began, self._longest, self._done = time.monotonic(), 0.0, 0
        self._driver = Leases(terms.driver_lease_seconds)
        self._alone = False
        self._paces: Paces = {}  # what evaluations take, as the driver's beat says
        self._child: Child | None = None
        self._entry: Entry | None = None
        beats = folder / "beats"
        each = self._look_for_driver
        self._beat = Beat(beats, name, beat_seconds(terms.lease_seconds), each, uid=None, done=0, child=None)

    def run(self) -> int:
        """The number of jobs done.

        Raises:
            LcscError: the problem cannot be built here, or is damaged; the beat says so and stays.
        """
        with self._beat:
            try:
                while (entry := self._next()) is not None:
                    self._entry = entry
                    self._beat.say(uid=entry.uid)
                    self._have_done(entry)
                    self._queue.drop(entry.uid, self._name)
                    self._entry, self._done = None, self._done + 1
                    self._beat.say(uid=None, done=self._done)
            except Stopped:
                pass
            except LcscError as error:
                self._beat.leave = False
                self._beat.say(error=str(error))
                self._beat.beat()
                raise
            finally:
                self.release()
        return self._done

    def release(self) -> None:
        """Stop evaluating and offer the job at hand again."""
        if self._child is not None:
            self._child.end()
            self._child = None
        if self._entry is not None:
            self._queue.give_back(self._entry.uid, self._name)
            self._entry = None

    # ------------------------------------------------------------------------------------------------- one job

    def _next(self) -> Entry | None:
        """The next job, once there is a child to do it; None where the shift is over."""
        pause = SHORT_PAUSE
        while not self._over():
            self._ready()  # this takes a while
            if not self._over() and (entry := self._queue.claim(self._name)) is not None:
                return entry
            time.sleep(pause)
            pause = min(1.5 * pause, self._terms.poll_seconds)
        return None

    def _have_done(self, entry: Entry) -> None:
        """A result for a job: its child's, or what became of the child."""
        for _ in range(TRIES):
            child = self._ready()
            child.send(entry.job)
            began = time.monotonic()
            try:
                answer = self._answer(child, lambda: self._limit(entry, child.fresh))  # noqa: B023 - asked at once
            except Late as error:
                self._end_child()
                reason = too_long(error.limit, entry.timeout_seconds is not None)
                self._fail(entry, reason, "timeout", time.monotonic() - began)
                return
            child.fresh = False
            if answer is not None:
                self._longest = max(self._longest, time.monotonic() - began)
                return
            death = self._end_child()
        self._fail(entry, f"{death.reason}, {TRIES} times", death.cause)

    def _ready(self) -> Child:
        """The child, with the problem loaded."""
        for _ in range(TRIES):
            if self._child is not None and self._child.alive:
                return self._child
            self._child = Child(self._queue.folder, self._name)
            self._beat.say(child=self._child.pid)
            if self._answer(self._child, lambda: None) is not None:
                return self._child
            death = self._end_child()
        raise LcscError(
            f"worker {self._name} cannot load the bank: {death.reason}, {TRIES} times. "
            "Give it more memory, or look into its log."
        )

    def _limit(self, entry: Entry, first: bool) -> float | None:
        """Seconds that an evaluation may take, as far as is known by now."""
        if entry.timeout_seconds is not None:
            return entry.timeout_seconds
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):  # a beat that was meddled with
            return judged(self._paces, *kind_of(entry.job), first)
        return None

    def _answer(self, child: Child, limit_now: Callable[[], float | None]) -> dict[str, Any] | None:
        """What the child says next; None where it died.

        Args:
            child: just asked.
            limit_now: seconds that it may take, None for any.

        Raises:
            Late: it has said nothing for so long.
            LcscError: it says that the problem is wrong.
            Stopped: the queue was closed.
        """
        began = time.monotonic()
        while True:
            limit = limit_now()
            left = self._terms.poll_seconds if limit is None else began + limit - time.monotonic()
            try:
                answer = child.answer(max(0.0, min(left, self._terms.poll_seconds)))
            except queue.Empty:
                if self._stopped():
                    raise Stopped("the queue was closed") from None
                if limit is not None and time.monotonic() - began >= limit:
                    raise Late(limit) from None
                continue
            if answer is not None and "error" in answer:
                raise LcscError(answer["error"])
            return answer

    def _end_child(self) -> Death:
        assert self._child is not None
        child, self._child = self._child, None
        return child.end()

    def _fail(self, entry: Entry, reason: str, cause: str, seconds: float = 0.0) -> None:
        from lcsc.search.engines.base import Result
        from lcsc.search.evaluate import failed_row

        deliver(self._queue, Result(entry.uid, failed_row({}, reason, 0, cause=cause), seconds, self._name))

    # ------------------------------------------------------------------------------------------------- the end

    def _over(self) -> bool:
        """Whether to take no more work: nobody wants it, or there is no time for it."""
        if self._alone or self._stopped():
            return True
        if self._terms.seconds is None or not self._longest:
            return False
        left = self._terms.seconds - (time.monotonic() - self._began)
        return left < RESERVE * self._longest + min(MARGIN_SECONDS, self._terms.seconds / 10)

    def _stopped(self) -> bool:
        return (self._queue.folder / "stop").exists()

    def _look_for_driver(self) -> None:
        facts = read_beat(self._queue.folder / "beats" / f"{DRIVER}.json")
        self._alone = not self._driver.alive(DRIVER, facts)
        if facts is not None:
            self._paces = facts.get("patience", {})


class Late(Exception):
    """The child has taken longer than it may."""

    def __init__(self, limit: float) -> None:
        super().__init__(limit)
        self.limit = limit


class Stopped(Exception):
    """The queue was closed while a job was at hand."""

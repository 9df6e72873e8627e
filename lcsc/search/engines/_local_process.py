"""A worker process of `engine=local`, as its driver sees it; see `_local_child` for what is said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc.search.deaths import MARK
from lcsc.search.job import Job

#: `python -m` would not find what a caller put on its path; what a worker needs takes seconds to import
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); fd = int(sys.argv[2]); del sys.argv[1:]; "
    "from lcsc.search.deaths import wake_when_orphaned; wake_when_orphaned(); "
    "from lcsc.search.engines._local_child import main; main(fd)"
)
#: Seconds in which a process that closed its pipe, or was killed, should be gone.
_PARTING = 10.0


class Wire:
    """Lines of JSON from and to a process, neither of which waits.

    Args:
        near: what it says comes from here.
        inbox: what it is told goes here.
    """

    def __init__(self, near: int, inbox: int) -> None:
        #: where to wait for what it says; -1 once it closed its side
        self.near = near
        self._inbox, self._rest, self._unsent = inbox, b"", bytearray()
        for fd in (near, inbox):
            os.set_blocking(fd, False)  # a stopped process must not stop its driver

    @property
    def full(self) -> int | None:
        """Where to wait for room, where there are lines that did not fit into the pipe."""
        return self._inbox if self._unsent else None

    def send(self, value: Any) -> None:
        """Tell it something."""
        self._unsent += json.dumps(value).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what fits into the pipe."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a dead one is noticed elsewhere
            while self._unsent:
                del self._unsent[: os.write(self._inbox, self._unsent[:65536])]

    def hear(self) -> list[tuple[str, str]]:
        """What it said since the last call."""
        with contextlib.suppress(BlockingIOError):
            while self.near >= 0:
                if not (data := os.read(self.near, 65536)):
                    self.close()  # it is gone, or about to be
                else:
                    self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [(word, value) for word, value in map(json.loads, lines)]

    def close(self) -> None:
        """Hear no more."""
        if self.near >= 0:
            os.close(self.near)
            self.near = -1


class Process:
    """One worker in a session of its own, so that what the terminal sends its driver does not reach it.

    Args:
        mark: identity among all processes; what follows the colon is the worker's name.
        order: see `lcsc.search.worker.order`.
        log: what it prints.
        env: its environment.
    """

    def __init__(self, mark: str, order: Mapping[str, Any], log: Path, env: Mapping[str, str]) -> None:
        self.name, self.mark, self.log = mark.rpartition(":")[2], mark, log
        self.ready = False
        #: whether it has done no job yet
        self.fresh = True
        #: jobs it was given, in order; at most two
        self.held: deque[str] = deque()
        #: the one it began, and since when it has been on that (or should have begun its first)
        self.running: str | None = None
        self.since = 0.0
        self.sentence = ""
        self._seen = 0
        near, far = os.pipe()
        try:
            with open(log, "ab") as said:
                self._popen = subprocess.Popen(
                    [sys.executable, "-c", _START, json.dumps(sys.path), str(far)],
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                    pass_fds=[far],
                    start_new_session=True,
                    env={**env, MARK: mark},
                    bufsize=0,
                )
        except BaseException:
            os.close(near)
            raise
        finally:
            os.close(far)
        assert self._popen.stdin
        self.wire = Wire(near, self._popen.stdin.fileno())
        self.wire.send(order)

    def give(self, job: Job) -> None:
        """Hand it a job."""
        if not self.held:
            self.since = time.monotonic()
        self.held.append(job.uid)
        self.wire.send(["job", job.to_plain()])

    def drop(self, uid: str) -> None:
        """Take a job back that it has not begun."""
        self.held.remove(uid)
        self.wire.send(["drop", uid])

    def begun(self, uid: str) -> None:
        """It said that it began a job."""
        if uid not in self.held:  # it was dropped too late
            self.held.appendleft(uid)
        self.running, self.since, self._seen = uid, time.monotonic(), self.log.stat().st_size

    def done(self, uid: str) -> None:
        """It said that it did a job."""
        self.held.remove(uid)
        self.running, self.since, self.fresh = None, time.monotonic(), False

    def ended(self) -> int | None:
        """Exit code, or minus the signal; None while it lives. The process is left to `end`, so its group stays its."""
        limit = time.monotonic() + (_PARTING if self.wire.near < 0 else 0)
        while True:
            try:
                found = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # somebody else in this process waits for all children
                return self._popen.poll() or 0
            if found is not None:
                return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            if time.monotonic() >= limit:
                return -signal.SIGKILL if self.wire.near < 0 else None  # it closed its pipe and lives; `end` follows
            time.sleep(0.002)

    def last_line(self) -> str:
        """The last that it printed since it began its job, at most 200 characters."""
        if self.sentence:
            return self.sentence
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(max(self._seen, self.log.stat().st_size - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
            return next((line[:200] for line in reversed(lines) if line), "")
        return ""

    def kill(self) -> None:
        """Kill its process group; the pid stays taken until `end`."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self) -> list[tuple[str, str]]:
        """Wait for it, once it is killed; what it had said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the kernel does not let go
            self._popen.wait(_PARTING)
        said = self.wire.hear()
        self.wire.close()
        if self._popen.stdin:
            self._popen.stdin.close()
        return said

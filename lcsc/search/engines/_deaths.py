"""What a worker process died of, and the end of all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Environment variable that names the worker; whatever a worker starts inherits it.
MARK = "LCSC_WORKER"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Death:
    """How a worker ended.

    Args:
        cause: `killed` (somebody else did it) or `crashed`; see `lcsc.search.evaluate.CAUSES`.
        reason: in words.
        memory: whether the system did it for lack of memory.
    """

    cause: str
    reason: str
    memory: bool = False


class OomCounter:
    """The kernel's count of processes that it killed for lack of memory, in this control group or on this machine.

    Args:
        files: `memory.events` of a control group or `/proc/vmstat`; the first one that counts is read. None finds them.
    """

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        self._files = tuple(_counters() if files is None else files)
        self._seen = self._count()

    def rose(self) -> bool:
        """Whether it killed one more since the last call that said so; each kill is said once."""
        if self._count() <= self._seen:
            return False
        self._seen += 1
        return True

    def _count(self) -> int:
        for file in self._files:
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split() for line in file.read_text().splitlines())
                if "oom_kill" in fields:
                    return int(fields["oom_kill"])
        return 0


def _counters() -> list[Path]:
    files = [Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                files.insert(0, Path("/sys/fs/cgroup", line[len("0::/") :], "memory.events"))
    return files


def explain(code: int, last_line: str, counter: OomCounter) -> Death:
    """What a process died of.

    Args:
        code: exit code, or minus the number of the signal.
        last_line: the last that it said.
        counter: tells the system's own kills from others.
    """
    said = f": {last_line}" if last_line else ""
    if code >= 0:
        return Death("crashed", f"the worker ended with exit code {code}{said}")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP):
        return Death("crashed", f"the worker crashed with {name}{said}")
    if -code == signal.SIGKILL and counter.rose():
        return Death("killed", "killed by the system (out of memory)", memory=True)
    return Death("killed", f"the worker was killed with {name}")


def wake_when_orphaned() -> None:
    """Have the kernel wake this process up when its parent dies: a stopped one could not see it."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def end_marked(marks: Collection[str]) -> None:
    """Kill whatever workers started, also what left their process groups; not the process that asks."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) in marks:
                process.kill()

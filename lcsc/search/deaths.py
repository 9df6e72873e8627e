"""What a process that evaluates died of, and the end of all that it started; for every engine that has processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Environment variable that names the worker; whatever a worker starts inherits it.
MARK = "LCSC_WORKER"
#: Signals that come from what a process did itself; others are sent.
_OWN = (
    *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP),
    signal.SIGSYS,
)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Death:
    """How a process ended.

    Args:
        cause: `oom` (the system killed it for lack of memory), `killed` (somebody else did) or `crashed`; see
            `lcsc.search.evaluate.CAUSES`.
        reason: in words.
    """

    cause: str
    reason: str


class OomCounter:
    """The kernel's count of processes that it killed for lack of memory, in this control group or on this machine.

    Args:
        files: as `counters` finds them; the first one that counts is read.
    """

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        self._files = tuple(counters() if files is None else files)
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


def counters(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup"), machine: Path = Path("/proc/vmstat")
) -> list[Path]:
    """Files that may count kills for lack of memory, the narrowest first: of this control group, of all, of `machine`.

    Args:
        proc: says which control groups, of either version, this process is in.
        root: where control groups are mounted.
        machine: counts for the whole machine.
    """
    files = []
    with contextlib.suppress(OSError):
        for line in proc.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                files.append(root / path.lstrip("/") / "memory.events")
            elif "memory" in kinds.split(","):
                files.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return [*files, root / "memory.events", machine]


def explain(code: int, last_line: str, counter: OomCounter, who: str = "the worker") -> Death:
    """What a process died of.

    Args:
        code: exit code, or minus the number of the signal.
        last_line: the last that it said.
        counter: tells the system's own kills from others; begun before the process was.
        who: it is, for the reason.
    """
    said = f": {last_line}" if last_line else ""
    if code >= 0:
        return Death("crashed", f"{who} ended with exit code {code}{said}")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code in _OWN:
        return Death("crashed", f"{who} crashed with {name}{said}")
    if -code == signal.SIGKILL and counter.rose():
        return Death("oom", f"{who} was killed by the system (out of memory)")
    return Death("killed", f"{who} was killed with {name}")


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

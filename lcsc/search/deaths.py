"""Why a process died: told apart by its exit status and the kernel's count of processes killed for lack of memory."""

from __future__ import annotations

import signal
from pathlib import Path

#: Signals that somebody sends; others come from what the process did itself.
_SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def count_oom_kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processes of this control group that were killed for lack of memory; None where nobody counts them."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            files = [root / path.lstrip("/") / "memory.events"]
        elif "memory" in kinds.split(","):
            files = [root / "memory" / path.lstrip("/") / "memory.oom_control"]
        else:
            continue
        for file in files:
            try:
                counts = dict(row.split() for row in file.read_text().splitlines())
                return int(counts["oom_kill"])
            except (OSError, KeyError, ValueError):
                continue
    return None


def cause_of_death(status: int, oom_kills: int | None) -> tuple[str, str]:
    """Cause (see `lcsc.search.evaluate.CAUSES`) and words for it.

    Args:
        status: as `Popen.wait` gives it: negative for a signal.
        oom_kills: what `count_oom_kills` said when the process began.
    """
    if status >= 0:
        return "crashed", f"with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    if -status == signal.SIGKILL:
        now = count_oom_kills()
        if now is not None and oom_kills is not None and now > oom_kills:
            return "oom", "by the system, for lack of memory"
    return ("killed" if -status in _SENT else "crashed"), f"by {name}"

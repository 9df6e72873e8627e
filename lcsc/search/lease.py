"""Who is alive: a counter in a file, judged by the clock of whoever reads it.

Every worker, and the driver, rewrites `beats/<name>.json` every few seconds (a temporary name, then a rename):

    {"counter": 17, "host": "node07", "pid": 4711, "session": "9f2c51ab", "uid": "<job at hand>", "done": 12, ...}

A name is taken for dead when its (session, counter) has not changed for the length of the lease by the reader's own
monotonic clock. No time stamp of a file or of another machine is ever compared, so clocks may jump and differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lcsc.search.queue import names

Facts = dict[str, Any]

#: Name under which the driver beats.
DRIVER = "driver"


class Beat:
    """Beats in a background thread while the block lasts; the file goes with the block.

    Args:
        folder: where the beats are.
        name: whose beat.
        seconds: between two.
        each: called after every beat, in the thread.
        facts: values for JSON, more of what the file says.
    """

    def __init__(
        self, folder: Path, name: str, seconds: float, each: Callable[[], None] = lambda: None, **facts: Any
    ) -> None:
        self._path, self._seconds, self._each = folder / f"{name}.json", seconds, each
        who = {"counter": 0, "host": socket.gethostname(), "pid": os.getpid(), "session": secrets.token_hex(4)}
        self._facts: Facts = {**who, **facts}
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"beat of {name}", daemon=True)
        self.leave = True  # the file goes when the block ends

    def say(self, **facts: Any) -> None:
        """Change what the next beats say."""
        with self._lock:
            self._facts.update(facts)

    def beat(self) -> None:
        """One beat now. A full disk or a stale handle costs a beat, not the work."""
        with self._lock, contextlib.suppress(OSError):
            self._facts["counter"] += 1
            temp = self._path.with_name(f".{self._path.name}.tmp")
            temp.write_text(json.dumps(self._facts) + "\n", encoding="utf-8")  # no fsync: a lost beat is no loss
            os.replace(temp, self._path)

    def __enter__(self) -> Beat:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self.leave:
            self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            self.beat()
            self._each()


def beat_seconds(lease_seconds: float) -> float:
    """Seconds between two beats for a lease: several fit into it, and they are a few seconds at most."""
    return min(5.0, lease_seconds / 5)


def read_beat(path: Path) -> Facts | None:
    """What a beat says; None where there is none or it is damaged."""
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def read_beats(folder: Path) -> dict[str, Facts]:
    """What the beats of all workers say, by worker; the driver's is left out. Empty where there is no such folder."""
    found = {name[:-5]: read_beat(folder / name) for name in names(folder)}
    return {name: facts for name, facts in sorted(found.items()) if facts is not None and name != DRIVER}


class Leases:
    """Judges who is alive.

    Args:
        seconds: a mark that has not changed for so long is dead.
        clock: monotonic seconds of this process.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def alive(self, name: str, facts: Mapping[str, Any] | None) -> bool:
        """Whether `name`, whose beat says `facts` now, is alive; None is a beat that is not there, or unreadable.

        Who is seen for the first time is alive, whatever its file says: it may beat yet.
        """
        now = self._clock()
        mark = None if facts is None else (facts.get("session"), facts.get("counter"))
        seen = self._seen.get(name)
        if seen is None or (mark is not None and mark != seen[0]):
            self._seen[name] = (mark, now)
            return True
        return now - seen[1] < self.seconds

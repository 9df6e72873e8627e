"""Jobs on a shared file system: files in folders, and the rename that only one can win.

    work/
      order.json                   what a worker needs to know to build the problem
      jobs/<uid>.json              to be done; written by the driver
      claims/<uid>.<worker>.json   being done: the same file, renamed by the worker that took it
      results/<uid>.json           done; the first valid one counts, whoever left it
      beats/<name>.json            who is alive, see `lcsc.search.lease`
      stop                         its presence ends all workers

A job is lost in no order of events: it lies in `jobs` or in `claims`, or its result is there; where none of it is true,
because somebody meddled, the driver writes it again (`lcsc.search.desk`). A job may be done twice; it counts once.
No lock, no socket, no time stamp: only rename must be atomic.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcsc.core.digests import canonical_json
from lcsc.core.files import write_bytes

if TYPE_CHECKING:  # the parent of an evaluating process has no need of torch, nor of the seconds that it takes
    from lcsc.search.engines.base import Result

FOLDERS = ("jobs", "claims", "results", "beats")

#: So many results are asked for by name; of more, the folder is listed.
FEW = 256

_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Entry:
    """A job in the queue.

    Args:
        uid: of the job.
        job: what `Job.to_plain` gave.
        timeout_seconds: that its evaluation may take; None judges it by what others took.
    """

    uid: str
    job: Mapping[str, Any]
    timeout_seconds: float | None = None


class Queue:
    """The folders of one run.

    Args:
        folder: `work` in the run directory; its folders are made where they are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._listed: list[str] = []

    # ------------------------------------------------------------------------------------------------- the driver's

    def put(self, entry: Entry) -> None:
        """Offer a job; the same one again changes nothing."""
        body = canonical_json({"job": entry.job, "timeout_seconds": entry.timeout_seconds})
        write_bytes(self.folder / "jobs" / f"{entry.uid}.json", f"{body}\n".encode())

    def waiting(self) -> set[str]:
        """Jobs that nobody has claimed."""
        return {name[:-5] for name in names(self.folder / "jobs") if _UID.fullmatch(name[:-5])}

    def claims(self) -> list[tuple[str, str]]:
        """Jobs and who claimed them."""
        pairs = (name[:-5].partition(".") for name in names(self.folder / "claims"))
        return sorted((uid, worker) for uid, dot, worker in pairs if dot and _UID.fullmatch(uid))

    def results(self, uids: Iterable[str]) -> list[Result]:
        """Valid results of these; damaged files count for nothing."""
        from lcsc.search.worker import read_result

        wanted, folder = list(uids), self.folder / "results"
        if len(wanted) > FEW:
            there = {name[:-5] for name in names(folder)}
            wanted = [uid for uid in wanted if uid in there]
        else:
            _look_again(folder)
        return [result for uid in wanted if (result := read_result(folder, uid)) is not None]

    # ------------------------------------------------------------------------------------------------- a worker's

    def claim(self, worker: str) -> Entry | None:
        """Take a job that nobody has; None where there is none. Any number of workers may ask at a time."""
        for uid in self._candidates():
            mine = self.folder / "claims" / f"{uid}.{worker}.json"
            try:
                os.rename(self.folder / "jobs" / f"{uid}.json", mine)
                found = json.loads(mine.read_bytes())
                entry = Entry(uid, found["job"], found["timeout_seconds"])
                if entry.job["uid"] == uid:
                    return entry
            except OSError:  # taken by somebody else, or withdrawn
                continue
            except (ValueError, KeyError, TypeError):
                pass
            mine.unlink(missing_ok=True)  # no job that the driver wrote; it notices what it misses
        return None

    # ------------------------------------------------------------------------------------------------- both's

    def give_back(self, uid: str, worker: str) -> bool:
        """Offer a claimed job again; whether it was still claimed."""
        try:
            os.rename(self.folder / "claims" / f"{uid}.{worker}.json", self.folder / "jobs" / f"{uid}.json")
        except OSError:
            return False
        return True

    def drop(self, uid: str, worker: str | None = None) -> None:
        """Forget a worker's claim, or (None) the offer of a job; whoever is at it goes on."""
        path = f"jobs/{uid}.json" if worker is None else f"claims/{uid}.{worker}.json"
        (self.folder / path).unlink(missing_ok=True)

    def _candidates(self) -> Iterator[str]:
        """Jobs to try: the rest of the last listing, then a new one, so that thousands of jobs are listed seldom.

        In any order: workers that try the same one first would be in each other's way.
        """
        while self._listed:
            yield self._listed.pop()
        self._listed = list(self.waiting())
        random.shuffle(self._listed)
        while self._listed:
            yield self._listed.pop()


def deliver(queue: Queue, result: Result) -> None:
    """Leave a result, unless a valid one is there: the first one counts."""
    from lcsc.search.worker import read_result, write_result

    folder = queue.folder / "results"
    if read_result(folder, result.uid) is None:
        write_result(folder, result)


def names(folder: Path) -> list[str]:
    """Names of the whole JSON files in a folder; none where there is no such folder."""
    _look_again(folder)
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.name.endswith(".json") and entry.name[0] != "."]
    except OSError:
        return []


def _look_again(folder: Path) -> None:
    """Ask a network file system for the folder as it is now, not as it was a minute ago (as submitit does)."""
    with contextlib.suppress(OSError):
        os.chmod(folder, os.stat(folder).st_mode & 0o7777)

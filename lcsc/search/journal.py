"""The append-only record of a search, and the cursor that replays it.

A search is a deterministic sequence of steps. Each step goes through `Journal.step`: when the journal holds its
record already (the run was interrupted), the record is returned and nothing is computed; otherwise it is computed,
appended and fsynced. So continuing is running the same program again. Clocks stay out of the journal: an interrupted
run and an unbroken one leave the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from lcsc.core.digests import canonical_json
from lcsc.core.errors import LcscError, RunError
from lcsc.core.files import fsync_dir, writing
from lcsc.search.frames import FIRST, Record, frame, link, read_chain
from lcsc.search.lock import Lock, Owner, busy


class Journal:
    """One writer's view of `journal.jsonl`; use as a context manager.

    Args:
        folder: the run directory.
        note: hears one sentence when a torn last line was dropped.

    Raises:
        RunError: another process is writing this journal, or a line other than the last is damaged.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        path = self._path = folder / "journal.jsonl"
        with writing(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
            try:
                self._lock = Lock(folder / "lock", str(folder), note, gated=self._flock(folder))
                self._lock.acquire()
            except (LcscError, OSError):
                self._file.close()
                raise
            try:
                self._open(folder, note)
            except (LcscError, OSError):
                self._unlock()
                raise
        self._cursor = 0

    def _open(self, folder: Path, note: Callable[[str], None]) -> None:
        """Read what there is, without a torn last line."""
        fsync_dir(folder)  # also where an earlier start was killed before it came to this
        self._records, good, self._link = read_chain(self._path)
        torn = self._path.stat().st_size - good
        if torn:
            note(f"dropped a torn last line of {torn} bytes from `{self._path}`")
            self._file.truncate(good)
            os.fsync(self._file.fileno())
        self._timing = open(folder / "timing.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def _flock(self, folder: Path) -> bool:
        """Whether the file system keeps locks, which the kernel gives back however a process of this machine ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy(str(folder), Owner.read(folder / "lock")) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            return False
        return True

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a row that found no room is decoration, and was spoken of
            self._timing.close()
        self._unlock()

    def _unlock(self) -> None:
        self._lock.release()
        self._file.close()  # gives the kernel's lock back, last: who has it takes the other for a left-over

    @property
    def records(self) -> tuple[Record, ...]:
        """All records that there are, replayed already or not."""
        return tuple(self._records)

    def forget(self, start: int) -> None:
        """Cut off the records from place `start` on, none of which was replayed yet; they will be computed again.

        A file is cut at once or not at all, so an interruption leaves a whole journal.
        """
        assert self._cursor <= start <= len(self._records)
        lines = self._path.read_bytes().splitlines(keepends=True)[:start]
        self._lock.check()
        with writing(self._path):
            self._file.truncate(sum(map(len, lines)))
            os.fsync(self._file.fileno())
        self._link = link(lines[-1]) if lines else FIRST
        del self._records[start:]

    @property
    def run(self) -> str:
        """Name of the run directory."""
        return self._path.parent.name

    @property
    def place(self) -> int:
        """Number of the next step."""
        return self._cursor

    @property
    def next(self) -> Record | None:
        """The record of the next step, None where it is not recorded yet."""
        return self._records[self._cursor] if self.holds(self._cursor) else None

    def holds(self, place: int) -> bool:
        """Whether the step at a place is recorded."""
        return place < len(self._records)

    def step(
        self,
        kind: str,
        key: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Any]],
        images: int = 0,
        seconds: float | None = None,
    ) -> Record:
        """The record of the next step.

        Args:
            kind: what the step is.
            key: what it is done to; must agree with the recorded step when replaying.
            compute: makes the rest of the record.
            images: how many images it samples, for the timing file.
            seconds: that it took, for the timing file; None takes the time that `compute` takes.

        Raises:
            RunError: the journal holds another step here.
        """
        head = {"seq": self._cursor, "kind": kind, **key}
        record = self.next
        if record is not None:
            wrong = [name for name in head if canonical_json(record.get(name)) != canonical_json(head[name])]
            if wrong:
                name = wrong[0]
                raise RunError(
                    f"journal record {self._cursor} has `{name}` = {str(record.get(name))[:60]}, this search computes "
                    f"{str(head[name])[:60]}. Library versions or the machine changed; start a new run."
                )
        else:
            began = time.monotonic()
            record = {**head, **compute()}
            took = time.monotonic() - began if seconds is None else seconds
            self._append(record, took, record.get("images", images))
        self._cursor += 1
        return record

    def _append(self, record: Record, seconds: float, images: int) -> None:
        line = frame(record, self._link)
        self._lock.check()
        with writing(self._path):
            left = memoryview(line)
            while left:  # a full disk takes a part, and says why at the rest; the next start drops it
                taken = self._file.write(left)
                if not taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                left = left[taken:]
            os.fsync(self._file.fileno())
        self._link = link(line)
        self._records.append(record)
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        row = {"seq": record["seq"], "seconds": round(seconds, 4), "images": images, "at": at}
        with writing(self._path.with_name("timing.jsonl")):
            self._timing.write(json.dumps(row) + "\n")
            self._timing.flush()

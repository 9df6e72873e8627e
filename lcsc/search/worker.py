"""What a worker of any engine is made of: the problem built again from plain values, checked, and jobs done on it."""

from __future__ import annotations

import json
import os
import time
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lcsc.core.differences import differences
from lcsc.core.digests import canonical_json
from lcsc.core.errors import ConfigError, LcscError
from lcsc.core.files import write_bytes
from lcsc.search.engines.base import Result, Site
from lcsc.search.job import Job, Performer
from lcsc.search.rows import checked, is_number
from lcsc.search.setup import build_problem, fingerprints

#: Where workers leave their results, inside the run directory.
RESULTS = "work/results"


def order(site: Site) -> dict[str, Any]:
    """What a worker needs to know, as plain values.

    Raises:
        ConfigError: the problem has parts that cannot be built again from plain values.
    """
    try:
        build_problem(site.config, trust=True)
    except LcscError as error:
        raise ConfigError(
            f"this problem cannot be built again in a worker: {error} Register its parts, or use engine=inline."
        ) from error
    return {
        "config": dict(site.config),
        "fingerprints": dict(site.fingerprints),
        "folder": str(site.folder.resolve()),
        "cwd": os.getcwd(),
    }


class Worker:
    """Does jobs of one order.

    Args:
        order: see `order`.
        name: of the worker, for results.

    Raises:
        LcscError: the problem cannot be built here, or is another one than the driver's.
    """

    def __init__(self, order: Mapping[str, Any], name: str) -> None:
        os.chdir(order["cwd"])
        problem = build_problem(order["config"], trust=True)  # the user's own command line, not a stranger's run.json
        rows = differences(order["fingerprints"], json.loads(canonical_json(fingerprints(problem))))
        if rows:
            raise ConfigError(f"worker {name} would score otherwise than the driver: {'; '.join(rows)}.")
        problem.bank.load()
        self.name, self._performer = name, Performer(problem)

    def do(self, job: Job) -> Result:
        """The result of a job; raises LcscError where the problem is wrong rather than the candidate."""
        began = time.monotonic()
        row = self._performer.perform(job)
        return Result(job.uid, row, time.monotonic() - began, self.name)


def write_result(folder: Path, result: Result) -> None:
    """Leave a result under its identity: absent or complete, and durable."""
    body = canonical_json({"uid": result.uid, "row": result.row, "seconds": result.seconds, "worker": result.worker})
    write_bytes(folder / f"{result.uid}.json", f"{zlib.crc32(body.encode()):08x} {body}\n".encode())


def read_result(folder: Path, uid: str) -> Result | None:
    """The result that a worker left, None where there is none or it is damaged: then the job is done again.

    One that is whole and says what no result says is that of a failed evaluation.
    """
    try:
        data = (folder / f"{uid}.json").read_bytes()
        crc, _, body = data.partition(b" ")
        if not data.endswith(b"\n") or crc != f"{zlib.crc32(body[:-1]):08x}".encode():
            return None
        found = json.loads(body)
        if found["uid"] != uid:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    seconds = found.get("seconds")
    row = checked(found.get("row"))
    return Result(uid, row, max(0.0, seconds) if is_number(seconds) else 0.0, str(found.get("worker", "")))


def guarded(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` gives and None, or None and what went wrong in a sentence; for the far side of a process border."""
    try:
        return work(), None
    except LcscError as error:
        return None, str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"

"""A worker process of `engine=local`, as it runs. Its driver talks to it in lines of JSON, `[word, value]`.

In, on standard input: first the order, then `job` (a job) and `drop` (the identity of a job that another one does).
Out, on a pipe of its own, because libraries print: `ready`; `begin` and `done` with the identity of a job; `wrong` with
a sentence about the problem, and `cannot` with one about this process; both are its last.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lcsc.core.errors import LcscError
from lcsc.core.files import writing
from lcsc.search.deaths import MARK, end_marked
from lcsc.search.engines.common import listen, private_stdin
from lcsc.search.job import Job
from lcsc.search.worker import RESULTS, Worker, guarded, write_result


class Port:
    """Lines from and to the driver.

    Args:
        lines: from it.
        fd: to it.
    """

    def __init__(self, lines: BinaryIO, fd: int) -> None:
        self._lines, self._fd = lines, fd
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._dropped: set[str] = set()

    def say(self, word: str, value: str = "") -> None:
        """One line to the driver."""
        with contextlib.suppress(BrokenPipeError):  # it is gone; `listen` sees to that
            os.write(self._fd, json.dumps([word, value]).encode() + b"\n")

    def listen(self) -> None:
        """Take lines from now on, also while a job is at work."""
        listen(self._lines, self._heard, lambda: end_marked([os.environ[MARK]]))

    def next_job(self) -> Job:
        """The next job that was not dropped."""
        while True:
            job = self._jobs.get()
            if job.uid not in self._dropped:
                return job

    def _heard(self, said: tuple[str, Any]) -> None:
        word, value = said
        if word == "job":
            self._dropped.discard(value["uid"])
            self._jobs.put(Job.from_plain(value))
        else:
            self._dropped.add(value)


def main(fd: int) -> None:
    """Work until the driver closes standard input.

    Args:
        fd: where to answer.
    """
    lines = private_stdin()
    os.set_inheritable(fd, False)
    port = Port(lines, fd)
    if first := lines.readline():
        port.listen()
        port.say(*_work(port, json.loads(first)))
        sys.stderr.flush()
    os._exit(1)


def _work(port: Port, order: dict[str, Any]) -> tuple[str, str]:
    """Do jobs; the last line to the driver."""
    worker, failed = _tried(lambda: Worker(order, os.environ[MARK].rpartition(":")[2]))
    if failed:
        return failed
    results = Path(order["folder"], RESULTS)

    def do(job: Job) -> None:
        result = worker.do(job)
        with writing(results):
            write_result(results, result)

    port.say("ready")
    while True:
        job = port.next_job()
        port.say("begin", job.uid)
        _, failed = _tried(functools.partial(do, job))
        if failed:
            return failed
        port.say("done", job.uid)


def _tried(work: Callable[[], Any]) -> tuple[Any, tuple[str, str] | None]:
    """What `work` gives, or the line that says what went wrong."""
    word = "cannot"

    def watched() -> Any:
        nonlocal word
        try:
            return work()
        except LcscError:
            word = "wrong"
            raise

    value, sentence = guarded(watched)
    return value, None if sentence is None else (word, sentence)

"""The process that evaluates, one job after the other: `python -m lcsc.search.child <work folder> <worker>`.

Its parent (`lcsc.search.shift`) sends each job as a line of JSON and hears of it in a line:

    {"ready": true} | {"done": "<uid>", "seconds": 1.5} | {"error": "<sentence>"}

The last is about the problem, not about a candidate: the process ends after it. It also ends, with all that it started,
when its parent does.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcsc.search.engines.common import listen, private_stdin
from lcsc.search.queue import Queue, deliver


def main(folder: Path, name: str) -> None:
    """Do the jobs that come until there are no more."""
    jobs, say = _talk()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, lambda *_: None)  # a cluster warns all processes; what to do is the parent's business
    from lcsc.search.job import Job  # the seconds that this takes are not the parent's
    from lcsc.search.worker import Worker, guarded

    order = json.loads((folder / "order.json").read_bytes())
    worker, wrong = guarded(lambda: Worker(order, name))
    if wrong is not None:
        say({"error": wrong})
        return
    tray = Queue(folder)
    say({"ready": True})
    while True:
        job = Job.from_plain(jobs.get())
        result, wrong = guarded(functools.partial(worker.do, job))
        if wrong is not None:
            say({"error": wrong})
            return
        deliver(tray, result)
        say({"done": job.uid, "seconds": result.seconds})


def _talk() -> tuple[queue.SimpleQueue[dict[str, Any]], Callable[[dict[str, Any]], None]]:
    """Jobs as they come, and what sends a line to the parent; what evaluations run or print cannot reach either."""
    lines, answers = private_stdin(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    listen(lines, jobs.put)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return jobs, say


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

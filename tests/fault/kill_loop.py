"""kill -9 a search at random times and run the same line again.

    PYTHONPATH=tests python tests/fault/kill_loop.py FOLDER NUM_KILLS SEED

Each search is a process of its own, forked from this one so that it begins at once. It tells over a pipe which records
it counts as done, after the journal's fsync. Prints JSON: kills, runs, acknowledged records, records that were
acknowledged and are not in the final journal (`lost`), that were computed although acknowledged (`double`), and final
journals and summaries that differ from those of an unbroken run (`different`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from small_search import search

from lcsc.search.frames import read_records
from lcsc.search.journal import Journal

NUM_TRIALS, SECONDS = 24, 0.002


def start(runs):
    """The search as a process; its id and the pipe that it acknowledges to."""
    said, say = os.pipe()

    class Told(Journal):
        def _append(self, record, seconds, images):
            super()._append(record, seconds, images)
            os.write(say, json.dumps(record, sort_keys=True).encode() + b"\n")

    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(said)
            search(runs, NUM_TRIALS, SECONDS, Told)
            code = 0
        finally:
            os._exit(code)
    os.close(say)
    return pid, said


def read_all(fd):
    data = b""
    while chunk := os.read(fd, 65536):
        data += chunk
    os.close(fd)
    return [line.decode() for line in data.split(b"\n")[:-1]]


def main():
    folder, num_kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    counts = {"kills": 0, "runs": 0, "acknowledged": 0, "lost": 0, "double": 0, "different": 0}
    search(folder / "warm", NUM_TRIALS, SECONDS)  # what is imported late shall not count
    began = time.monotonic()
    whole = search(folder / "whole", NUM_TRIALS, SECONDS)
    took = time.monotonic() - began
    wanted = [(whole / name).read_bytes() for name in ("journal.jsonl", "summary.json")]
    while counts["kills"] < num_kills:
        runs, acknowledged = folder / f"broken{counts['runs']}", []
        while not (runs / "run" / "summary.json").exists():
            pid, said = start(runs)
            if counts["kills"] < num_kills:
                time.sleep(rng.uniform(0, took))
                os.kill(pid, signal.SIGKILL)
            acknowledged += read_all(said)
            status = os.waitpid(pid, 0)[1]
            counts["kills"] += os.WIFSIGNALED(status)
            assert os.WIFSIGNALED(status) or status == 0
        found = [(runs / "run" / name).read_bytes() for name in ("journal.jsonl", "summary.json")]
        final = {json.dumps(record, sort_keys=True) for record in read_records(runs / "run" / "journal.jsonl")[0]}
        counts["runs"] += 1
        counts["acknowledged"] += len(acknowledged)
        counts["lost"] += sum(line not in final for line in acknowledged)
        counts["double"] += len(acknowledged) - len(set(acknowledged))
        counts["different"] += found != wanted
    print(json.dumps(counts))


if __name__ == "__main__":
    main()

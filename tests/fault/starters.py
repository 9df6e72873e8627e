"""Many processes start one line at the same moment: python starters.py FOLDER MODE NUM_ROUNDS NUM_PROCESSES.

Prints a JSON list with one row a round: how many won, how many were told that another process runs, how many run
directories there are, and what else was said. MODE is `plain`; `no_flock` for a file system without the kernel's locks;
`stale` where a process was killed that held the lock of the run, and another one while it made the run directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path

from lcsc.core.digests import value_digest
from lcsc.core.errors import RunError
from lcsc.search.journal import Journal
from lcsc.search.lock import Lock
from lcsc.search.rundir import open_run_dir

INFO = {"name": "toy", "config": {"seed": 0}, "fingerprints": {"bank": "abc"}}
KEY = value_digest([INFO["config"], INFO["fingerprints"]])[:16]


def killed(work):
    """Run `work` in a process that ends without a word."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    os.waitpid(pid, 0)


def leave(runs):
    """What killed processes left: a run with its lock, and a reservation."""
    runs.mkdir()
    killed(lambda: Journal(open_run_dir(runs, None, INFO, lambda _: None)[0].path, lambda _: None))
    killed(lambda: Lock(runs / f".starting-{KEY}", "", lambda _: None).acquire())
    assert (runs / f".starting-{KEY}" / "owner.json").exists()
    assert [path.parent.name for path in runs.glob("*/lock/owner.json")] != []


def started(runs, gate, said, held):
    """One start; says what became of it."""
    os.read(gate, 1)
    try:
        run, _ = open_run_dir(runs, None, INFO, lambda _: None)
        with Journal(run.path, lambda _: None):
            os.write(said, b"won\n")
            os.read(held, 1)  # until all others have tried
    except RunError as error:
        os.write(said, b"told\n" if "another process is running" in str(error) else f"{error}\n".encode())
    except BaseException as error:
        os.write(said, f"{type(error).__name__}: {error}\n".encode())
    os._exit(0)


def play(runs, mode, num):
    """One round."""
    if mode == "stale":
        leave(runs)
    (gate, open_gate), (said_r, said), (held, release) = os.pipe(), os.pipe(), os.pipe()
    pids = []
    for _ in range(num):
        pid = os.fork()
        if not pid:
            os.close(open_gate), os.close(release), os.close(said_r)
            started(runs, gate, said, held)
        pids.append(pid)
    os.close(said), os.close(gate), os.close(held)
    os.close(open_gate)  # all of them read its end now
    said_lines = b""
    while said_lines.count(b"\n") < num:
        said_lines += os.read(said_r, 4096) or b"died\n"
    os.close(release), os.close(said_r)
    for pid in pids:
        os.waitpid(pid, 0)
    lines = said_lines.decode().splitlines()
    left = sorted(path.name for path in runs.rglob("*lock*")) + sorted(path.name for path in runs.glob(".*"))
    others = [line for line in lines if line not in ("won", "told")] + left
    return {"won": lines.count("won"), "told": lines.count("told"), "runs": len(list(runs.iterdir())), "others": others}


def main():
    folder, mode, num_rounds, num = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if mode == "no_flock":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        fcntl.flock = refuse
    print(json.dumps([play(folder / f"round{index}", mode, num) for index in range(num_rounds)]))


if __name__ == "__main__":
    main()

"""A SLURM of one machine: what submitit calls, for its real SLURM executor. State is a folder of files.

`install(folder)` makes the commands sbatch, srun, sacct, scancel and scontrol there; put it into PATH.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


def install(folder):
    """The commands, as files in `folder`."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)


def sbatch(home, script):
    text = Path(script).read_text()
    number = str(100 + len(list(home.glob("*.sbatch"))))
    (home / f"{number}.sbatch").write_text(text)
    array = re.search(r"--array=0-(\d+)", text)
    for index in range(int(array[1]) + 1) if array else [None]:
        launch(home, number, index)
    print(f"Submitted batch job {number}")


def launch(home, number, index):
    name = number if index is None else f"{number}_{index}"
    text = (home / f"{number}.sbatch").read_text()
    log = re.search(r"--output=(.*)", text)[1].replace("%j", number).replace("%A", number).replace("%a", str(index))
    own = {} if index is None else {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(index)}
    env = {**os.environ, **own, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    with open(log.strip().strip("'\""), "a") as out:
        words = ["bash", str(home / f"{number}.sbatch")]
        process = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    (home / f"{name}.pid").write_text(str(process.pid))


def srun(home, *words):
    start = words.index("-u") - 1  # `python -u -m submitit.core._submit`
    os.execvp(words[start], words[start:])


def alive(home, name):
    pid = int((home / f"{name}.pid").read_text())
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def jobs(home, number):
    return [path.stem for path in sorted(home.glob("*.pid")) if path.stem.partition("_")[0] == number.partition("_")[0]]


def sacct(home, *words):
    print("JobID|State|NodeList")
    for number in [words[at + 1] for at, word in enumerate(words) if word == "-j"]:
        for name in jobs(home, number):
            print(f"{name}|{'RUNNING' if alive(home, name) else 'COMPLETED'}|here")


def scancel(home, number, *options):
    signum = getattr(signal, f"SIG{options[-1].removeprefix('SIG')}") if options else signal.SIGKILL
    for name in [number] if "_" in number else jobs(home, number):
        if alive(home, name):
            os.killpg(int((home / f"{name}.pid").read_text()), signum)


def scontrol(home, verb, name):
    number, _, index = name.partition("_")
    launch(home, number, int(index) if index else None)


if __name__ == "__main__":
    here = Path(os.environ["FAKE_SLURM"])
    globals()[sys.argv[1]](here, *sys.argv[2:])

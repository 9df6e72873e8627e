"""What the tests of the Ray engine share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
from helpers_cli import TOY

from lcsc.cli.train import train
from lcsc.config.hydra_app import compose_config
from lcsc.config.schema import SEARCH_SECTIONS
from lcsc.core.digests import canonical_json
from lcsc.core.seeds import Purpose
from lcsc.search.engines.base import Site
from lcsc.search.job import Job
from lcsc.search.setup import build_problem, describe_problem, fingerprints

#: An objective whose evaluations do, image number by image number, what files in the current folder say.
FAULTS = """
import ctypes, os, signal, time
from pathlib import Path


def faulty(model, *, seed, purpose, images):
    n = images.start
    with open("calls", "a") as file:
        file.write(f"{n} {os.getpid()}\\n")
    once, fault = Path(f"once-{n}"), Path(f"fault-{n}")
    if once.exists():
        once.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    how = fault.read_text() if fault.exists() else ""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crash":
        ctypes.string_at(0)
    while how == "hang":
        time.sleep(0.01)
    if how.startswith("wait"):
        time.sleep(float(how[4:]))
    return n + float(model.std_CHW.sum())
"""
SMALL = [*TOY, "search.num_trials=6", "search.num_finalists=1", "search.batch_size=4", "quiet=true"]


def config_of(*words):
    config = compose_config([*SMALL, *words])
    return {key: config[key] for key in SEARCH_SECTIONS}


def ray_processes(folder):
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def enter(folder, patch):
    """Make `folder` the current one, with the toy's checkpoints and the faulty objective."""
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "faults_ray", raising=False)
    train(compose_config(SMALL))
    Path("faults_ray.py").write_text(FAULTS)


def site_of(folder, *words, notes=None):
    faulty = ("objective=function", "objective.function=faults_ray:faulty")
    problem = build_problem(config_of(*(words or faulty)), trust=True)
    prints = json.loads(canonical_json(fingerprints(problem)))
    return Site(problem, describe_problem(problem), prints, folder, (lambda _: None) if notes is None else notes.append)


def job(n, size):
    return Job("score", (0.0,) * size, Purpose.FRESH, (n, n + 1)).named("run", str(n))


def everything(crew, jobs):
    """All results by number, after the first for each; those that came twice are a mistake."""
    number, found = {job.uid: n for n, job in jobs.items()}, {}
    for handed in jobs.values():
        crew.submit(handed)
    while len(found) < len(jobs):
        for result in crew.collect():
            assert number[result.uid] not in found
            found[number[result.uid]] = result
    assert crew.collect(timeout=0) == []
    return found


def calls():
    return [tuple(map(int, line.split())) for line in Path("calls").read_text().splitlines()]

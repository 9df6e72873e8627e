"""The parts of benchmarks/scaling.py that need processes: resuming a long run, and workers that really work."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, spread

from lcsc.core.registry import register

TRIALS, CHECKPOINTS, ROUNDS = 1_000, 100, 3
#: a search whose evaluations are never done here
LONG = [
    "experiment=toy_gaussian", f"trainer.num_checkpoints={CHECKPOINTS}", "searcher=cma", "quiet=true",
    f"search.num_trials={TRIALS + 100}", "search.num_images=64", "search.num_images_select=64",
    "search.num_images_report=64",
]  # fmt: skip
CHILD = """
import json, sys, time
began = float(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import torch, numba, nevergrad, diffusers.models.modeling_utils, lcsc.cli.search, scaling_runs
from lcsc.cli.main import main
scaling_runs.BEGAN[:] = [began, time.time(), time.process_time()]
sys.exit(main(["search", *sys.argv[3:]]))
"""
#: of this process: when it was started, when all was imported, and processor seconds until then
BEGAN: list[float] = []


@register("engine", "simulated_until", source="lcsc")
@dataclasses.dataclass(frozen=True)
class SimulatedUntil:
    """Simulated workers, and an interruption after so many trials."""

    trials: int = TRIALS

    def start(self, site: Any) -> Any:
        """See `Engine.start`."""
        from simulated import Luck, SimulatedCrew

        before = len(list(site.problem.operator.baselines(site.problem.bank)))

        class Interrupted(SimulatedCrew):
            left = before + self.trials

            def collect(self, timeout: float | None = None) -> Any:
                if not self.left:
                    raise KeyboardInterrupt
                results = super().collect(timeout)
                self.left -= len(results)
                return results

        return Interrupted(1, Luck.of([]))


@register("engine", "stopwatch", source="lcsc")
@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """Says when the first evaluation would begin, and ends the process."""

    def start(self, site: Any) -> Any:
        """See `Engine.start`."""
        from lcsc.search.engines.base import Closing

        class First(Closing):
            slots = 1

            def submit(self, job: Any) -> None:
                """See `Crew.submit`."""

            def collect(self, timeout: float | None = None) -> Any:
                took = {"seconds": time.time() - BEGAN[0], "seconds_of_imports": BEGAN[1] - BEGAN[0]}
                busy = {"processor_seconds": time.process_time(), "processor_seconds_of_imports": BEGAN[2]}
                print(json.dumps({**took, **busy, "number": len(trials_of(site))}), flush=True)
                os._exit(0)

        return First()


def trials_of(site: Any) -> list[str]:
    """The lines of the trials in a run's journal."""
    lines = (site.folder / "journal.jsonl").read_text().splitlines()
    return [line for line in lines if '"kind":"trial"' in line]


def child(*words: str) -> subprocess.CompletedProcess[str]:
    """`lcsc search` in a fresh process that knows these engines."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(time.time()), str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def resume_seconds(work: Path) -> dict[str, Any]:
    """From the start of a process to the first evaluation that the journal does not hold."""
    words = [*LONG, f"bank.path={work / 'resume-bank'}", f"run_dir={work / 'resume-run'}"]
    if not (work / "resume-run" / "journal.jsonl").exists():
        done = child(*words, "engine=simulated_until")
        if not (work / "resume-run" / "journal.jsonl").exists():
            raise SystemExit(f"the run to resume could not be made:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = []
    for _ in range(ROUNDS):
        done = child(*words, "engine=stopwatch")
        if not done.stdout.strip().startswith("{"):
            raise SystemExit(f"the run could not be resumed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout))
        assert found[-1]["number"] == TRIALS, found[-1]
    print(found, flush=True)
    times = {name: spread([one[name] for one in found]) for name in found[0] if name != "number"}
    return {"trials": TRIALS, "checkpoints": CHECKPOINTS, "rounds": ROUNDS, **times}


def local_workers(work: Path, jobs: int = 24) -> dict[str, Any] | None:
    """Evaluations of experiment=digits a second with one and two local workers; None where there is no such engine."""
    from lcsc.core import registry

    if "local" not in registry.discover("engine"):
        return None
    problem, site = digits(work)
    vectors = problem.searcher.start(problem.task())
    tasks = [tuple(vectors.ask().vector.tolist()) for _ in range(jobs + 4)]
    (field,) = (
        f.name
        for f in dataclasses.fields(registry.part("engine", "local").cls)
        if f.name in ("workers", "num_workers", "processes")
    )
    rates: dict[int, list[float]] = {1: [], 2: []}
    for round_ in range(ROUNDS):
        for number, seen in rates.items():
            engine = registry.build("engine", {"name": "local", field: number, "threads": 1})
            with engine.start(site) as crew:
                seen.append(rate(crew, tasks, problem.budget.num_images, f"{round_} {number}"))
    speedups = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print("local", rates, speedups, flush=True)
    return {"jobs": jobs, "speedup": spread(speedups), **{f"per_second_{n}": spread(r) for n, r in rates.items()}}


def rate(crew: Any, vectors: list[tuple[float, ...]], num_images: int, name: str) -> float:
    """Evaluations a second, once every worker has done one."""
    from lcsc.core.seeds import Purpose
    from lcsc.search.job import Job

    jobs = [Job("score", v, Purpose.SEARCH, (0, num_images)).named(name, str(i)) for i, v in enumerate(vectors)]

    def do(some: list[Job]) -> None:
        for job in some:
            crew.submit(job)
        waiting = {job.uid for job in some}
        while waiting:
            waiting -= {result.uid for result in crew.collect()}

    do(jobs[:4])
    began = time.monotonic()
    do(jobs[4:])
    return (len(jobs) - 4) / (time.monotonic() - began)


def digits(work: Path) -> tuple[Any, Any]:
    """The digits experiment on checkpoints that are hardly trained: their evaluations cost the same."""
    from lcsc.cli.train import train
    from lcsc.config.hydra_app import compose_config
    from lcsc.config.schema import SEARCH_SECTIONS
    from lcsc.core.digests import canonical_json
    from lcsc.search.engines.base import Site
    from lcsc.search.setup import build_problem, describe_problem, fingerprints
    from lcsc.training.folder import needs_training

    path, folder = work / "local-bank", work / "local-run"
    words = ["trainer.num_steps=20", "trainer.save_every=2", "searcher=random"]
    config = compose_config(["experiment=digits", *words, f"bank.path={path}"])
    if needs_training(path):
        train(config)
    folder.mkdir(exist_ok=True)
    problem = build_problem({key: config[key] for key in SEARCH_SECTIONS})
    problem.bank.load()
    prints = json.loads(canonical_json(fingerprints(problem)))
    return problem, Site(problem, describe_problem(problem), prints, folder, print)

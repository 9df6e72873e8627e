"""The real driver with 1 to 4,096 simulated workers, and what else is promised of engines in numbers.

    python benchmarks/scaling.py [--to benchmarks/results/engines.json] [--work scratch/] [--only PART ...]

workers   overhead, idle share and lost work by number of workers: asynchronous, and in batches as large as the crew
weather   64 workers: evaluations of little spread, without stragglers and deaths, with stragglers, with both
loss      how long throughput suffers when half of 64 workers die at a moment
resume    seconds from the start of a process to the first new evaluation, 1,000 trials x 100 coefficients behind it
local     two local workers on two cores against one on one

A part that is left out keeps the numbers that it has in the file. The driver (search, trials, journal with fsync,
searcher) is the one that users run; workers are those of benchmarks/simulated.py. The driver's time is that of its
processor, and what it waits for the disk: its time on a core of its own, whatever else runs on the machine. Journals
are written under `--work`, so name a folder on the disk that you mean. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import psutil
from machine import circumstances, spread
from scaling_runs import local_workers, resume_seconds
from simulated import (
    DEATHS,
    LEASE,
    MEASURED,
    NARROW,
    RESTART,
    SLOWER,
    STRAGGLERS,
    Coefficients,
    Loss,
    Luck,
    Nothing,
    SimulatedCrew,
)

from lcsc.core.registry import build
from lcsc.search.budget import Budget
from lcsc.search.job import Job
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.searchers.nevergrad import NevergradSession

COEFFICIENTS = 100
SEEDS = (0, 1, 2)
#: workers -> trials and seeds; the large crews are slow to feed, so they get one seed
SIZES = {1: (200, 3), 4: (200, 3), 16: (320, 3), 64: (1024, 3), 256: (1024, 1), 1024: (2048, 1), 4096: (8192, 1)}
#: evaluations of a larger network: the measured seconds times this
LARGE = 60.0
POLICIES = ("asynchronous", "batches")
#: where a trial's milliseconds go
WHERE = {
    "fsync": (os, "fsync"),
    "journal": (Journal, "_append"),
    "ask": (NevergradSession, "ask"),
    "tell": (NevergradSession, "tell"),
    "identity": (Job, "named"),
}


class Clock:
    """Seconds of the processor and of waiting for the disk."""

    def __init__(self) -> None:
        self.waited = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.waited


@contextlib.contextmanager
def stopwatches(clock: Clock) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of every call of what `WHERE` names, while it is entered."""
    seen: dict[str, list[float]] = {name: [] for name in WHERE}
    real = {name: getattr(owner, method) for name, (owner, method) in WHERE.items()}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began, wall, busy = clock(), time.perf_counter(), time.process_time()
            try:
                return real[name](*args, **kwargs)
            finally:
                if name == "fsync":
                    clock.waited += max(0.0, time.perf_counter() - wall - (time.process_time() - busy))
                seen[name].append(1e3 * (clock() - began))

        return call

    try:
        for name, (owner, method) in WHERE.items():
            setattr(owner, method, watched(name))
        yield seen
    finally:
        for name, (owner, method) in WHERE.items():
            setattr(owner, method, real[name])


def drive(
    crew: SimulatedCrew, clock: Clock, work: Path, searcher: str = "cma", batch: int | None = None
) -> dict[str, list[float]]:
    """A whole search by the real driver, its journal in a new folder under `work`; milliseconds by `WHERE`."""
    trials = crew.luck.seconds_AJ.shape[1]
    sizes = {"num_finalists": 3, "num_images_select": 20, "num_images_report": 30}
    budget = Budget(trials, 500, **sizes, batch_size=batch)
    problem = Problem(None, Coefficients(COEFFICIENTS), build("searcher", searcher), Nothing(), budget, 0)  # type: ignore[arg-type]
    with (
        tempfile.TemporaryDirectory(dir=work) as folder,
        Progress("scaling", 0, quiet=True) as progress,
        Journal(Path(folder), print) as journal,
        stopwatches(clock) as seen,
    ):
        Search(problem, journal, progress, crew).run()
    return seen


def figures(crew: SimulatedCrew) -> dict[str, float]:
    """What became of the workers' time and what the driver took; shares until the last proposal was handed in."""
    trials, mean = crew.luck.seconds_AJ.shape[1], crew.luck.mean
    shares = crew.shares(crew.asked_at)
    return {
        "overhead_ms": 1e3 * crew.driver / trials,
        "overhead_share": crew.driver / trials / mean,
        "idle_share": shares["idle"],
        "idle_share_with_the_end": crew.shares(crew.ended_at)["idle"],
        "lost_share": shares["lost"],
        "dead_share": shares["dead"],
        "lost_worker_seconds": crew.lost_seconds(),
        "trials_per_hour": 3600 * shares["useful"] * crew.workers / mean,
        "trials_per_hour_with_the_end": 3600 * trials / crew.ended_at,
    }


def row(
    workers: int, work: Path, policy: str, sizes: tuple[int, int], scale: float, searcher: str = "cma", **luck: Any
) -> dict[str, Any]:
    """One crew under one policy, on the same evaluation times as under the other."""
    trials, seeds = sizes
    found, parts = [], []
    for seed in SEEDS[:seeds]:
        clock = Clock()
        crew = SimulatedCrew(workers, Luck.drawn(trials, seed, scale, **luck), clock=clock)
        seen = drive(crew, clock, work, searcher, workers if policy == "batches" else None)
        found.append(figures(crew))
        parts.append({name: float(np.mean(calls)) for name, calls in seen.items()})
        journal = seen["journal"]
    of = {name: spread([one[name] for one in found]) for name in found[0]}
    ms = {name: spread([one[name] for one in parts]) for name in WHERE}
    ms["journal_calls"] = {"median": float(np.median(journal)), "p95": float(np.quantile(journal, 0.95))}
    head = {"workers": workers, "policy": policy, "searcher": searcher, "trials": trials, "seeds": seeds}
    made = {**head, "mean_evaluation_seconds": crew.luck.mean, **of, "ms_a_call": ms}
    print(json.dumps({**head, **{k: round(v["median"], 5) for k, v in of.items()}}), flush=True)
    return made


def workers_part(work: Path) -> dict[str, Any]:
    """By number of workers, on evaluations of seconds and of minutes."""
    small = [row(n, work, policy, sizes, 1.0) for n, sizes in SIZES.items() for policy in POLICIES]
    small += [row(64, work, "asynchronous", (SIZES[64][0], 1), 1.0, "random")]
    large = [row(n, work, "asynchronous", (SIZES[n][0], 1), LARGE) for n in (64, 256, 1024, 4096)]
    large += [row(64, work, "batches", (SIZES[64][0], 1), LARGE)]
    return {"as_measured": small, f"times_{LARGE:g}": large}


def weather_part(work: Path) -> dict[str, Any]:
    """What of the idle share is whose fault."""
    calm = {"stragglers": 0.0, "deaths": 0.0}
    kinds: dict[str, dict[str, Any]] = {"narrow": {**calm, "measured": NARROW}, "calm": calm}
    kinds |= {"stragglers": {"deaths": 0.0}, "stragglers_and_deaths": {}}
    return {
        name: [row(64, work, policy, (SIZES[64][0], 1), 1.0, **luck) for policy in POLICIES]
        for name, luck in kinds.items()
    }


def loss_part(work: Path, at: float = 60.0, scale: float = 4.0, workers: int = 64) -> dict[str, Any]:
    """Seconds after the loss of half of the workers until 95 % of those that are expected are at work again."""
    found: dict[str, Any] = {"workers": workers, "at": at, "scale": scale}
    trials = int(workers * (at + 150) / (scale * Luck.drawn(10_000, 0).mean))
    for name, back in (("they_come_back", True), ("they_never_come_back", False)):
        times = []
        for seed in SEEDS:
            clock, loss = Clock(), Loss(at, workers // 2, back)
            crew = SimulatedCrew(workers, Luck.drawn(trials, seed, scale), clock=clock, loss=loss)
            drive(crew, clock, work)
            before = np.mean([crew.at_work(t) for t in np.arange(at - 30, at)])
            expected = before if back else before / 2
            after = np.arange(0, min(crew.asked_at - at, 120), 0.5)
            low = [t for t in after if crew.at_work(at + t) < 0.95 * expected and t < 60]
            later = np.mean([crew.at_work(at + t) for t in after if t >= 60]) / expected
            times.append(
                {"seconds": float(low[-1]) + 0.5 if low else 0.0, "share_of_expected_after_60_s": float(later)}
            )
        found[name] = {key: spread([one[key] for one in times]) for key in times[0]}
        print(name, found[name], flush=True)
    return found


PARTS = {
    "workers": workers_part,
    "weather": weather_part,
    "loss": loss_part,
    "resume": resume_seconds,
    "local": local_workers,
}


def numbers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and what was."""
    rows = []

    def add(what: str, value: float, limit: float, below: bool = True) -> None:
        row = {"number": what, "value": value, "target": limit, "is": "below" if below else "at least"}
        rows.append({**row, "reached": value < limit if below else value >= limit})

    for size, table in data.get("workers", {}).get("rows", {}).items():
        (own,) = (r for r in table if (r["workers"], r["policy"], r["searcher"]) == (64, "asynchronous", "cma"))
        journal = own["ms_a_call"]["journal_calls"]
        if size == "as_measured":
            add("journal, ms a trial, median", journal["median"], 10)
            add("journal, ms a trial, 95 % of the calls", journal["p95"], 10)
        add(f"overhead / evaluation time, 64 workers, {size}", own["overhead_share"]["median"], 0.01)
        add(f"idle share, 64 workers, {size}", own["idle_share"]["median"], 0.05)
    if "resume" in data:
        for name in ("seconds", "processor_seconds"):
            add(f"resume to the first new evaluation, {name}", data["resume"]["rows"][name]["median"], 10)
    if "loss" in data:
        for name in ("they_come_back", "they_never_come_back"):
            seconds = data["loss"]["rows"][name]["seconds"]["max"]
            add(f"95 % at work again after losing half, {name}, s", seconds, 60)
    if "local" in data:
        add("two local workers / one", data["local"]["rows"]["speedup"]["median"], 1.7, below=False)
    return rows


def main() -> None:
    """Measure the parts and write them beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "engines.json")
    parser.add_argument("--work", type=Path, default=Path())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        began, load = time.monotonic(), os.getloadavg()[0]
        rows = PARTS[name](options.work.resolve())
        if rows is not None:
            taken = {"seconds": round(time.monotonic() - began, 1), "load_average": load, "disk": disk(options.work)}
            write(options.to, {name: {**circumstances(), **taken, "rows": rows}})
    for line in write(options.to, {}):
        print(f"{line['number']}: {line['value']:.4g}, {line['is']} {line['target']}: {line['reached']}")


def write(to: Path, parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Put parts into the results file, in place of their older selves; what was to be reached."""
    data = {**(json.loads(to.read_text()) if to.exists() else {}), **parts}
    drawn = {"quantiles": MEASURED, "narrow": NARROW, "stragglers": STRAGGLERS, "slower": SLOWER, "deaths": DEATHS}
    data["setting"] = {**drawn, "coefficients": COEFFICIENTS, "lease": LEASE, "restart": RESTART}
    data["numbers"] = numbers(data)
    to.write_text(json.dumps(data, indent=2) + "\n")
    return data["numbers"]


def disk(path: Path) -> str:
    """The file system that a folder lies on."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype


if __name__ == "__main__":
    main()

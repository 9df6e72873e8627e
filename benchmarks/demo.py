"""The demo for several seeds: training, search, ratios and the time of each stage.

    python benchmarks/demo.py --seeds 0 1 2 --to benchmarks/results/demo.json

As `make demo` does, both experiments run at a time, each on half of the processors. Every seed trains its own banks
(initial weights and batches differ) and searches them with its own seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, spread

EXPERIMENTS = ("digits", "digits_consistency")
THREADS = ((os.cpu_count() or 1) + 1) // 2


def measure(seed: int, folder: Path) -> list[dict]:
    """One training and one search of each experiment, at a time; times in seconds, wall clock."""
    began, tasks = time.monotonic(), {}
    for name in EXPERIMENTS:
        places = [f"bank.path={folder / f'bank-{name}-{seed}'}", f"run_dir={folder / f'run-{name}-{seed}'}"]
        words = ["search", f"experiment={name}", f"seed={seed}", "train_if_missing=true", "quiet=true", *places]
        tasks[name] = subprocess.Popen(
            [sys.executable, "-m", "lcsc", *words],
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
            stdout=subprocess.DEVNULL,
        )
    seconds: dict[str, float] = {}
    while len(seconds) < len(tasks):
        time.sleep(0.1)
        for name in [n for n, task in tasks.items() if n not in seconds and task.poll() is not None]:
            seconds[name] = time.monotonic() - began
            if tasks[name].returncode:
                sys.exit(f"{name} ended with exit code {tasks[name].returncode}")
    return [row(name, seed, folder / f"run-{name}-{seed}", seconds[name]) for name in EXPERIMENTS]


def row(experiment: str, seed: int, path: Path, seconds: float) -> dict:
    """Result and times of one experiment; `train` holds the start of the program too."""
    summary = json.loads((path / "summary.json").read_text())
    stages: dict[str, float] = {}
    kinds = [json.loads(line)["kind"] for line in (path / "journal.jsonl").read_text().splitlines()]
    for line in (path / "timing.jsonl").read_text().splitlines():
        timing = json.loads(line)
        stages[kinds[timing["seq"]]] = stages.get(kinds[timing["seq"]], 0.0) + timing["seconds"]
    search = summary["wall_seconds"]
    return {
        "experiment": experiment,
        "seed": seed,
        "seconds": {"all": seconds, "search": search, "train": seconds - search, "stages": stages},
        **{key: summary[key] for key in ("report", "floor", "nfe", "num_trials", "num_coefficients", "images_sampled")},
    }


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/demo.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for seed in args.seeds for row in measure(seed, Path(folder))]
    table = {
        name: {
            "ratio": spread([row["report"]["ratio"] for row in rows if row["experiment"] == name]),
            **{
                f"{part}_seconds": spread([row["seconds"][part] for row in rows if row["experiment"] == name])
                for part in ("train", "search")
            },
        }
        for name in EXPERIMENTS
    }
    ends = {seed: max(row["seconds"]["all"] for row in rows if row["seed"] == seed) for seed in args.seeds}
    table["demo_seconds"] = spread(list(ends.values()))
    args.to.parent.mkdir(parents=True, exist_ok=True)
    args.to.write_text(
        json.dumps(
            {**circumstances(), "threads_each": THREADS, "seeds": args.seeds, "table": table, "runs": rows}, indent=2
        )
        + "\n"
    )
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()

"""The demo for several seeds: training, search, ratios and the time of each stage.

    python benchmarks/demo.py --seeds 0 1 2 --to benchmarks/results/demo.json

Every seed trains its own banks (initial weights and batches differ) and searches them with its own seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, spread

from lcsc.cli.search import search
from lcsc.cli.train import train
from lcsc.config.hydra_app import compose_config

EXPERIMENTS = ("digits", "digits_consistency")


def measure(experiment: str, seed: int, folder: Path) -> dict:
    """One training and one search; times in seconds, wall clock."""
    places = [f"bank.path={folder / f'bank-{experiment}-{seed}'}", f"runs_dir={folder / 'runs'}"]
    config = compose_config([f"experiment={experiment}", f"seed={seed}", *places])
    began = time.monotonic()
    train(config)
    trained = time.monotonic()
    path = search(config, f"benchmarks/demo.py seed={seed}")
    searched = time.monotonic()
    summary = json.loads((path / "summary.json").read_text())
    stages: dict[str, float] = {}
    kinds = [json.loads(line)["kind"] for line in (path / "journal.jsonl").read_text().splitlines()]
    for line in (path / "timing.jsonl").read_text().splitlines():
        row = json.loads(line)
        stages[kinds[row["seq"]]] = stages.get(kinds[row["seq"]], 0.0) + row["seconds"]
    return {
        "experiment": experiment,
        "seed": seed,
        "seconds": {"train": trained - began, "search_and_report": searched - trained, "stages": stages},
        **{key: summary[key] for key in ("report", "floor", "nfe", "num_trials", "num_coefficients", "images_sampled")},
    }


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/demo.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, seed, Path(folder)) for seed in args.seeds for name in EXPERIMENTS]
    table = {
        name: {
            "ratio": spread([row["report"]["ratio"] for row in rows if row["experiment"] == name]),
            "train_seconds": spread([row["seconds"]["train"] for row in rows if row["experiment"] == name]),
            "search_seconds": spread(
                [row["seconds"]["search_and_report"] for row in rows if row["experiment"] == name]
            ),
        }
        for name in EXPERIMENTS
    }
    args.to.parent.mkdir(parents=True, exist_ok=True)
    args.to.write_text(
        json.dumps({**circumstances(), "seeds": args.seeds, "table": table, "runs": rows}, indent=2) + "\n"
    )
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()

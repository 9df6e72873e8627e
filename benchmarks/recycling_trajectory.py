"""LCSC on a language model's own trajectory: searched coefficients against last, EMA and WSM on held-out text.

    python benchmarks/recycling_trajectory.py --seeds 0 1 2 --to benchmarks/results/recycling_trajectory.json

Every seed trains its own bank of the experiment `tiny_lm` and searches it with its own seeds. All scores are on the
text's report half, which neither training nor search saw, and the baselines are tuned on the same search half as the
winner.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, mean_se

#: the families of interest; `wsm` merges the last checkpoints with the weights of a decay
FAMILIES = ("last", "ema", "power_ema", "wsm", "uniform", "best_single")


def start(seed: int, folder: Path) -> subprocess.Popen:
    """One training and one search; the same call goes on where it was interrupted."""
    places = [f"bank.path={folder / f'bank-{seed}'}", f"run_dir={folder / f'run-{seed}'}"]
    words = ["search", "experiment=tiny_lm", f"seed={seed}", "train_if_missing=true", "quiet=true", *places]
    return subprocess.Popen(
        [sys.executable, "-m", "lcsc", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )


def row(seed: int, folder: Path) -> dict:
    """Losses of one seed in nats a byte."""
    path = folder / f"run-{seed}"
    summary, text = json.loads((path / "summary.json").read_text()), json.loads((path / "run.json").read_text())
    report = summary["report"]
    return {
        "seed": seed,
        "data_digest": text["fingerprints"]["evaluator"]["data_digest"],
        "lcsc": report["best"],
        **{name: report["baselines"][name] for name in FAMILIES},
        "best_baseline": report["best_baseline"],
        **{key: summary[key] for key in ("num_trials", "num_checkpoints", "num_coefficients", "image_forwards")},
    }


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keeps banks and runs, and goes on with what is there")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/recycling_trajectory.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        folder = args.folder or Path(spare)
        for task in [start(seed, folder) for seed in args.seeds]:
            if task.wait():
                sys.exit(f"{task.args} ended with exit code {task.returncode}")
        rows = [row(seed, folder) for seed in args.seeds]
    table = {name: mean_se([row[name]["value"] for row in rows]) for name in ("lcsc", *FAMILIES)}
    gains = {name: mean_se([row[name]["value"] - row["lcsc"]["value"] for row in rows]) for name in FAMILIES}
    result = {**circumstances(), "seeds": args.seeds, "loss_nats": table, "lcsc_gain_nats": gains, "runs": rows}
    args.to.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"loss_nats": table, "lcsc_gain_nats": gains}, indent=2))


if __name__ == "__main__":
    main()

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, mean_se

#: the families of interest; `wsm` merges the last checkpoints with the weights of a decay
FAMILIES = ("last", "ema", "power_ema", "wsm", "uniform", "best_single")
NAMES = {
    "last": "last checkpoint",
    "wsm": "WSM (minus-sqrt), tuned",
    "ema": "EMA, tuned",
    "power_ema": "power EMA, tuned",
    "uniform": "mean of the last few, tuned",
}


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


def figure(result: Mapping[str, Any]) -> bytes:
    """A PNG: by how much each family's loss lies above the searched one, a dot for each seed."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from lcsc.report.style import FAINT, GROUP_COLORS, INK, new_figure, png, styled, subtitle

    @styled
    def draw() -> Any:
        picture = new_figure(3.4, "What searched coefficients are ahead of")
        subtitle(picture, "tiny_lm, loss of the report half above that of the searched model; bars ± 1 SE over seeds")
        ax = picture.add_axes((0.29, 0.17, 0.68, 0.58))
        for place, name in enumerate(NAMES):
            gain = result["lcsc_gain_nats"][name]
            ax.errorbar(gain["mean"], place, xerr=gain["se"], fmt="none", ecolor=INK, elinewidth=1.5, capsize=4)
            for row, color in zip(result["runs"], GROUP_COLORS, strict=False):
                above = row[name]["value"] - row["lcsc"]["value"]
                label = None if place else f"seed {row['seed']}"
                ax.plot(above, place, "o", color=color, markersize=6, alpha=0.8, label=label)
        ax.set_xscale("log")
        ax.set_xticks([0.005, 0.01, 0.02, 0.05, 0.1])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(NAMES)), list(NAMES.values()))
        ax.invert_yaxis()
        ax.set_xlabel("nats a byte above the searched model (log scale)")
        ax.grid(axis="x", color=FAINT, alpha=0.3)
        ax.legend(loc="lower right")
        return picture

    return png(draw())


def main() -> None:
    """Measure, then write the results file and its figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keeps banks and runs, and goes on with what is there")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/recycling_trajectory.json"))
    parser.add_argument("--figure", type=Path, help="a PNG of it")
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
    if args.figure:
        args.figure.write_bytes(figure(result))
    print(json.dumps({"loss_nats": table, "lcsc_gain_nats": gains}, indent=2))


if __name__ == "__main__":
    main()

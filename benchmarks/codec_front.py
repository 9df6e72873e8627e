"""Bits that a search gave to the parts of a small language model, beside the same bits everywhere.

    python benchmarks/codec_front.py --seed 0 --work codec_work --to codec_front.json

Trains the bank of experiment=codec_small, searches at several means, and scores every result on the report half as it
is, and after 10 and 50 steps of continued training from a new optimizer: the change against the exact checkpoint
trained alike. Each piece is saved when it is done, and the same line goes on with the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from codec_search import evaluator_of
from machine import circumstances
from search_honesty import problem
from search_honesty import searched as search_of
from searches import bank

from lcsc.core.files import write_json
from lcsc.core.seeds import Purpose
from lcsc.operators.base import Candidate
from lcsc.operators.compress import WIDTHS, Compress

MEANS = (4, 3, 5)
AFTER = (0, 10, 50)
IMAGES = range(352)


class Front:
    """One seed, piece by piece."""

    def __init__(self, row: dict, seed: int, work: Path, trials: int, steps: int) -> None:
        self.row, self.trials = row, trials
        words = ["experiment=codec_small", f"seed={seed}", f"trainer.num_steps={steps}"]
        self.place = work / f"codec-front-{seed}-{steps}"
        self.train_words, self.words = words, [*words, f"bank.path={self.place}"]

    def pieces(self) -> dict[str, Callable[[], None]]:
        """By name, in order."""
        found: dict[str, Callable[[], None]] = {"train": self.train}
        plain = ["exact", *(f"uniform {width}" for width in WIDTHS)]
        found |= {f"after/0/{name}": functools.partial(self.score, 0, name) for name in plain}
        for mean in MEANS:
            found[f"search/{mean}"] = functools.partial(self.search, mean)
            found[f"after/0/searched {mean}"] = functools.partial(self.score, 0, f"searched {mean}")
        for steps in AFTER[1:]:
            for name in ("exact", *(f"{kind} {mean}" for mean in MEANS for kind in ("uniform", "searched"))):
                found[f"after/{steps}/{name}"] = functools.partial(self.score, steps, name)
        return found

    def train(self) -> None:
        """The bank."""
        bank(self.train_words, self.place)

    def search(self, mean: int) -> None:
        """Where bits go that are `mean` on average."""
        _, records = search_of(problem([*self.words, f"operator.mean_bits={mean}", f"search.num_trials={self.trials}"]))
        best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
        self.row.setdefault("found", {})[f"searched {mean}"] = best["bits"]

    def score(self, steps: int, name: str) -> None:
        """Loss on the report half after so many steps, and what it is above the exact one's."""
        more = ["objective=uptrained_loss", f"objective.num_steps={steps}"] if steps else []
        evaluator = evaluator_of([*self.words, *more])
        made = self.candidate(evaluator.bank, name)
        score = evaluator.objective(made, seed=0, purpose=Purpose.REPORT, images=IMAGES, full=True)
        own = self.row.setdefault("scores", {}).setdefault(name, {"after": {}})
        own |= {key: made.recipe[key] for key in ("bits", "file_bytes", "ratio") if key in made.recipe}
        own["after"][str(steps)] = {"loss": score.value, "se": score.se}
        own["after"][str(steps)]["change"] = score.value - self.row["scores"]["exact"]["after"][str(steps)]["loss"]

    def candidate(self, bank_: object, name: str) -> Candidate:
        """By its name."""
        operator = Compress()
        if name == "exact":
            row_P = bank_.matrix()[-1]
            return Candidate(bank_.arch, bank_.layout, lambda out: out.copy_(row_P), {}, bank_.constants)
        G = len(operator.groups(bank_))
        bits = self.row["found"][name] if name.startswith("searched") else [int(name.split()[1])] * G
        floats = np.array([(WIDTHS.index(width) + 0.5) / len(WIDTHS) for width in bits])
        return operator.apply(bank_, {"bits": floats})


def draw(results: dict, to: Path) -> None:
    """Change of the loss against bytes, searched bits beside uniform ones, a panel for each number of steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(AFTER), figsize=(11, 3.6), constrained_layout=True)
    for ax, steps in zip(axes, AFTER, strict=True):
        for kind, color, mark in (("uniform", "#888888", "s"), ("searched", "#1f77b4", "o")):
            for row in results["seeds"]:
                points = sorted(
                    (own["file_bytes"] / 1e3, 1e3 * own["after"][str(steps)]["change"])
                    for name, own in row["scores"].items()
                    if name.startswith(kind) and str(steps) in own["after"]
                )
                label = f"{kind} bits" if row is results["seeds"][0] else None
                ax.plot(*zip(*points, strict=True) if points else ((), ()), f"{mark}-", color=color, label=label, lw=1)
        ax.axhline(0, color="#bbbbbb", lw=0.8)
        ax.set_title(f"after {steps} steps" if steps else "as it is read back", fontsize=10)
        ax.set_xlabel("kB of a coded checkpoint, anchors included")
    axes[0].set_ylabel("change of the loss, 1/1000 nat")
    axes[0].legend(frameon=False)
    figure.savefig(to, dpi=110)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("codec_work"), help="folder of the bank")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further piece after this time")
    parser.add_argument("--draw", type=Path, help="draw the figure of the results file, and measure nothing")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.to.read_text()), args.draw)
        return
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.to.read_text()) if args.to.exists() else {**circumstances(), "seeds": []}
    row = next((row for row in results["seeds"] if row["seed"] == args.seed), None)
    if row is None:
        row = {"seed": args.seed, "done": {}, "trials": args.trials, "steps": args.steps}
        results["seeds"].append(row)
    started = time.perf_counter()
    for name, make in Front(row, args.seed, args.work, args.trials, args.steps).pieces().items():
        if name in row["done"]:
            continue
        if time.perf_counter() - started > args.seconds:
            sys.exit(3)  # the same line goes on
        began = time.process_time()
        make()
        row["done"][name] = time.process_time() - began
        write_json(args.to, results)


if __name__ == "__main__":
    main()

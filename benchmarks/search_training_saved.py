"""How much training a search saves: when does LCSC over the checkpoints so far equal the best EMA of the full run?

    python benchmarks/search_training_saved.py --work scratch/ [--seeds 0 1 2] [--steps 8000]

A consistency model at 1 network evaluation, one long run for each seed. The aim is the best of the full run's EMAs
(exponential and power-function ones of many lengths, over all its checkpoints, tuned on the search seeds). Then the
descent searches the checkpoints up to an early step; the earliest step whose winner is at least as good gives the
factor. Costs are image-forwards: a training step of B images takes 4 B (the target's forward pass,
the network's, and a backward pass that counts two); a search takes what it took. Scores are of the report seeds and the
report half. The same line continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from searches import bank, run, write

EXPERIMENT, BATCH, SAVE_EVERY, NUM_CHECKPOINTS = "digits_consistency", 128, 20, 40
STOPS = (100, 200, 300, 400, 600, 800, 1200, 1600)
EMAS = ("ema", "power_ema")


def early(words: list[str], stop: int, target: Path) -> dict:
    """The search over at most 40 checkpoints up to a step."""
    every = max(1, stop // SAVE_EVERY // NUM_CHECKPOINTS)
    return run([*words, f"bank.stop={stop}", f"bank.every={every}"], target)


def measure(seed: int, steps: int, work: Path) -> dict:
    """One training run, its EMAs, and searches of growing prefixes until one is good enough."""
    train = [f"trainer.num_steps={steps}", f"trainer.save_every={SAVE_EVERY}"]
    words = [f"experiment={EXPERIMENT}", f"seed={seed}", *train]
    place = bank(words, work / f"bank-long-{EXPERIMENT}-{steps}-{seed}")
    words.append(f"bank.path={place}")
    one = ["searcher=one_plus_one", "search.num_trials=1", "search.num_finalists=1", "search.num_images=1000"]
    full = run([*words, *one], work / f"full-{steps}-{seed}")
    name = min((e for e in EMAS if e in full["baselines"]), key=lambda e: full["baselines"][e]["value"])
    aim, cost = full["baselines"][name], 4 * BATCH * steps
    row = {"seed": seed, "best_ema_of_full_run": aim, "image_forwards_of_full_run": cost, "early": {}}
    for stop in (stop for stop in STOPS if stop < steps):
        found = early(words, stop, work / f"early-{steps}-{seed}-{stop}")
        spent = 4 * BATCH * stop + found["image_forwards_of_search"]
        row["early"][str(stop)] = {**found, "image_forwards_with_training": spent}
        if found["value"] <= aim["value"]:
            factors = {"factor_in_steps": steps / stop, "factor_with_search": cost / spent}
            return {**row, "reached_at": stop, **factors}
    return {**row, "reached_at": None, "factor_in_steps": None, "factor_with_search": None}


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/search_training_saved.json"))
    args = parser.parse_args()
    rows = [measure(seed, args.steps, args.work) for seed in args.seeds]
    keys = ("seed", "reached_at", "factor_in_steps", "factor_with_search")
    table = [{key: row[key] for key in keys} | {"best_ema": row["best_ema_of_full_run"]} for row in rows]
    write(args.to, seeds=args.seeds, steps=args.steps, target_factor=23, table=table, runs=rows)


if __name__ == "__main__":
    main()

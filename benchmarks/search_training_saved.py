"""How much training a search saves: when does LCSC over the checkpoints so far equal the best EMA of the full run?

    python benchmarks/search_training_saved.py --work scratch/ [--seeds 0 1 2] [--steps 8000]
    python benchmarks/search_training_saved.py --work scratch/ --experiment mnist16_consistency --mnist mnist.npz
    python benchmarks/search_training_saved.py --work scratch/ --experiment cifar10_consistency --seeds 0 \
        --cifar10 made/ --data train.parquet   # `made/` as scripts/reproduce/cifar10.sh wrote it

Consistency models at 1 network evaluation, one long run for each seed. The aim is the best of the full run's EMAs
(exponential and power-function ones of many lengths, over all its checkpoints, tuned on the search seeds). Then the
descent searches the checkpoints up to an early step; the earliest step whose winner is at least as good gives the
factor. Costs are image-forwards: a training step of B images takes 4 B (the target's forward pass,
the network's, and a backward pass that counts two); a search takes what it took. Scores are of the report seeds and the
report half.

Two answers: `early` searches what one long run had saved by then, as the paper does. `planned` searches the checkpoints
of a run that was meant to be that short, so that a schedule that depends on the length (the consistency trainer's
number of noise levels) has come to its end. The same line continues; other rows of the results file
are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances
from searches import bank, run, words_of, write

BATCHES = {"digits_consistency": 128, "mnist16_consistency": 64, "cifar10_consistency": 256}
SAVE_EVERY, NUM_CHECKPOINTS, NUM_TRIALS = 20, 40, 60
STOPS = (100, 200, 300, 400, 600, 800, 1200, 1600)
EMAS = ("ema", "power_ema")


def early(words: list[str], stop: int, save_every: int, trials: int, target: Path) -> dict:
    """The search over at most 40 checkpoints up to a step."""
    every = max(1, stop // save_every // NUM_CHECKPOINTS)
    return run([*words, f"bank.stop={stop}", f"bank.every={every}", f"search.num_trials={trials}"], target)


def long_bank(experiment: str, seed: int, args: argparse.Namespace) -> tuple[list[str], int, int]:
    """Words that name the long run's bank, its steps and how often it saved."""
    if experiment.startswith("cifar10"):
        made = args.cifar10.resolve()
        place, weights = made / "banks" / experiment, made / "detector.safetensors"
        trainer = json.loads((place / "train.json").read_text())["config"]["trainer"]
        words = [f"experiment={experiment}", f"seed={seed}", f"bank.path={place}"]
        words += [f"dataset.path={args.data.resolve()}", f"metric.weights_path={weights}"]
        return words, trainer["num_steps"], trainer["save_every"]
    steps, batch = args.steps, BATCHES[experiment]
    train = [f"trainer.num_steps={steps}", f"trainer.save_every={SAVE_EVERY}", f"trainer.batch_size={batch}"]
    words = [*words_of(experiment, seed, args.work, args.mnist), *train]
    place = bank(words, args.work / f"bank-long-{experiment}-{steps}-{seed}")
    return [*words, f"bank.path={place}"], steps, SAVE_EVERY


def measure(experiment: str, seed: int, args: argparse.Namespace) -> dict:
    """One training run, its EMAs, and searches of growing prefixes until one is good enough."""
    words, steps, save_every = long_bank(experiment, seed, args)
    name = f"{experiment}-{steps}-{seed}"
    one = ["searcher=one_plus_one", "search.num_trials=1", "search.num_finalists=1", "search.num_images=1000"]
    full = run([*words, *one], args.work / f"full-{name}")
    aim = min((full["baselines"][e] for e in EMAS if e in full["baselines"]), key=lambda row: row["value"])
    cost = 4 * BATCHES[experiment] * steps
    row = {"experiment": experiment, "seed": seed, "num_steps": steps, "image_forwards_of_full_run": cost}
    row |= {"num_trials": args.trials, "best_ema_of_full_run": aim, "baselines_of_full_run": full["baselines"]}

    def so_far(stop: int) -> dict:
        return early(words, stop, save_every, args.trials, args.work / f"early-{name}-{stop}-{args.trials}")

    if "early" in args.ways:
        row["early"] = reached(so_far, [stop for stop in args.stops if 2 * save_every <= stop < steps], row)
    if "planned" in args.ways and not experiment.startswith("cifar10"):
        row["planned"] = reached(lambda stop: planned(experiment, seed, stop, args), args.stops, row)
    return row


def planned(experiment: str, seed: int, stop: int, args: argparse.Namespace) -> dict:
    """The search over the checkpoints of a run of so many steps, about 40 of them."""
    every, batch = max(1, stop // NUM_CHECKPOINTS), BATCHES[experiment]
    train = [f"trainer.num_steps={stop}", f"trainer.save_every={every}", f"trainer.batch_size={batch}"]
    words = [*words_of(experiment, seed, args.work, args.mnist), *train, f"search.num_trials={args.trials}"]
    place = bank(words, args.work / f"bank-planned-{experiment}-{stop}-{seed}")
    return run([*words, f"bank.path={place}"], args.work / f"planned-{experiment}-{stop}-{seed}-{args.trials}")


def reached(find: Callable[[int], dict], stops: Sequence[int], row: dict) -> dict:
    """Searches after more and more steps, until one is as good as the full run's best EMA; what it cost then."""
    cost, steps, aim = row["image_forwards_of_full_run"], row["num_steps"], row["best_ema_of_full_run"]["value"]
    found: dict[str, Any] = {"searches": {}, "at": None, "factor_in_steps": None, "factor_with_search": None}
    for stop in stops:
        result = find(stop)
        spent = 4 * BATCHES[row["experiment"]] * stop + result["image_forwards_of_search"]
        found["searches"][str(stop)] = {**result, "image_forwards_with_training": spent}
        if result["value"] <= aim:
            return {**found, "at": stop, "factor_in_steps": steps / stop, "factor_with_search": cost / spent}
    return found


def key_of(row: dict) -> tuple:
    """What a row of the results is about."""
    return row["experiment"], row["seed"], row["num_steps"], row.get("num_trials", NUM_TRIALS)


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--experiment", default="digits_consistency", choices=sorted(BATCHES))
    parser.add_argument("--mnist", type=Path, help="npz file of MNIST")
    parser.add_argument("--cifar10", type=Path, help="folder of scripts/reproduce/cifar10.sh")
    parser.add_argument("--data", type=Path, help="parquet file of CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=["early", "planned"], choices=["early", "planned"])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stops", type=int, nargs="+", default=STOPS, help="lengths of short runs, shortest first")
    parser.add_argument("--trials", type=int, default=NUM_TRIALS, help="steps of each descent")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/search_training_saved.json"))
    args = parser.parse_args()
    where = {key: circumstances()[key] for key in ("machine", "commit")}
    rows = [where | measure(args.experiment, seed, args) for seed in args.seeds]
    mine = {key_of(row) for row in rows}
    old = json.loads(args.to.read_text()) if args.to.exists() else {"runs": []}
    known = {"num_trials": NUM_TRIALS, **{key: old.get(key) for key in where}}  # of rows from before they said so
    rows = [known | row for row in old["runs"] if key_of(row) not in mine] + rows
    keys = ("experiment", "seed", "num_steps", "num_trials", "best_ema_of_full_run")
    table = [
        {key: row[key] for key in keys}
        | {way: {k: v for k, v in row[way].items() if k != "searches"} for way in ("early", "planned") if way in row}
        for row in rows
    ]
    write(args.to, target_factor=23, table=table, runs=rows)


if __name__ == "__main__":
    main()

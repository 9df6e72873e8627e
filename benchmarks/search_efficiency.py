"""How many image-forwards a searcher needs to reach the final report score of the paper's evolutionary search.

    python benchmarks/search_efficiency.py --work scratch/ [--seeds 0 1 2] [--only NAME ...]
    python benchmarks/search_efficiency.py --work scratch/ --experiment mnist16 --mnist mnist.npz

Every training seed has its own bank, and every contestant is a whole search of it: floor, baselines, trials, selection
on fresh seeds, report on the other half of the reference. The same line continues after an interruption; `--only` runs
some contestants now, and whatever is finished under `--work` goes into the table. An image-forward is one network
evaluation of one image; a backward pass counts two. The final report is measurement, not search: it is not counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from machine import spread
from searches import bank, result, run, words_of, write

EVOLUTION = "lcsc_evolution"
#: Budget of the paper's search: (trials, images a trial). The issue's size on digits, less where images cost more.
EVOLUTION_BUDGET = {"digits": (2000, 1000), "mnist16": (400, 1000)}
GRADIENT_STEPS = (20, 40, 60, 160)
#: Searchers at about the cost of 50 steps of the descent: (names, trials of 250 images each).
SMALL = (
    (("lcsc_evolution", "cma", "diagonal_cma", "de", "two_points_de", "pso", "one_plus_one", "tbpsa", "random"), 160),
    (("lbfgs", "hybrid", "ladder"), 60),
)
TARGET = 1 / 30


def contestants(experiment: str) -> dict[str, list[str]]:
    """Overrides by name. All select among ten finalists or fewer on the same select seeds."""
    trials, images = EVOLUTION_BUDGET[experiment]
    black_box = {EVOLUTION: (trials, images), "cma": (trials * 2 // 5, images // 2)}
    rows = {
        name: [f"searcher={name}", f"search.num_trials={n}", f"search.num_images={m}", "search.num_finalists=10"]
        for name, (n, m) in black_box.items()
    }
    for steps in GRADIENT_STEPS:
        rows[f"gradient_{steps}"] = ["searcher=gradient", f"search.num_trials={steps}"]
    for names, trials in SMALL:
        for name in names:
            rows[f"{name}_{trials}"] = [f"searcher={name}", f"search.num_trials={trials}", "search.num_images=250"]
    return rows


def tabulate(rows: dict[int, dict[str, dict]]) -> dict:
    """Means over the seeds, and what each seed's descent needs to reach its evolutionary search."""
    names = [name for name in next(iter(rows.values())) if all(name in found for found in rows.values())]
    table = {}
    for name in names:
        values = np.array([found[name]["value"] for found in rows.values()])
        table[name] = {
            "report_score": spread(values.tolist()),
            "standard_error_over_seeds": float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
            "ratio_to_best_baseline": spread([found[name]["ratio_to_best_baseline"] for found in rows.values()]),
            "image_forwards": spread([found[name]["image_forwards_of_search"] for found in rows.values()]),
            "seconds": spread([found[name]["seconds"] for found in rows.values()]),
        }
    reached = {}
    for seed, found in rows.items():
        if EVOLUTION not in found:
            continue
        wanted, cost = found[EVOLUTION]["value"], found[EVOLUTION]["image_forwards_of_search"]
        steps = [n for n in GRADIENT_STEPS if f"gradient_{n}" in found and found[f"gradient_{n}"]["value"] <= wanted]
        first = found[f"gradient_{min(steps)}"]["image_forwards_of_search"] if steps else None
        reached[str(seed)] = {
            "score_to_reach": wanted,
            "steps": min(steps, default=None),
            "image_forwards": first,
            "share": first and first / cost,
            "target_share": TARGET,
        }
    return {"by_contestant": table, "descent_reaches_evolution": reached}


def main() -> None:
    """Run what is missing, then write the table of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--experiment", default="digits", choices=sorted(EVOLUTION_BUDGET))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--mnist", type=Path, help="npz file of MNIST")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    known, rows = contestants(args.experiment), {seed: {} for seed in args.seeds}
    for name, overrides in known.items():
        for seed in args.seeds:
            target = args.work / f"{args.experiment}-{seed}-{name}"
            if args.only is None or name in args.only:
                words = words_of(args.experiment, seed, args.work, args.mnist)
                place = bank(words, args.work / f"bank-{args.experiment}-{seed}")
                rows[seed][name] = run([*words, f"bank.path={place}", *overrides], target)
            elif (target / "summary.json").exists():
                rows[seed][name] = result(target)
    to = args.to or Path(f"benchmarks/results/search_efficiency_{args.experiment}.json")
    write(to, experiment=args.experiment, seeds=args.seeds, contestants=known, **tabulate(rows), runs=rows)


if __name__ == "__main__":
    main()

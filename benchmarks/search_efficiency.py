"""How many image-forwards a searcher needs to reach the final report score of the paper's evolutionary search.

    python benchmarks/search_efficiency.py --work scratch/ [--seeds 0 1 2] [--only NAME ...]
    python benchmarks/search_efficiency.py --work scratch/ --experiment mnist16 --mnist mnist.npz

Every training seed has its own bank, and every contestant is a whole search of it: floor, baselines, trials, selection
on fresh seeds, report on the other half of the reference. The same line continues after an interruption; `--only` runs
some contestants now, and whatever is finished under `--work` goes into the table. An image-forward is one network
evaluation of one image; a backward pass counts two. The final report is measurement, not search: it is not counted. Nor
is the second look at baselines that turn out not to be the winner's rival, but for the numbers called `in_full`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from searches import by_contestant, contest, contest_arguments, write

EVOLUTION = "lcsc_evolution"
#: Budget of the paper's search: (trials, images a trial). The issue's size on digits, less where images cost more.
EVOLUTION_BUDGET = {"digits": (2000, 1000), "mnist16": (2000, 500)}
GRADIENT_STEPS = (20, 40, 60, 160)
BLACK_BOX = ["search.num_finalists=10", "search.num_images_baselines=null"]
#: The descent of before: all images in the baselines' first look too.
WHOLE = ["searcher=gradient", "search.num_images_baselines=null"]
LOOK = ["searcher=gradient", "search.num_images_baselines=80"]
SMALL = ["searcher=gradient_small", "search.num_images_baselines=60", "search.num_finalists=3"]
#: Descents by name: their overrides and numbers of steps.
DESCENTS = {
    "gradient": (WHOLE, GRADIENT_STEPS),
    "look": (LOOK, (40, 160)),
    "small": (SMALL, (112, 240, 620)),  # 620 are what a thirtieth of the evolution on digits pays for
    "lean": ([*SMALL, "search.num_images_select=380"], (240,)),  # a thirtieth of the evolution on MNIST in full
    "half_length": ([*SMALL, "searcher.step_size=0.15"], (620,)),
    "double_length": ([*SMALL, "searcher.step_size=0.6"], (620,)),
}
TARGET = 1 / 30


def contestants(experiment: str) -> dict[str, list[str]]:
    """Overrides by name. All select among ten finalists or fewer on the same select seeds."""
    trials, images = EVOLUTION_BUDGET[experiment]
    black_box = {EVOLUTION: (trials, images), "cma": (trials * 2 // 5, images // 2)}
    rows = {
        name: [f"searcher={name}", f"search.num_trials={n}", f"search.num_images={m}", *BLACK_BOX]
        for name, (n, m) in black_box.items()
    }
    for name, (words, all_steps) in DESCENTS.items():
        rows |= {f"{name}_{steps}": [*words, f"search.num_trials={steps}"] for steps in all_steps}
    return rows


def reached(rows: dict[int, dict[str, dict]], kind: str = "image_forwards_of_search") -> dict[str, dict]:
    """What each seed's descent needs to reach its evolutionary search: the cheapest one that ends as low."""
    table = {}
    for seed, found in rows.items():
        if EVOLUTION not in found:
            continue
        wanted, cost = found[EVOLUTION]["value"], found[EVOLUTION][kind]
        costs = {name: row[kind] for name, row in found.items() if name.rpartition("_")[0] in DESCENTS}
        there = [name for name in costs if found[name]["value"] <= wanted]
        best = min(there, key=lambda name: costs[name], default=None)
        table[str(seed)] = {
            "score_to_reach": wanted,
            "contestant": best,
            "steps": best and int(best.rpartition("_")[2]),
            "image_forwards": best and costs[best],
            "share": best and costs[best] / cost,
            "target_share": TARGET,
        }
    return table


def main() -> None:
    """Run what is missing, then write the table of what is finished."""
    args = contest_arguments(__doc__, EVOLUTION_BUDGET)
    known = contestants(args.experiment)
    rows = contest(known, args)
    to = args.to or Path(f"benchmarks/results/search_efficiency_{args.experiment}.json")
    tables = {"by_contestant": by_contestant(rows), "descent_reaches_evolution": reached(rows)}
    tables["descent_reaches_evolution_in_full"] = reached(rows, "image_forwards_in_full")
    write(to, experiment=args.experiment, seeds=args.seeds, contestants=known, **tables, runs=rows)


if __name__ == "__main__":
    main()

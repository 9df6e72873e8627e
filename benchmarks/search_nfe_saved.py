"""How many network evaluations an image a searched combination saves.

    python benchmarks/search_nfe_saved.py --work scratch/ [--seeds 0 1 2]

diffusion    the best tuned baseline at 18 Euler steps, and the descent's winner at fewer
consistency  the best tuned baseline at 2 evaluations, and the descent's winner at 1

"Base" is the strongest of last, best single, EMA, power EMA, uniform and minus-sqrt windows, each tuned at that number
of evaluations; scores are those of the report seeds and the report half. The same line continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import spread
from searches import bank, run, write

from lcsc.core.registry import build
from lcsc.samplers.base import with_nfe

PARTS = {  # experiment, network evaluations of the base, of the searched ones
    "diffusion": ("digits", 18, (3, 4, 5, 6)),
    "consistency": ("digits_consistency", 2, (1,)),
}


def calls(part: str, nfe: int) -> str:
    """The override that sets the network evaluations of an image; Euler takes one a step."""
    if part == "diffusion":
        return f"sampler.num_steps={nfe}"
    return f"sampler.sigmas={with_nfe(build('sampler', 'consistency'), nfe).sigmas}".replace(" ", "")


def base(words: list[str], target: Path) -> dict:
    """Scores of the tuned baselines: a search of one trial."""
    row = run([*words, "searcher=one_plus_one", "search.num_trials=1", "search.num_finalists=1"], target)
    best = row["baselines"][row["best_baseline"]]
    return {**row, "value": best["value"], "se": best["se"], "winner": best["label"]}


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/search_nfe_saved.json"))
    args = parser.parse_args()
    rows: dict[str, list[dict]] = {}
    for part, (experiment, full, fewer) in PARTS.items():
        for seed in args.seeds:
            words = [f"experiment={experiment}", f"seed={seed}"]
            place = bank(words, args.work / f"bank-{experiment}-{seed}")
            words.append(f"bank.path={place}")
            for steps in (full, *fewer):
                at, target = [*words, calls(part, steps)], args.work / f"nfe-{experiment}-{seed}-{steps}"
                row = base(at, target) if steps == full else run(at, target)
                rows.setdefault(part, []).append({"seed": seed, "base": steps == full, **row})
    table = {}
    for part, found in rows.items():
        reached = []
        for seed in args.seeds:
            aim = next(row for row in found if row["seed"] == seed and row["base"])["value"]
            good = [r["nfe"] for r in found if r["seed"] == seed and not r["base"] and r["value"] <= aim]
            reached.append(min(good, default=None))
        scores: dict[str, list[float]] = {}
        for row in found:
            scores.setdefault(f"{'base' if row['base'] else 'lcsc'} at {row['nfe']} NFE", []).append(row["value"])
        table[part] = {
            "scores": {name: spread(values) for name, values in scores.items()},
            "fewest_nfe_at_least_as_good_as_base": reached,
        }
    write(args.to, seeds=args.seeds, table=table, runs=rows)


if __name__ == "__main__":
    main()

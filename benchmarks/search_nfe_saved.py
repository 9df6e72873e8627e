"""How many network evaluations an image a searched combination saves.

    python benchmarks/search_nfe_saved.py --work scratch/ [--seeds 0 1 2] [--only PART ...]

diffusion             the best tuned baseline at 18 Euler steps, and the descent's winner at fewer Euler steps
diffusion, dpmpp_2m   the same aim, and fewer steps of the two-step solver of the same order of cost
consistency           the best tuned baseline at 2 evaluations, and the descent's winner at 1

"Base" is the strongest of last, best single, EMA, power EMA, uniform and minus-sqrt windows, each tuned at that number
of evaluations; scores are those of the report seeds and the report half. Beside each winner stands the best baseline
tuned with the winner's own sampler, so that it shows what the sampler saves and what the combination. The same line
continues; `--only` keeps the other parts of the results file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, spread
from searches import bank, run, write

from lcsc.core.registry import build
from lcsc.samplers.base import with_nfe

EULER, MULTISTEP = "sampler=euler", "sampler=dpmpp_2m"
PARTS = {  # experiment; sampler and steps of the base; sampler and steps of the searched ones
    "diffusion": ("digits", (EULER, 18), (EULER, (6,))),
    "diffusion, dpmpp_2m": ("digits", (EULER, 18), (MULTISTEP, (4,))),
    "consistency": ("digits_consistency", ("sampler=consistency", 2), ("sampler=consistency", (1,))),
}


def calls(part: str, nfe: int) -> str:
    """The override that sets the network evaluations of an image; Euler and DPM-Solver++ take one a step."""
    if part.startswith("diffusion"):
        return f"sampler.num_steps={nfe}"
    return f"sampler.sigmas={with_nfe(build('sampler', 'consistency'), nfe).sigmas}".replace(" ", "")


def base(words: list[str], target: Path) -> dict:
    """Scores of the tuned baselines: a search of one trial."""
    row = run([*words, "searcher=one_plus_one", "search.num_trials=1", "search.num_finalists=1"], target)
    best = row["baselines"][row["best_baseline"]]
    return {**row, "value": best["value"], "se": best["se"], "winner": best["label"]}


def measured(part: str, seed: int, work: Path) -> list[dict]:
    """The base and the searched combinations of one training seed; rows carry the sampler's name."""
    experiment, full, fewer = PARTS[part]
    words = [f"experiment={experiment}", f"seed={seed}"]
    words.append(f"bank.path={bank(words, work / f'bank-{experiment}-{seed}')}")
    rows = []
    for sampler, steps in (full, *((fewer[0], steps) for steps in fewer[1])):
        name = sampler.removeprefix("sampler=")
        at, target = [*words, sampler, calls(part, steps)], work / f"nfe-{experiment}-{seed}-{name}-{steps}"
        is_base = (sampler, steps) == full
        row = base(at, target) if is_base else run(at, target)
        rows.append({"seed": seed, "base": is_base, "sampler": name, **row})
    return rows


def summed_up(found: list[dict]) -> dict:
    """Scores by number of evaluations, and the fewest at which each seed is at least as good as its base."""
    aims = {row["seed"]: row["value"] for row in found if row["base"]}
    scores: dict[str, list[float]] = {}
    reached: dict[str, list[int | None]] = {}
    for row in found:
        at = f"{row['sampler']} at {row['nfe']} NFE"
        tuned = row["baselines"][row["best_baseline"]]["value"]
        for who, value in (("base", tuned),) if row["base"] else (("lcsc", row["value"]), ("base", tuned)):
            scores.setdefault(f"{who}, {at}", []).append(value)
    searched = [row for row in found if not row["base"]]
    for who in ("lcsc", "base"):
        value = {"lcsc": lambda r: r["value"], "base": lambda r: r["baselines"][r["best_baseline"]]["value"]}[who]
        good = {s: [r["nfe"] for r in searched if r["seed"] == s and value(r) <= aim] for s, aim in aims.items()}
        reached[who] = [min(good[seed], default=None) for seed in aims]
    full = next(row for row in found if row["base"])
    return {
        "aim": f"base, {full['sampler']} at {full['nfe']} NFE",
        "scores": {name: spread(values) for name, values in scores.items()},
        "fewest_nfe_at_least_as_good_as_base": reached,
    }


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/search_nfe_saved.json"))
    args = parser.parse_args()
    where = {key: circumstances()[key] for key in ("machine", "commit")}
    old = json.loads(args.to.read_text()) if args.to.exists() else {"runs": {}}
    kept = {part: [{key: old[key] for key in where} | row for row in found] for part, found in old["runs"].items()}
    new = {part: [where | row for s in args.seeds for row in measured(part, s, args.work)] for part in args.only}
    rows = {part: (kept | new)[part] for part in PARTS if part in kept | new}
    seeds = {part: sorted({row["seed"] for row in found}) for part, found in rows.items()}
    write(args.to, seeds=seeds, table={part: summed_up(found) for part, found in rows.items()}, runs=rows)


if __name__ == "__main__":
    main()

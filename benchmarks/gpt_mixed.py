"""A generated network as a starting point for LCSC, against copied ones: `experiment=gpt_digits_mixed` over seeds.

    python benchmarks/gpt_mixed.py --folder build/gpt_mixed --to benchmarks/results/gpt_mixed.json

Every seed trains its own runs and generator from the command line, and searches four times with equally many trials:
combinations of the early checkpoints of the held-out run with one update of the generator, with the best training
checkpoint of other runs in its place, with the mean of five of them, and with nothing else. Scores are on the report
part of the images, which neither generator nor search has seen. Settings were tried on seed 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, mean_se

MIXED = ("experiment=gpt_digits_mixed",)
#: LCSC of the early checkpoints alone, by the experiment's searcher and budget
ALONE = (
    *("network=classifier_linear", "dataset=digits", "objective=classification", "operator=linear", "bank.stop=24"),
    *("searcher=ladder", "searcher.num_blocks=6", "searcher.test_images=224", "name=alone", "search.num_trials=300"),
    *("search.num_images=449", "search.num_finalists=5", "search.num_images_select=449"),
    *("search.num_images_report=450", "search.batch_size=6"),
)
SEARCHES = {
    "generated": MIXED,
    "nearest": (*MIXED, "operator.proposal=nearest"),
    "mean": (*MIXED, "operator.proposal=mean"),
    "alone": ALONE,
}


def searched(name: str, seed: int, folder: Path) -> dict:
    """The winner of one search and its baselines, on the report part."""
    run = folder / f"{name}-{seed}"
    if not (run / "summary.json").exists():
        words = [*SEARCHES[name], f"seed={seed}", f"bank.path={folder}/bank-{seed}", f"run_dir={run}"]
        subprocess.run([sys.executable, "-m", "lcsc", "search", *words], check=True)
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    winner = next(record for record in records if record.get("kind") == "report" and record["who"] == "best")
    with safe_open(run / "best" / "diffusion_pytorch_model.safetensors", "np") as file:
        recipe = json.loads(file.metadata()["lcsc_recipe"])
    told = summary["report"]
    return {
        "loss": told["best"]["value"],
        "error": winner["others"]["classification_error"]["value"],
        "label": told["best"]["label"],
        "baselines": {family: numbers["value"] for family, numbers in told["baselines"].items()},
        "sum_of_coefficients": sum((recipe.get("combined") or {}).values()),
    }


def main() -> None:
    """Run the searches that are missing, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--searches", nargs="*", default=list(SEARCHES))
    parser.add_argument("--folder", type=Path, required=True, help="keeps each search, and goes on with what is there")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    rows = {str(seed): {name: searched(name, seed, folder) for name in args.searches} for seed in args.seeds}
    if not args.to:
        return
    ahead = {
        name: mean_se([row[name]["loss"] - row["generated"]["loss"] for row in rows.values()])
        for name in args.searches
        if name != "generated"
    }
    table = {
        "loss": {name: mean_se([row[name]["loss"] for row in rows.values()]) for name in args.searches},
        "error": {name: mean_se([row[name]["error"] for row in rows.values()]) for name in args.searches},
        "loss_above_generated": ahead,
        "baselines": {
            name: mean_se([row["generated"]["baselines"][name] for row in rows.values()])
            for name in ("one_update", "nearest", "mean", "sgd", "adam")
        },
        "gain_over_one_update": mean_se(
            [row["generated"]["baselines"]["one_update"] - row["generated"]["loss"] for row in rows.values()]
        ),
        "gain_over_mean_of_5": mean_se(
            [row["generated"]["baselines"]["mean"] - row["generated"]["loss"] for row in rows.values()]
        ),
    }
    print(json.dumps(table, indent=1))
    args.to.write_text(json.dumps({**circumstances(), "table": table, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Which coordinates to search in: whitening 0, 0.5 and 1, with CMA-ES and its diagonal variant, on one digits bank.

    python benchmarks/coordinates.py --bank banks/digits --to benchmarks/results/coordinates.json

Each combination gets the same number of trials on the same images; the ratio is the winner's report score over the
best tuned baseline's. Runs are taken in turn, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, spread

from lcsc.config.hydra_app import compose_config
from lcsc.search.run import run_search
from lcsc.search.setup import build_problem

#: whitening, searcher, first step length (with whitening 1 long first steps leave the basin, docs/log.md)
GRID = (
    (0.0, "cma", 0.5),
    (0.5, "cma", 1.0),
    (0.5, "diagonal_cma", 1.0),
    (1.0, "cma", 0.3),
    (1.0, "diagonal_cma", 0.3),
)
#: smaller final evaluations than an experiment's: the searches are what is compared
FINALS = ["search.num_finalists=5", "search.num_images_select=1000", "search.num_images_report=2000"]


def write(rows: list[dict], num_trials: int, to: Path) -> None:
    """The results file of the runs so far."""
    ratios = {key: [row["ratio"] for row in rows if row["key"] == list(key)] for key in GRID}
    table = [
        {
            **dict(zip(("whitening", "searcher", "sigma0"), key, strict=True)),
            "ratio": spread(values),
            "runs": len(values),
        }
        for key, values in ratios.items()
        if values
    ]
    to.parent.mkdir(parents=True, exist_ok=True)
    result = {**circumstances(), "num_trials": num_trials, "table": table, "runs": rows}
    to.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Measure; the results file grows with every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/coordinates.json"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (whitening, searcher, sigma0) in itertools.product(args.seeds, GRID):
            settings = [
                *("experiment=digits", f"bank.path={args.bank}", f"seed={seed}", f"search.num_trials={args.trials}"),
                *(f"operator.whitening={whitening}", f"searcher={searcher}", f"searcher.sigma0={sigma0}", *FINALS),
            ]
            problem = build_problem(compose_config(settings))
            path = run_search(problem, name="coordinates", runs_dir=Path(folder), quiet=True)
            ratio = json.loads((path / "summary.json").read_text())["report"]["ratio"]
            rows.append({"key": [whitening, searcher, sigma0], "seed": seed, "ratio": ratio})
            print(rows[-1], flush=True)
            write(rows, args.trials, args.to)  # after every run, so that an interrupted benchmark keeps what it has


if __name__ == "__main__":
    main()

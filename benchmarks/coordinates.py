"""Which coordinates to search in: whitening 0, 0.5 and 1, on one digits bank.

    python benchmarks/coordinates.py --bank banks/digits --to benchmarks/results/coordinates.json

For each (whitening, sigma0, seed) the same searcher gets the same trials on the same images; the ratio is the
winner's report score over the best tuned baseline's. Runs are taken in turn, seed by seed.
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

#: first step length for each whitening; with whitening 1 long first steps leave the basin (docs/log.md)
GRID = ((0.0, 0.5), (0.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 0.3), (1.0, 1.0))


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/coordinates.json"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (whitening, sigma0) in itertools.product(args.seeds, GRID):
            settings = [
                *("experiment=digits", f"bank.path={args.bank}", f"seed={seed}", f"search.num_trials={args.trials}"),
                *(f"operator.whitening={whitening}", f"searcher.sigma0={sigma0}", "search.num_images_report=2000"),
            ]
            path = run_search(
                build_problem(compose_config(settings)), name="coordinates", runs_dir=Path(folder), quiet=True
            )
            report = json.loads((path / "summary.json").read_text())["report"]
            rows.append({"whitening": whitening, "sigma0": sigma0, "seed": seed, "ratio": report["ratio"]})
            print(rows[-1], flush=True)
    table = [
        {
            "whitening": w,
            "sigma0": s,
            "ratio": spread([r["ratio"] for r in rows if (r["whitening"], r["sigma0"]) == (w, s)]),
        }
        for w, s in GRID
    ]
    args.to.parent.mkdir(parents=True, exist_ok=True)
    result = {**circumstances(), "searcher": "cma", "num_trials": args.trials, "table": table, "runs": rows}
    args.to.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

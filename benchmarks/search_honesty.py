"""Do the printed numbers mean what they say?

    python benchmarks/search_honesty.py --work scratch/ [--seeds 0 1 2] [--only NAME ...] [--images N ...]

coverage  200 searches of a problem with a known answer (`toy_gaussian`, each with seeds of its own): how often does the
          95 % interval (score +- 1.96 SE) hold the winner's true score, the mean of 100 independent scores of as many
          images? For the report, and for the same winner on the seeds it was searched with.
optimism  the best trial's value on its search seeds, against the mean of 20 scores of the same candidate on as many
          fresh images (same half of the reference): by searcher and by images a trial per coefficient. And the same
          candidate on the other half, which adds what was fitted to the reference.

The same line continues: every finished search is a small file under `--work`. `--only` and `--images` measure some rows
of the optimism now; the coverage and the other rows of the results file are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from machine import circumstances, spread
from searches import bank, write

from lcsc.config.hydra_app import compose_config
from lcsc.config.schema import SEARCH_SECTIONS
from lcsc.core.seeds import Purpose
from lcsc.search.evaluate import Evaluator
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.setup import build_parts, open_bank

COVERAGE_SEARCHES, TRUTH_SCORES, OPTIMISM_SCORES = 200, 100, 20
NUM_IMAGES, NUM_TRIALS = (100, 400, 1600), 120
SEARCHERS = {
    "lcsc_evolution": ["searcher=lcsc_evolution"],
    "cma": ["searcher=cma"],
    "gradient, common noise": ["searcher=gradient", "searcher.noise=common"],
    "gradient, fresh noise": ["searcher=gradient"],
    **{name: [f"searcher={name}"] for name in ("lbfgs", "hybrid", "ladder")},
    **{name: [f"searcher={name}"] for name in ("diagonal_cma", "one_plus_one", "de", "two_points_de", "pso", "tbpsa")},
    "random": ["searcher=random"],
}
FIRST_FRESH = 2**30  #: images of `Purpose.FRESH` that no descent of this size gets to


def problem(words: list[str]) -> Problem:
    """The search that a command line describes."""
    config = compose_config(words)
    sections = {key: config[key] for key in SEARCH_SECTIONS}
    return Problem(bank=open_bank(sections), **build_parts(sections))


def searched(task: Problem) -> tuple[Evaluator, list[dict]]:
    """A whole search without a run directory to keep: what scores its candidates, and its records."""
    with tempfile.TemporaryDirectory() as folder:
        with Progress("", 0, quiet=True) as progress, Journal(Path(folder), print) as journal:
            search = Search(task, journal, progress)
            search.run()
        evaluator = Evaluator(task.bank, task.operator, task.objective, search.space, task.seed)
        return evaluator, read_records(Path(folder) / "journal.jsonl")[0]


def scores(evaluator: Evaluator, vector: np.ndarray, purpose: Purpose, num: int, count: int, first: int) -> np.ndarray:
    """Independent scores of one candidate, each of `num` images, shape (count,)."""
    rows = [evaluator.score(vector, purpose, range(first + i * num, first + (i + 1) * num)) for i in range(count)]
    return np.array([row["value"] for row in rows])


def kept(path: Path, measure: Callable[[], dict]) -> dict:
    """What a file holds, or, where it is not there yet, what is measured now and written to it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = json.dumps(measure())
        path.with_suffix(".part").write_text(found)
        path.with_suffix(".part").rename(path)
    return json.loads(path.read_text())


def intervals_hold(place: Path, seed: int) -> dict[str, bool]:
    """One search of the known problem: does the interval of the report, and of the search seeds, hold the truth?"""
    budget = [
        "num_trials=30",
        "num_images=200",
        "num_finalists=3",
        "num_images_select=200",
        "num_images_report=1000",
    ]
    words = ["experiment=toy_gaussian", f"bank.path={place}", f"seed={seed}", "searcher=cma"]
    evaluator, records = searched(problem([*words, *(f"search.{word}" for word in budget)]))
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    vector = np.array(best["vector"])
    truth = scores(evaluator, vector, Purpose.REPORT, 1000, TRUTH_SCORES, FIRST_FRESH).mean()
    held = {"report": bool(abs(best["value"] - truth) <= 1.96 * best["se"])}
    own = evaluator.score(vector, Purpose.SEARCH, range(200), full=True)
    truth = scores(evaluator, vector, Purpose.FRESH, 200, TRUTH_SCORES, FIRST_FRESH).mean()
    return {**held, "search seeds of the winner": bool(abs(own["value"] - truth) <= 1.96 * own["se"])}


def coverage(work: Path) -> dict:
    """How often the intervals hold the truth."""
    place = bank(["experiment=toy_gaussian"], work / "bank-toy_gaussian")
    rows = [
        kept(work / f"honesty/coverage-{seed}.json", lambda seed=seed: intervals_hold(place, seed))
        for seed in range(COVERAGE_SEARCHES)
    ]
    share = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    error = {name: float(np.sqrt(s * (1 - s) / COVERAGE_SEARCHES)) for name, s in share.items()}
    return {"share_of_95_percent_intervals_that_hold": share, "standard_error": error, "target": 0.93}


def optimism(words: list[str], name: str, num: int) -> dict:
    """What the best trial's value promised, and what the candidate keeps."""
    budget = [f"num_trials={NUM_TRIALS}", f"num_images={num}", "num_finalists=1"]
    budget += ["num_images_select=200", "num_images_report=200"]
    evaluator, records = searched(problem([*words, *SEARCHERS[name], *(f"search.{word}" for word in budget)]))
    trials = [record for record in records if record["kind"] == "trial" and record["value"] is not None]
    best = min(trials, key=lambda record: record["value"])
    vector = np.array(best["vector"])
    fresh = scores(evaluator, vector, Purpose.FRESH, num, OPTIMISM_SCORES, FIRST_FRESH).mean()
    report = scores(evaluator, vector, Purpose.REPORT, num, OPTIMISM_SCORES, FIRST_FRESH).mean()
    size = evaluator.space.size
    return {
        "searcher": name,
        "num_images": num,
        "images_per_coefficient": num / (size + 1),
        "promised": best["value"],
        "fresh_noise": float(fresh),
        "other_half": float(report),
        "optimism_of_noise": float(fresh - best["value"]),
        "optimism_of_all": float(report - best["value"]),
    }


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted(SEARCHERS), help="searchers to measure; all without it")
    parser.add_argument("--images", type=int, nargs="+", default=NUM_IMAGES, help="images of a trial to measure")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/search_honesty.json"))
    args = parser.parse_args()
    old = json.loads(args.to.read_text()) if args.to.exists() else {}
    covered = old["coverage"] if args.only and old else coverage(args.work)
    where = {key: circumstances()[key] for key in ("machine", "commit")}
    runs = []
    for seed in args.seeds:
        words = ["experiment=digits_consistency", f"seed={seed}"]
        place = bank(words, args.work / f"bank-digits_consistency-{seed}")
        words.append(f"bank.path={place}")
        for num in args.images:
            for name in args.only or SEARCHERS:
                file = args.work / f"honesty/{name.replace(', ', '-').replace(' ', '_')}-{num}-{seed}.json"
                found = kept(file, lambda n=name, m=num, w=words: {**where, **optimism(w, n, m)})
                runs.append({"seed": seed, **found})
    mine = {key_of(row) for row in runs}
    kept_rows = [{**{key: old[key] for key in where}, **row} for row in old.get("runs", []) if key_of(row) not in mine]
    runs = kept_rows + runs
    seeds = sorted({row["seed"] for row in runs})
    write(args.to, seeds=seeds, coverage=covered, optimism=table_of(runs), runs=runs)


def key_of(row: dict) -> tuple:
    """What a row of the results is about."""
    return row["searcher"], row["num_images"], row["seed"]


def table_of(runs: list[dict]) -> list[dict]:
    """Spreads over the seeds, by searcher and images a trial."""
    keys = ("promised", "fresh_noise", "other_half", "optimism_of_noise", "optimism_of_all")
    return [
        {
            **{"searcher": name, "num_images": num, "images_per_coefficient": found[0]["images_per_coefficient"]},
            **{"num_seeds": len(found), **{key: spread([row[key] for row in found]) for key in keys}},
        }
        for num in sorted({row["num_images"] for row in runs})
        for name in SEARCHERS
        if (found := [row for row in runs if (row["searcher"], row["num_images"]) == (name, num)])
    ]


if __name__ == "__main__":
    main()

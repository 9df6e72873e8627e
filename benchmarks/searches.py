"""What the search benchmarks share: whole searches that continue, their costs, and writing results."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, circumstances, spread

from lcsc.cli.search import search
from lcsc.cli.train import train
from lcsc.config.hydra_app import compose_config


def words_of(experiment: str, seed: int, work: Path, mnist: Path | None = None) -> list[str]:
    """Overrides that name an experiment; those on MNIST need its npz file and train a detector on it, once."""
    words = [f"experiment={experiment}", f"seed={seed}"]
    if not experiment.startswith("mnist16"):
        return words
    if mnist is None:
        sys.exit(f"`--mnist` is not set, and `{experiment}` needs it: an npz file of MNIST, as for `dataset=npz`")
    weights, data = work / "mnist16-detector.safetensors", ["dataset=npz", f"dataset.path={mnist}", "dataset.resize=16"]
    if not weights.exists():
        script = [sys.executable, ROOT / "scripts/train_detector.py", "widths=16,32,64", f"to={weights}"]
        subprocess.run([*script, *data], check=True)
    return [*words, f"dataset.path={mnist}", f"metric.weights_path={weights}"]


def bank(words: list[str], path: Path) -> Path:
    """The bank of an experiment, trained, or trained to its end, where it is not there yet."""
    done = path.with_name(f"{path.name}.done")
    if not done.exists():
        train(compose_config([*words, f"bank.path={path}"]))
        done.touch()
    return path


def run(words: list[str], target: Path) -> dict:
    """One search with its result; continues an interrupted one, and does nothing for a finished one."""
    if not (target / "summary.json").exists():
        search(compose_config([*words, f"run_dir={target}"]), f"{Path(sys.argv[0]).name} {target.name}")
    return result(target)


def result(path: Path) -> dict:
    """Report score and costs of a finished search.

    What only tells how good the baselines are is measurement and is not counted as search: the final report, and the
    second look at baselines that are not the winner's rival. `in_full` counts that second look too.
    """
    summary = json.loads((path / "summary.json").read_text())
    records = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    baselines = [record for record in records if record["kind"] == "baseline" and record["value"] is not None]
    labels = {record["label"] for record in baselines}
    looks = [r for r in records if r["kind"] == "select" and r["label"] in labels and r["value"] is not None]
    rival = min(looks, key=lambda record: record["value"], default=None)
    costs: dict[str, int] = {}
    for record in records:
        kind = "second look" if record in looks and record is not rival else record["kind"]
        costs[kind] = costs.get(kind, 0) + (record.get("image_forwards") or 0)
    report = summary["report"]
    return {
        "value": report["best"]["value"],
        "se": report["best"]["se"],
        "begins_at": min(baselines, key=lambda record: record["value"], default={"label": None})["label"],
        "winner": report["best"]["label"],
        "baselines": report["baselines"],
        "best_baseline": report["best_baseline"],
        "ratio_to_best_baseline": report["ratio"],
        "floor": summary["floor"],
        "nfe": summary["nfe"],
        "image_forwards": {kind: cost for kind, cost in costs.items() if cost},
        "image_forwards_of_search": sum(cost for kind, cost in costs.items() if kind not in ("report", "second look")),
        "image_forwards_in_full": sum(cost for kind, cost in costs.items() if kind != "report"),
        "seconds": summary["wall_seconds"],
        "num_inherited": summary.get("num_inherited", 0),  # from a fork's parent, in no time
    }


def contest(known: dict[str, list[str]], args: argparse.Namespace) -> dict[int, dict[str, dict]]:
    """Results by seed and contestant: `--only` says what is run now; what is finished under `--work` is taken too."""
    rows: dict[int, dict[str, dict]] = {seed: {} for seed in args.seeds}
    for name, overrides in known.items():
        for seed in args.seeds:
            target = args.work / f"{args.experiment}-{seed}-{name}"
            if args.only is None or name in args.only:
                words = words_of(args.experiment, seed, args.work, args.mnist)
                place = bank(words, args.work / f"bank-{args.experiment}-{seed}")
                rows[seed][name] = run([*words, f"bank.path={place}", *overrides, *args.set], target)
            elif (target / "summary.json").exists():
                rows[seed][name] = result(target)
    return rows


def contest_arguments(doc: str, experiments: Iterable[str]) -> argparse.Namespace:
    """The command line of a contest."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--experiment", default="digits", choices=sorted(experiments))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--mnist", type=Path, help="npz file of MNIST")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--set", nargs="+", default=[], help="overrides for all, such as objective.compile=inductor")
    return parser.parse_args()


def by_contestant(rows: dict[int, dict[str, dict]]) -> dict[str, dict]:
    """Spread over the seeds, for contestants that finished on all of them."""
    names = [name for name in next(iter(rows.values())) if all(name in found for found in rows.values())]
    table = {}
    for name in names:
        found = [row[name] for row in rows.values()]
        values = [row["value"] for row in found]
        table[name] = {
            "report_score": spread(values),
            "mean": statistics.fmean(values),
            "standard_error_over_seeds": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
            "ratio_to_best_baseline": spread([row["ratio_to_best_baseline"] for row in found]),
            "image_forwards": spread([row["image_forwards_of_search"] for row in found]),
            "image_forwards_in_full": spread([row["image_forwards_in_full"] for row in found]),
            "seconds": spread([row["seconds"] for row in found]),
        }
    return table


def write(to: Path, **content: object) -> None:
    """The results file, with its circumstances; prints what is in it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({**circumstances(), **content}, indent=2) + "\n")
    print(json.dumps({key: value for key, value in content.items() if key != "runs"}, indent=2))

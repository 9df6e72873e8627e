"""What the search benchmarks share: whole searches that continue, their costs, and writing results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, circumstances

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
    """Report score and costs of a finished search; the final report is measurement and is not counted as search."""
    summary = json.loads((path / "summary.json").read_text())
    costs: dict[str, int] = {}
    for line in (path / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        costs[record["kind"]] = costs.get(record["kind"], 0) + (record.get("image_forwards") or 0)
    report = summary["report"]
    return {
        "value": report["best"]["value"],
        "se": report["best"]["se"],
        "winner": report["best"]["label"],
        "baselines": report["baselines"],
        "best_baseline": report["best_baseline"],
        "ratio_to_best_baseline": report["ratio"],
        "floor": summary["floor"],
        "nfe": summary["nfe"],
        "image_forwards": {kind: cost for kind, cost in costs.items() if cost},
        "image_forwards_of_search": sum(cost for kind, cost in costs.items() if kind != "report"),
        "seconds": summary["wall_seconds"],
    }


def write(to: Path, **content: object) -> None:
    """The results file, with its circumstances; prints what is in it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({**circumstances(), **content}, indent=2) + "\n")
    print(json.dumps({key: value for key, value in content.items() if key != "runs"}, indent=2))

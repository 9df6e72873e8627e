"""CIFAR-10 on a GPU: how long the whole takes, and what the searches find.

    python benchmarks/search_cifar10.py --data train.parquet --work made/

Runs scripts/reproduce/cifar10.sh, or continues it, and writes its tables. A training's seconds go from its `train.json`
to its last checkpoint, compilation included. Settings of the script (`TRAIN`, `SPEED`, `SEED`, `EXPERIMENTS`,
`INCEPTION`) are read from the environment and noted down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT
from safetensors import safe_open
from searches import result, write

SETTINGS = "TRAIN", "SPEED", "SEED", "EXPERIMENTS", "INCEPTION"


def training(place: Path) -> dict:
    """How a bank was trained, and how long it took."""
    config = json.loads((place / "train.json").read_text())["config"]
    checkpoints = sorted(place.glob("checkpoint-*"))
    seconds = checkpoints[-1].stat().st_mtime - (place / "train.json").stat().st_mtime
    return {"trainer": config["trainer"], "num_checkpoints": len(checkpoints), "seconds": round(seconds, 1)}


def main() -> None:
    """Run what is missing, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/search_cifar10.json"))
    args = parser.parse_args()
    place = {"DATA": str(args.data), "OUT": str(args.work), "PYTHON": sys.executable}
    subprocess.run([ROOT / "scripts/reproduce/cifar10.sh"], env={**os.environ, **place}, check=True)
    with safe_open(args.work / "detector.safetensors", "np") as file:
        detector = json.loads(file.metadata()["lcsc_classifier"])["made"]
    runs = {}
    for path in sorted((args.work / "runs").iterdir()):
        summary = json.loads((path / "summary.json").read_text())
        name = summary["experiment"]
        found = result(path) | {"metric": summary["metric"], "detector": summary["detector"]}
        runs[name] = found | {
            "num_checkpoints": summary["num_checkpoints"],
            "training": training(args.work / "banks" / name),
        }
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    table = {
        name: {key: row[key] for key in ("nfe", "floor", "value", "se", "best_baseline", "ratio_to_best_baseline")}
        for name, row in runs.items()
    }
    write(args.to, settings=settings, detector=detector, table=table, runs=runs)


if __name__ == "__main__":
    main()

"""`scripts/reproduce/cifar10.sh` from end to end at tiny size, on two classes of drawn images kept as CIFAR-10 is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "reproduce" / "cifar10.sh"


def run(cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    places = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT)], cwd=cwd, env={**os.environ, **places, **env}, capture_output=True, text=True, timeout=300
    )


def write_parquet(path: Path) -> None:
    """64 JPEGs, reddish or bluish."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(0), []
    for i in range(64):
        pixels = np.array([[200, 90, 60], [60, 90, 200]])[i % 2] + rng.normal(0, 30, (32, 32, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": i % 2})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.slow
def test_one_command_trains_searches_and_compares(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet")
    done = run(tmp_path, TINY="1", DATA="train.parquet", OUT="all")
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy 1.0000" in done.stdout
    runs = sorted((tmp_path / "all" / "runs").iterdir())
    summaries = [json.loads((path / "summary.json").read_text()) for path in runs]
    assert {(s["experiment"], s["nfe"]) for s in summaries} == {("cifar10", 5), ("cifar10_consistency", 1)}
    for path, summary in zip(runs, summaries, strict=True):
        assert (summary["metric"], summary["detector"]) == ("fid_classifier", "classifier")
        assert summary["num_checkpoints"] == 4
        assert (path / "report" / "report.html").exists()
        reported = json.loads((path / "journal.jsonl").read_text().splitlines()[-1])
        assert reported["others"]["kid_classifier"]["se"] > 0
    assert (tmp_path / "all" / "comparison" / "comparison.csv").exists()


def test_without_data_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, DATA="absent.parquet")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cifar10.sh: DATA is `absent.parquet`, which is no file.")
    assert list(tmp_path.iterdir()) == []

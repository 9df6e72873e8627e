"""`scripts/reproduce/cifar10.sh` from end to end at tiny size, on two classes of drawn images kept as CIFAR-10 is.

What the script has Python do is noted down, and then done in this process: six processes would spend most of their
time on importing torch.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_cli import load_script
from PIL import Image

from lcsc.cli.main import main
from lcsc.config.hydra_app import compose_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "reproduce" / "cifar10.sh"


#: Stands in for Python: every word and then an empty one, each ended by a zero byte. It fails at one word.
NOTE = """#!/usr/bin/env bash
printf '%s\\0' "$@" "" >>"$NOTES"
case " $* " in *" ${FAILS_AT:-no word} "*) exit 3 ;; esac
"""


def run(cwd: Path, python: str | Path, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=cwd,
        env={**os.environ, "PYTHON": str(python), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def commands(cwd: Path, tools: Path, code: int = 0, **env: str) -> list[list[str]]:
    """The words of every call of Python that the script makes, which then ends with `code`."""
    (tools / "python").write_text(NOTE)
    (tools / "python").chmod(0o755)
    done = run(cwd, tools / "python", NOTES=str(tools / "notes"), **env)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    return [call.split("\0") for call in (tools / "notes").read_text().removesuffix("\0\0").split("\0\0")]


def python(words: list[str]) -> int:
    """`python WORDS` in this process."""
    if words[:2] == ["-m", "lcsc"]:
        return main(words[2:])
    return load_script(Path(words[0]).stem).main(words[1:])


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


@pytest.mark.faults
def test_one_command_trains_searches_and_compares(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_parquet(tmp_path / "train.parquet")
    calls = commands(tmp_path, tmp_path_factory.mktemp("tools"), TINY="1", DATA="train.parquet", OUT="all")
    assert [call[2] for call in calls[1:]] == ["train", "search", "train", "search", "report"]
    assert Path(calls[0][0]).resolve() == ROOT / "scripts" / "train_detector.py"
    monkeypatch.chdir(tmp_path)
    deterministic = torch.are_deterministic_algorithms_enabled()
    for call in calls:
        assert python(call) == 0, (call, capsys.readouterr().err)
    torch.use_deterministic_algorithms(deterministic)
    assert "held-out accuracy 1.0000" in capsys.readouterr().out
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


def test_a_step_that_fails_is_the_last(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (tmp_path / "train.parquet").touch()
    tools, words = tmp_path_factory.mktemp("tools"), {"TINY": "1", "DATA": "train.parquet"}
    calls = commands(tmp_path, tools, 3, FAILS_AT="experiment=cifar10_consistency", **words)
    assert [call[2] for call in calls[1:]] == ["train", "search", "train"]


def test_experiments_and_words_of_the_trainings_can_be_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "train.parquet").touch()
    words = {"DATA": "train.parquet", "EXPERIMENTS": "cifar10", "TRAIN": "trainer.num_steps=9 bank.every=2"}
    calls = commands(tmp_path, tmp_path_factory.mktemp("tools"), **words)
    assert [call[2] for call in calls[1:]] == ["train", "search", "report"]
    for call in calls[1:3]:
        assert {"experiment=cifar10", "trainer.num_steps=9", "bank.every=2", "trainer.compile=inductor"} <= set(call)


def test_inception_scores_beside_the_classifier_where_its_weights_are_given(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = {"DATA": "train.parquet", "EXPERIMENTS": "cifar10", "INCEPTION": "my weights.pth"}
    (tmp_path / "train.parquet").touch()
    done = run(tmp_path, sys.executable, **words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cifar10.sh: INCEPTION is `my weights.pth`, which is no file.")
    (tmp_path / "my weights.pth").touch()
    search = commands(tmp_path, tmp_path_factory.mktemp("tools"), **words)[2]
    config = compose_config(search[3:])
    told = [(metric["name"], metric["weights_path"]) for metric in (config["metric"], *config["other_metrics"])]
    own = "cifar10/detector.safetensors"
    assert told == [("fid_classifier", own), ("kid_classifier", own), ("fid", "my weights.pth")]


@pytest.mark.faults
def test_in_processes_of_its_own(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet")
    words = {"TINY": "1", "DATA": "train.parquet", "OUT": "all", "PYTHONPATH": str(ROOT)}
    first = run(tmp_path, sys.executable, timeout=900, **words)
    assert first.returncode == 0, first.stderr
    assert "held-out accuracy 1.0000" in first.stdout
    journals = {path: path.read_bytes() for path in (tmp_path / "all" / "runs").glob("*/journal.jsonl")}
    assert len(journals) == 2
    again = run(tmp_path, sys.executable, timeout=900, **words)  # the same line finds everything done
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in journals} == journals


def test_without_data_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, DATA="absent.parquet")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cifar10.sh: DATA is `absent.parquet`, which is no file.")
    assert list(tmp_path.iterdir()) == []

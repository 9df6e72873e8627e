"""What the README says runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers_cli import TINY_TRAINING

from lcsc.cli.main import VERBS
from lcsc.config.hydra_app import experiments

README = (Path(__file__).parents[2] / "README.md").read_text()
SMALL = "num_trials=3, num_images=20, num_finalists=2, num_images_select=20, num_images_report=40"


@pytest.mark.slow
def test_the_python_block_searches(here, lcsc):
    assert lcsc("train", "experiment=digits", *TINY_TRAINING, "quiet=true")[0] == 0
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 12
    assert "num_trials=100" in block
    scope: dict = {}
    exec(block.replace("num_trials=100", SMALL), scope)
    summary = json.loads((scope["path"] / "summary.json").read_text())
    assert summary["num_trials"] == 3
    assert summary["report"]["baselines"].keys() >= {"last", "ema"}
    # the run that Python made is found by its directory on the command line
    code, out, err = lcsc("export", f"run={scope['path']}", "to=out")
    assert code == 0, err
    assert "as the run reported" in out


def test_the_lines_without_a_search_run(here, lcsc, tiny_bank):
    (commands,) = (block for block in re.findall(r"```\n(lcsc .*?)```", README, flags=re.S) if "lcsc combine" in block)
    lines = [
        shlex.split(line.replace("/my/checkpoints", str(tiny_bank)), comments=True) for line in commands.splitlines()
    ]
    for words in lines:
        code, _, err = lcsc(*words[1:])
        assert (code, err) == (0, ""), words
    assert len(list((here / "averaged").iterdir())) == 3
    assert len(list((here / "sweep").iterdir())) == 5


def test_verbs_experiments_and_files_exist():
    for commands in re.findall(r"```\n(lcsc .*?)```", README, flags=re.S):
        for verb in re.findall(r"^lcsc (\w+)", commands, flags=re.M):
            assert verb in VERBS
    for name in re.findall(r"experiment=(\w+)", README):
        assert name in experiments()
    root = Path(__file__).parents[2]
    for path in re.findall(r"\b((?:docs|benchmarks|notebooks|lcsc)/[\w/]+\.\w+)", README):
        assert (root / path).exists(), path
    lines = len((root / "lcsc" / "reference.py").read_text().splitlines())
    assert f"in {lines} lines of numpy" in README

"""Starts of one line at the same moment: one run directory, one winner, and the others are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NUM = 10
FAULTS = pytest.mark.faults


@pytest.mark.parametrize("mode", ["plain", "no_flock", "stale"])
@pytest.mark.parametrize("num_starts", [30, pytest.param(1000, marks=FAULTS)])
def test_of_simultaneous_starts_one_wins(tmp_path, mode, num_starts, count):
    script = Path(__file__).with_name("starters.py")
    words = [sys.executable, str(script), str(tmp_path), mode, str(num_starts // NUM), str(NUM)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)
    assert rounds == [{"won": 1, "told": NUM - 1, "runs": 1, "others": []}] * (num_starts // NUM)
    count(f"starts_{mode}", starts=num_starts, rounds=len(rounds), winners=sum(row["won"] for row in rounds))

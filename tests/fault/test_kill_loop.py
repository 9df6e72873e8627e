"""kill -9 at random times: nothing that was acknowledged is lost, nothing counts twice, the journal is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NIGHTLY = int(os.environ.get("LCSC_NUM_KILLS", "200"))


@pytest.mark.parametrize("num_kills", [3, pytest.param(NIGHTLY, marks=pytest.mark.faults)])
def test_a_driver_killed_at_random_times_ends_as_an_unbroken_one(tmp_path, num_kills, count):
    script = Path(__file__).with_name("kill_loop.py")
    path = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, str(script), str(tmp_path), str(num_kills), "0"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == num_kills
    assert counts["acknowledged"] > counts["kills"]
    assert (counts["lost"], counts["double"], counts["different"]) == (0, 0, 0)
    count("kill_loop", **counts)

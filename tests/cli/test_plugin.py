"""An operator in one file outside the package is found, listed and searchable."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers_cli import TOY

OPERATOR = '''
"""One coefficient only: how far to go from the last checkpoint but one to the last, and beyond."""

from dataclasses import dataclass

import numpy as np

from lcsc import combine, register
from lcsc.core.space import Box, SearchSpace
from lcsc.operators.base import Baseline, Candidate
import torch


@register("operator", "extrapolate", source="ExPO, arXiv:2404.16792")
@dataclass(frozen=True)
class Extrapolate:
    """A straight line through the last two checkpoints."""

    reach: float = 2.0

    def space(self, bank):
        return SearchSpace((Box("t", 1, -self.reach, self.reach),))

    def apply(self, bank, point):
        t = float(point["t"][0])
        coef_K = torch.zeros(bank.num_checkpoints, dtype=torch.float64)
        coef_K[-2:] = torch.tensor([-t, 1 + t])
        recipe = {"operator": "extrapolate", "steps": list(bank.steps), "coef": coef_K.tolist()}
        return Candidate(bank.arch, bank.layout, lambda out: combine(coef_K, bank.matrix(), out_BP=out), recipe)

    def baselines(self, bank):
        return [Baseline("last", "last", {"t": np.zeros(1)})]
'''


#: One process for both, as the package is installed in neither: it is found on the path.
LIST_AND_SEARCH = """
import sys
from lcsc.cli.main import main
assert main(["list", "operators"]) == 0
print("END OF THE LIST")
assert main(sys.argv[1:]) == 0
assert "diffusers" not in sys.modules  # the toy does without, and diffusers is slower to import than it is to search
"""


@pytest.fixture
def plugin(tmp_path):
    """A folder as an installer would leave it: one module and its metadata."""
    site = tmp_path / "site"
    info = site / "lcsc_extrapolate-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "extrapolate.py").write_text(OPERATOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lcsc-extrapolate\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lcsc.operators]\nextrapolate = extrapolate\n")
    return site


@pytest.mark.faults
def test_a_foreign_operator_is_searched(plugin, tmp_path):
    words = ["search", *TOY, "operator=extrapolate", "operator.reach=3", "searcher=lcsc_evolution"]
    done = subprocess.run(
        [sys.executable, "-c", LIST_AND_SEARCH, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(plugin), *sys.path]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    listed, _, _ = done.stdout.partition("END OF THE LIST")
    assert "extrapolate" in listed
    assert "ExPO" in listed
    (path,) = (p.parent for p in tmp_path.glob("runs/*/summary.json"))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["operator"] == "extrapolate"
    assert summary["num_coefficients"] == 1
    coef = [row["coef"] for row in summary["coefficients"]]
    assert coef[:-2] == [0] * 10
    assert sum(coef) == pytest.approx(1)
    assert -3 <= -coef[-2] <= 3
    assert list(summary["report"]["baselines"]) == ["last"]

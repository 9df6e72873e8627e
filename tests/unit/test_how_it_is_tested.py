"""The page of fault counts says what its results file says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_written_from_the_results():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    results = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text())
    assert (ROOT / "docs" / "how_it_is_tested.md").read_text() == faults.page(results)
    summed = {name for name in results["counts"] if name.startswith(("bad_results_", "pipeline_"))}  # a row a family
    assert set(results["counts"]) - summed <= set(faults.ROWS)

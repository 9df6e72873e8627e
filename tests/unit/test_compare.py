"""Several runs in one table: ranked inside one evaluator only."""

from __future__ import annotations

import json
import re

import pytest
from helpers_fake_run import make_fake_run
from helpers_report import read_table

from lcsc.core.errors import RunError
from lcsc.report.compare import compare_runs, comparison_text, grouped


def test_runs_are_ranked_only_inside_one_evaluator(tmp_path):
    make = {
        "worse": {"best": 95.0, "seed": 1, "searcher": "random"},
        "better": {"best": 81.8},
        "one_step": {"best": 40.0, "nfe": 1},
        "other_detector": {"best": 30.0, "detector_digest": "00" * 32},
        "more_images": {"best": 20.0, "num_images_report": 8000},
        "half": {"finished": False, "done": 5},
    }
    paths = [make_fake_run(tmp_path / name, num_trials=8, **settings) for name, settings in make.items()]
    groups = grouped(paths)
    assert [[(row["run"], row["rank"]) for row in group.rows] for group in groups] == [
        [("better", 1), ("worse", 2)],
        [("one_step", 1)],
        [("other_detector", 1)],
        [("more_images", 1)],
        [("half", None)],
    ]
    text = comparison_text(paths)
    assert text.startswith("6 runs in 4 groups: ")
    assert "not across" in text
    page = compare_runs(paths, tmp_path / "out")
    assert page == tmp_path / "out" / "comparison.html"
    assert page.read_text(encoding="utf-8").count("<h2>") == 6  # five groups and a front
    assert not re.search(r'https?://|src="(?!data:)', page.read_text(encoding="utf-8"))
    frame = read_table(tmp_path / "out" / "comparison.csv").set_index("run")
    names = ["comparison.csv", "comparison.html", "front.csv", "front.png"]  # the runs differ in NFE
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert frame["group"].to_dict() == {
        "better": 1, "worse": 1, "one_step": 2, "other_detector": 3, "more_images": 4, "half": 5,
    }  # fmt: skip
    summary = json.loads((tmp_path / "worse" / "summary.json").read_text())
    row = frame.loc["worse"]
    assert (row["value"], row["se"]) == (95.0, summary["report"]["best"]["se"])
    assert (row["ratio"], row["seconds"]) == (summary["report"]["ratio"], summary["wall_seconds"])
    assert (row["searcher"], row["seed"], row["trials"], row["rank"]) == ("random", 1, 8, 2)


def test_comparable_runs_make_one_group_without_a_warning(tmp_path):
    paths = [make_fake_run(tmp_path / str(seed), num_trials=5, seed=seed) for seed in (0, 1)]
    assert comparison_text(paths).startswith(
        "2 runs\n\nfid_digits · detector digits_cnn 5d41402abc4b · Digits() · 5 NFE"
    )


def test_comparison_of_nothing_or_of_no_run_writes_nothing(tmp_path):
    with pytest.raises(RunError, match="no run to compare"):
        compare_runs([], tmp_path / "out")
    with pytest.raises(RunError, match="is no run directory"):
        compare_runs([make_fake_run(tmp_path / "run", num_trials=2), tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()

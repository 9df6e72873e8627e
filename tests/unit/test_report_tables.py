"""Words and tables of a run: numbers with their errors, the scores, and where the winner lies."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers_fake_run import make_fake_run
from helpers_report import EVIL, edit_geometry

from lcsc.report.html import write_report
from lcsc.report.run import Run
from lcsc.report.tables import (
    display_label,
    html_table,
    number,
    place_notes,
    place_rows,
    report_text,
    result_line,
    text_table,
)


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (81.8123, 1.94, "81.8 ± 1.9"),
        (205.31, 12.4, "205 ± 12"),
        (0.00345, 0.000124, "0.00345 ± 0.00012"),
        (81.8123, None, "81.81"),
        (0.0, None, "0.0"),
        (1512.7, 0.0, "1513"),
        (1020395520.0, 0.0, "1,020,395,520"),
        (256.0, 0.0, "256"),
        (None, None, "–"),
        (float("nan"), 1.0, "–"),
        (3.0, float("nan"), "3.000"),
    ],
)
def test_numbers_are_rounded_to_two_digits_of_their_error(value, se, text):
    assert number(value, se) == text


def test_result_line():
    best, ema = (
        {"value": 81.82, "se": 1.91, "label": "trial 17"},
        {"value": 205.31, "se": 2.04, "label": "ema halflife=320 steps"},
    )
    report = {"best": best, "baselines": {"ema": ema}, "best_baseline": "ema", "ratio": 81.82 / 205.31}
    line = "lcsc 81.8 ± 1.9 · best baseline 205.3 ± 2.0 (ema halflife=320 steps) · ratio 0.40"
    assert result_line({"report": report, "floor": 9.79}) == f"{line} · floor 9.8 (real vs real)"
    assert result_line({"report": report, "floor": None}) == line
    assert result_line({"report": {"best": best, "baselines": {}}, "floor": None}) == "lcsc 81.8 ± 1.9"
    raced = {"report": report, "images_saved": 120_000, "images_sampled": 280_000}
    assert result_line(raced) == f"{line} · racing saved 120,000 of 400,000 images"
    assert result_line(raced | {"images_saved": 0}) == line


def test_tables_align_and_escape():
    head, rows = ["", "score"], [["a", "1.0"], [f"{EVIL}\x1b[31m", "10.0"]]
    assert text_table(head, rows).split("\n") == [
        " " * 30 + "  score",
        "─" * 30 + "  ─────",
        "a".ljust(30) + "    1.0",
        f"{EVIL}\N{REPLACEMENT CHARACTER}[31m" + "   10.0",
    ]
    markup = html_table(head, rows, strong=0)
    assert "<script" not in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in markup
    assert markup.count("<tr class=strong>") == 1


def test_report_text_is_the_table_of_scores(finished):
    lines = report_text(Run.open(finished)).split("\n")
    assert re.split(r"\s{2,}", lines[0].strip()) == ["fid_digits", "ratio", "kid_digits", "images"]
    assert re.split(r"\s{2,}", lines[3]) == [
        "EMA half-life 320 steps",
        "204.9 ± 3.0",
        "1.00",
        "0.2277 ± 0.0040",
        "4,000",
    ]
    assert lines[2 + 7] == ""  # then where the winner lies
    assert display_label("last", "step 1000") == "last checkpoint (step 1000)"


def test_table_of_where_the_winner_lies_is_in_the_order_of_the_scores(finished):
    run = Run.open(finished)
    places = run.geometry["points"]
    lines = report_text(run).split("\n")[10:]
    assert re.split(r"\s{2,}", lines[0].strip()) == ["from last", "/ last to mean", "sum |coef|", "max |coef|"]
    assert [re.split(r"\s{2,}", line)[1:3] for line in lines[2:9]] == [
        [f"{places[who]['from_last']:.3f}", f"{places[who]['from_last_relative']:.2f}"]
        for who in run.report_table()["who"]
    ]
    assert re.split(r"\s{2,}", lines[2])[3] == f"{np.abs(run.coefficients()['coef']).sum():.2f}"
    assert lines[9:] == place_notes(run)
    assert "slope" not in " ".join(place_notes(run))  # a black-box search cannot know


def test_notes_say_how_much_of_the_way_is_flat(grouped_descent, tmp_path):
    run = Run.open(grouped_descent)
    slope = run.geometry["slope"]
    note = "21 of 39 directions carry 99 % of the score's squared slope, 3 are flat (under 1 % of the mean). "
    note += f"{100 * slope['way_flat']:.2g} % of the winner's squared way lies along flat ones, where the score hardly "
    assert place_notes(run) == [
        "From the last checkpoint to the mean of all it is 5.000, to the first 12.50. The checkpoints' effective rank "
        "is 7.2 of 39.",
        "The winner is 2.500 away from the best baseline; its way has an effective rank of 11.5.",
        f"{note}changed: other coefficients are as good.",
        "3 of 39 directions of the checkpoints are shorter than 1/1000 of the longest: coefficients along them hardly "
        "change the weights.",
    ]
    path = make_fake_run(tmp_path / "run", num_trials=3)
    few = {"num_gradients": 30, "num_directions": 39}
    edit_geometry(path, {"slope": few, "way": {"length": 2.0, "effective_rank": 3.0, "along": [1.0], "outside": 0.25}})
    assert place_notes(Run.open(path)) == [
        "The winner is 2.000 away from the best baseline; its way has an effective rank of 3.0. 25 % of its square is "
        "no combination of whole checkpoints.",
        "30 gradients are too few to tell which of 39 directions the score depends on; that takes 78.",
    ]
    edit_geometry(path, {"slope": few | {"energy": [0.5, 0.5], "num_carrying": 2, "num_flat": 0}})
    assert place_notes(Run.open(path)) == [
        "2 of 39 directions carry 99 % of the score's squared slope; none of them is flat."
    ]


def test_runs_that_do_not_say_where_the_winner_lies_have_no_such_table(tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=3)
    edit_geometry(path, None)
    run = Run.open(path)
    assert run.directions().empty
    assert (place_rows(run)[1], place_notes(run)) == ([], [])
    assert "Where the winner lies" not in write_report(path).read_text(encoding="utf-8")
    assert not (path / "report" / "geometry.png").exists()
    edit_geometry(path, {"points": {"best": {"from_last": 2.0, "from_last_relative": None}}})  # one checkpoint
    assert place_rows(Run.open(path))[0] == ["", "from last"]
    edit_geometry(path, {"points": {"best": {"sum_abs": 2.0, "max_abs": 1.0}}})  # weights that cannot be compared
    assert place_rows(run) == (["", "sum |coef|", "max |coef|"], [["LCSC (trial 1)", "2.00", "1.000"]])

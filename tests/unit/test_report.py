"""The report reads a run directory and says what is in it: numbers against the journal, pages against their rules."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers_fake_run import FLOOR, make_fake_run, read_records
from PIL import Image

from lcsc.core.errors import RunError
from lcsc.report import directions, grids, plots
from lcsc.report.compare import compare_runs, comparison_text, grouped
from lcsc.report.html import write_report
from lcsc.report.run import Run, open_run
from lcsc.report.tables import (
    display_label,
    html_table,
    number,
    place_notes,
    place_rows,
    report_text,
    result_line,
    status_line,
    text_table,
)

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = make_fake_run(tmp_path_factory.mktemp("runs") / "finished", num_trials=60)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def grouped_descent(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "grouped"
    return make_fake_run(path, num_trials=60, groups=("down", "mid", "up"), descent=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    path = make_fake_run(
        tmp_path_factory.mktemp("runs") / "running", finished=False, num_trials=100, done=45, torn=True
    )
    write_report(path)
    return path


# ---- the run as data


def test_trials_are_the_journal_with_its_cumulative_minimum(finished):
    frame, records = open_run(finished).trials(), read_records(finished, "trial")
    assert list(frame.columns) == ["uid", "value", "best_so_far", "status", "seconds", "images"]
    assert frame["uid"].tolist() == list(range(60))
    values = [np.inf if record["value"] is None else record["value"] for record in records]
    assert frame["value"].fillna(np.inf).tolist() == values
    assert frame["best_so_far"].tolist() == list(itertools.accumulate(values, min))
    assert frame.loc[frame["status"] == "failed", "uid"].tolist() == [20, 57]
    assert frame["seconds"].tolist() == [0.25] * 60
    assert frame["images"].tolist() == [400.0] * 60


def test_a_failed_first_trial_has_no_best_yet(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=3)
    edit_records(path, lambda r: r | {"value": None, "status": "failed"} if r.get("uid") == 0 else r)
    best = Run.open(path).trials()["best_so_far"]
    assert np.isnan(best[0])
    assert best[1] == read_records(path, "trial")[1]["value"]


def test_trials_without_timing_lines_have_no_time(finished, tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=5)
    lines = (path / "timing.jsonl").read_text().splitlines()
    seq = read_records(path, "trial")[2]["seq"]
    kept = [line for line in lines if json.loads(line)["seq"] != seq]
    (path / "timing.jsonl").write_text("\n".join([*kept, "not json", '{"seq": 3, "sec']))
    assert Run.open(path).trials()["seconds"].isna().tolist() == [False, False, True, False, False]


def test_baselines_mark_the_best_of_each_family(finished):
    frame, records = Run.open(finished).baselines(), read_records(finished, "baseline")
    assert frame["label"].tolist() == [record["label"] for record in records]
    assert frame["value"].tolist() == [record["value"] for record in records]
    expected = {}
    for record in records:
        expected[record["family"]] = min(expected.get(record["family"], np.inf), record["value"])
    tuned = frame[frame["tuned"]]
    assert dict(zip(tuned["family"], tuned["value"], strict=True)) == expected
    assert set(expected) == {"last", "best_single", "ema", "power_ema", "uniform", "wsm"}


def test_report_table_has_the_winner_first_and_ratios_to_the_best_baseline(finished):
    frame = Run.open(finished).report_table()
    records = {record["who"]: record for record in read_records(finished, "report")}
    assert frame["who"].tolist() == ["best", "ema", "power_ema", "wsm", "uniform", "best_single", "last"]
    assert frame["value"].tolist() == [records[who]["value"] for who in frame["who"]]
    assert frame["se"].tolist() == [records[who]["se"] for who in frame["who"]]
    assert frame["kid_digits_se"].tolist() == [0.004] * 7
    assert frame["num_images"].tolist() == [4000] * 7
    assert frame["ratio"].tolist() == [value / records["ema"]["value"] for value in frame["value"]]


def test_best_and_coefficients_of_a_finished_run_are_the_reported_ones(finished):
    run = Run.open(finished)
    winner, *baselines = read_records(finished, "report")
    ema = next(record for record in baselines if record["who"] == "ema")
    assert run.finished
    assert run.best == winner
    assert run.floor == FLOOR
    assert run.steps == tuple(range(25, 1001, 25))
    frame = run.coefficients()
    assert list(frame.columns) == ["step", "coef", "baseline_coef", "ema_coef"]
    assert tuple(frame["step"]) == run.steps
    assert frame["coef"].tolist() == winner["coef"]
    assert frame["baseline_coef"].tolist() == ema["coef"]


def test_running_search_shows_the_best_trial_so_far(running):
    run = Run.open(running)
    trials = [record for record in read_records(running, "trial") if record["value"] is not None]
    baselines = read_records(running, "baseline")
    best = min(trials, key=lambda record: record["value"])
    assert not run.finished
    assert run.summary is None
    assert run.best == best
    assert run.coefficients()["coef"].tolist() == best["coef"]
    assert run.coefficients()["baseline_coef"].tolist() == min(baselines, key=lambda r: r["value"])["coef"]
    assert run.report_table().empty
    line = f"unfinished: 45 of 100 trials · best so far {best['value']:.2f} · "
    line += "best baseline 207.0 (EMA half-life 320 steps) · search seeds, not final"
    assert status_line(run) == report_text(run) == line


def test_run_that_has_only_begun_is_empty_not_an_error(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=0)
    (path / "journal.jsonl").unlink()
    (path / "timing.jsonl").unlink()
    run = Run.open(path)
    assert (run.best, run.floor) == (None, None)
    assert run.trials().empty
    assert run.baselines().empty
    assert run.coefficients().empty
    assert status_line(run) == "unfinished: 0 trials"
    assert write_report(path).is_file()


def test_a_view_follows_the_journal(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=3)
    run = Run.open(path)
    assert len(run.trials()) == 3
    seq = read_records(path, "trial")[-1]["seq"] + 1
    with open(path / "journal.jsonl", "a") as file:
        file.write(json.dumps({"seq": seq, "kind": "trial", "uid": 3, "value": 1.5, "status": "ok"}) + "\n")
    assert run.trials()["best_so_far"].iloc[-1] == 1.5
    assert run.coefficients().empty  # this trial is no combination of checkpoints


def test_coefficients_of_layer_groups_have_a_row_for_each_group_and_checkpoint(grouped_descent):
    run, (winner, *_) = Run.open(grouped_descent), read_records(grouped_descent, "report")
    frame = run.coefficients()
    assert list(frame.columns) == ["group", "step", "coef", "baseline_coef", "ema_coef"]
    assert run.groups == ("down", "mid", "up")
    for name, coef_K in zip(run.groups, winner["coef"], strict=True):
        part = frame[frame["group"] == name]
        assert part["coef"].tolist() == coef_K
        assert tuple(part["step"]) == run.steps
        assert part["ema_coef"].tolist() == frame["ema_coef"][:40].tolist()
    (ax,) = run.plot_coefficients().axes
    _, *lines = ax.lines
    assert [line.get_label() for line in lines] == ["down", "mid", "up", "EMA half-life 320 steps"]
    np.testing.assert_array_equal([line.get_ydata() for line in lines[:3]], winner["coef"])


def test_layer_groups_of_a_running_search_have_numbers(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=3, groups=("down", "up"))
    assert Run.open(path).groups == ("group 1", "group 2")
    edit_records(path, lambda r: r | {"coef": [r["coef"][0]] * 3} if r.get("family") == "ema" else r)
    with pytest.raises(RunError, match="has 3 layer groups, the winner has 2"):
        Run.open(path).coefficients()
    edit_records(path, lambda r: r | {"coef": r["coef"][0]} if r.get("family") == "ema" else r)  # flat: for all groups
    assert Run.open(path).coefficients()["ema_coef"].notna().all()


@pytest.mark.parametrize(
    ("blocks", "noise"),
    [((None, None), "search seeds"), ((0, 1), "fresh seeds"), ((None, 3), "search and fresh seeds")],
)
def test_a_run_knows_whose_noise_its_trials_saw(tmp_path, blocks, noise):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=2)
    edit_records(path, lambda r: r | {"block": blocks[r["uid"]]} if r.get("kind") == "trial" else r)
    run = Run.open(path)
    assert run.noise == noise
    assert status_line(run).endswith(
        "search seeds, not final" if noise == "search seeds" else f"trials on {noise}, not final"
    )
    texts = " ".join(text.get_text() for text in run.plot_convergence().texts)
    assert ("dots and lines: search seeds" in texts) == (noise == "search seeds")
    assert (f"trials: {noise} · baselines: search seeds" in texts) == (noise != "search seeds")


# ---- damage


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_torn_last_line_is_left_out(tmp_path, cut):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=6)
    journal = path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])  # cut 1: whole but for its newline, so perhaps not all of it
    assert Run.open(path).trials()["uid"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"seq": 4, "kind": "tri', "Unterminated"),
        (b"\xff\xfe", "decode"),
        (b"[1, 2]", "not a record"),
        (b'{"seq": 4, "kind": "trial", "uid": 1, "status": "ok"}', "a trial record without `value`"),
        (b'{"seq": 4, "kind": "floor", "value": NaN}', "NaN is not a score"),
        (b'{"seq": 4, "kind": "floor", "value": "low"}', "`value` is 'low', not a number"),
        (b'{"seq": 4, "kind": "floor", "value": 1, "coef": "x"}', "`coef` is not a list of numbers"),
        (b'{"seq": 4, "kind": "floor", "value": 1, "coef": [[1], "x"]}', "`coef` is not a list of numbers"),
    ],
)
def test_broken_line_elsewhere_is_refused_by_number(tmp_path, line, reason):
    path = make_fake_run(tmp_path / "run")
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[4] = line
    journal.write_bytes(b"\n".join(lines))
    with pytest.raises(RunError, match=r"journal\.jsonl` is damaged at record 4 ") as caught:
        Run.open(path).trials()
    assert reason in str(caught.value)
    with pytest.raises(RunError):
        write_report(path)
    assert not (path / "report").exists()


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is no run directory: it has no run\.json"):
        Run.open(tmp_path / "nothing")
    file = tmp_path / "run.json"
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ('{"schema": 7}', "has schema 7; this lcsc reads 1"),
        ('{"schema": 1, "name": "x", "metric": "m", "bank": {}}', "lacks `config`"),
        ('{"schema": 1, "name": "x", "metric": "m", "bank": {}, "config": {}}', r"lacks `bank\.steps`"),
    ]:
        file.write_text(text)
        with pytest.raises(RunError, match=message):
            Run.open(tmp_path)


def test_wrong_number_of_coefficients_is_refused(tmp_path):
    path = make_fake_run(tmp_path / "run")
    edit_records(path, lambda r: r | {"coef": [0.5, 0.5]} if r.get("who") == "best" else r)
    with pytest.raises(RunError, match="2 coefficients for 40 checkpoints"):
        Run.open(path).coefficients()


def test_damaged_summary_and_samples_are_refused(tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=5)
    (path / "samples.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(RunError, match=r"samples\.npz` cannot be read"):
        write_report(path)
    np.savez(path / "samples.npz", best=np.array([{"a": 1}], dtype=object))  # a pickle: never opened
    with pytest.raises(RunError, match=r"samples\.npz` cannot be read: Object arrays"):
        write_report(path)
    np.savez(path / "samples.npz", best=np.zeros((4, 8, 8), np.float32))
    with pytest.raises(RunError, match=r"`best` in .* has shape \(4, 8, 8\)"):
        write_report(path)
    (path / "summary.json").write_text('{"report": {}}')
    with pytest.raises(RunError, match=r"lacks `report\.best\.value`"):
        _ = Run.open(path).summary


# ---- words and tables


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (81.8123, 1.94, "81.8 ± 1.9"),
        (205.31, 12.4, "205 ± 12"),
        (0.00345, 0.000124, "0.00345 ± 0.00012"),
        (81.8123, None, "81.81"),
        (0.0, None, "0.0"),
        (1512.7, 0.0, "1513"),
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
    edit_geometry(path, {"points": {"best": {"sum_abs": 2.0, "max_abs": 1.0}}})  # weights that cannot be compared
    assert place_rows(run) == (["", "sum |coef|", "max |coef|"], [["LCSC (trial 1)", "2.00", "1.000"]])


# ---- pictures


def test_labels_move_apart_and_stay_in_order():
    assert plots.spread([0.2, 0.8], 0.1, 0, 1) == [0.2, 0.8]
    np.testing.assert_allclose(plots.spread([0.5, 0.5, 0.5], 0.1, 0, 1), [0.4, 0.5, 0.6])
    np.testing.assert_allclose(plots.spread([0.99, 0.2, 1.0], 0.1, 0, 1), [0.9, 0.2, 1.0])
    np.testing.assert_allclose(plots.spread([0.0, 0.01], 0.1, 0, 1), [0.0, 0.1])
    assert plots.spread([], 0.1, 0, 1) == []


def test_coefficient_plot_draws_both_curves_and_the_zero_line(finished):
    run = Run.open(finished)
    (ax,) = run.plot_coefficients().axes
    frame = run.coefficients()
    zero, positive, negative, ema = ax.lines
    assert list(zero.get_ydata()) == [0, 0]
    assert (len(positive.get_xdata()), len(negative.get_xdata())) == (
        (frame["coef"] >= 0).sum(),
        (frame["coef"] < 0).sum(),
    )
    assert len(negative.get_xdata()) > 0
    np.testing.assert_array_equal(ema.get_ydata(), frame["ema_coef"])


def test_convergence_plot_draws_trials_running_minimum_baselines_floor_and_finals(finished):
    run = Run.open(finished)
    figure = run.plot_convergence()
    ax, strip = figure.axes
    trials, report = run.trials(), run.report_table()
    assert ax.get_yscale() == "log"  # 32 to 518 is more than fivefold
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    steps = next(curve for curve in curves if len(curve) == len(trials) + 1)
    np.testing.assert_array_equal(steps[:-1], trials["best_so_far"])
    level = {curve[0] for curve in curves if len(curve) == 2 and curve[0] == curve[1]}
    tuned = run.baselines().query("tuned")["value"]
    assert level >= {*tuned, FLOOR}
    marks = {line.get_marker(): len(line.get_xdata()) for line in ax.lines if line.get_marker() != "None"}
    assert marks["x"] == 2
    assert marks["o"] + marks.get("^", 0) == len(trials) - 2
    marks = [container.lines[0].get_ydata()[0] for container in strip.containers]
    assert marks == report["value"].tolist()
    texts = [text.get_text() for text in figure.texts]
    assert {"EMA half-life 320 steps", "204.9 ± 3.0", "81.8 ± 1.8", "floor: real vs real"} <= set(texts)


def test_narrow_range_of_scores_gets_a_linear_axis(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=10)
    edit_records(path, lambda r: r | {"value": 100.0 + r["seq"]} if "value" in r else r)
    assert Run.open(path).plot_convergence().axes[0].get_yscale() == "linear"


def test_score_bars_start_at_zero(finished):
    run = Run.open(finished)
    (ax,) = plots.scores(run).axes
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == run.report_table()["value"].tolist()
    assert {patch.get_x() for patch in ax.patches} == {0}
    assert ax.get_xscale() == "linear"


def test_geometry_plot_draws_the_shares_and_marks_what_is_flat(finished, grouped_descent):
    for path, key in ((finished, "spread"), (grouped_descent, "slope")):
        run = Run.open(path)
        frame = run.directions()
        assert list(frame.columns) == ["direction", key, "way", "flat"]
        (ax,) = directions.geometry(run).axes
        low = ax.get_ylim()[0]
        bars, way = ax.patches, ax.lines[0].get_ydata()
        np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in bars], np.maximum(frame[key], low))
        np.testing.assert_allclose(way, np.maximum(frame["way"], low))
        colors = [bar.get_facecolor() for bar in bars]
        assert [color == colors[-1] for color in colors] == frame["flat"].tolist() == [False] * 36 + [True] * 3


def test_tile_repeats_pixels_in_reading_order():
    images = np.linspace(-1, 1, 4 * 4, dtype=np.float32).reshape(4, 1, 2, 2)
    canvas = grids.tile(images, rows=2, pixels=8)  # each pixel twice, gap 1
    assert canvas.shape == (9, 9)
    np.testing.assert_allclose(canvas[0, :2], 0.0)
    np.testing.assert_allclose(canvas[4], 1.0)  # the gap is white
    np.testing.assert_allclose(canvas[:4:2, 5::2], (images[1, 0] + 1) / 2, atol=1e-7)
    np.testing.assert_allclose(canvas[5::2, :4:2], (images[2, 0] + 1) / 2, atol=1e-7)
    assert grids.tile(np.zeros((3, 3, 4, 4)), rows=2, pixels=8).shape == (9, 9, 3)


def test_plots_leave_no_global_state(tmp_path):
    make_fake_run(tmp_path / "run", num_trials=5)
    code = f"""
import sys
import lcsc.report.run
assert not {{"torch", "pandas", "matplotlib", "jinja2"}} & set(sys.modules)
run = lcsc.report.run.open_run({str(tmp_path / "run")!r})
import matplotlib  # its `backend` is chosen when one asks for it
settings = lambda: {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
run.plot_convergence(), run.plot_coefficients()
assert settings() == before
assert not {{"matplotlib.pyplot", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- the report


def test_report_files_hold_the_numbers_of_the_journal(finished):
    folder, run = finished / "report", Run.open(finished)
    names = [
        f"{name}.{kind}" for name in ("coefficients", "convergence", "geometry", "scores") for kind in ("csv", "png")
    ]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*names, "report.html", "samples.png"])
    coefficients = read_table(folder / "coefficients.csv")
    winner = read_records(finished, "report")[0]
    assert coefficients["coef"].tolist() == winner["coef"]
    convergence = read_table(folder / "convergence.csv")
    trials = convergence[convergence["kind"] == "trial"]
    expected = [record["value"] for record in read_records(finished, "trial")]
    assert [None if np.isnan(value) else value for value in trials["value"]] == expected
    assert trials["best_so_far"].tolist() == run.trials()["best_so_far"].tolist()
    ema = convergence[convergence["kind"] == "ema"]
    assert dict(zip(ema["label"], ema["value"], strict=True)) == {
        record["label"]: record["value"] for record in read_records(finished, "baseline") if record["family"] == "ema"
    }
    pd.testing.assert_frame_equal(
        read_table(folder / "scores.csv"),
        run.report_table().astype({"num_images": "int64"}),
        check_dtype=False,
    )


@pytest.mark.parametrize("name", ["coefficients", "convergence", "geometry", "scores", "samples"])
def test_pictures_are_sharp_at_900_pixels_and_not_blank(finished, name):
    image = Image.open(finished / "report" / f"{name}.png")
    image.load()
    assert image.width == 1800  # 900 CSS pixels, two to one
    assert 550 <= image.height <= 1200
    pixels = np.asarray(image.convert("L"))
    assert 0.005 < (pixels < 200).mean() < 0.8


def test_page_is_one_file_with_its_pictures_inside(finished):
    page = (finished / "report" / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 5
    inside = [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]
    pictures = ("scores", "convergence", "coefficients", "geometry", "samples")
    files = [finished / "report" / f"{name}.png" for name in pictures]
    assert inside == [file.read_bytes() for file in files]
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "lcsc 81.8 ± 1.8 · best baseline 204.9 ± 3.0 (EMA half-life 320 steps)" in page
    digest = "5d41402abc4b2a76b9719d911017c592ae1f6a3b0d1f4b6a8c9e2d7f0a1b2c3d"
    config = "&#34;num_finalists&#34;: 10"
    images = "4,000 a final score (report seeds)"
    for fact in (digest, "torch 2.13.0", "lcsc search experiment=digits", images, config):
        assert fact in page
    assert [
        page.count(f"<h2>{h}</h2>")
        for h in ("Scores", "Convergence", "Coefficients", "Where the winner lies", "Samples", "Circumstances")
    ] == [1] * 6


def test_same_run_same_bytes_and_an_old_report_is_replaced(finished):
    folder = finished / "report"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "report.html").write_text("old")
    assert write_report(finished) == folder / "report.html"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_report_of_a_running_search_says_so(running):
    page = (running / "report" / "report.html").read_text(encoding="utf-8")
    assert "The search is not finished." in page
    assert "unfinished: 45 of 100 trials" in page
    assert sorted(file.name for file in (running / "report").iterdir()) == [
        "coefficients.csv", "coefficients.png", "convergence.csv", "convergence.png", "report.html",
    ]  # fmt: skip


def test_hostile_names_are_text(tmp_path):
    path = make_fake_run(
        tmp_path / "run", name=EVIL, num_trials=8, searcher=f'"><img src=x onerror=1>{EVIL}', command=EVIL
    )
    edit_records(path, lambda r: r | {"label": f"{EVIL} $x_$ \x1b[2J"} if "label" in r else r)
    page = write_report(path).read_text(encoding="utf-8")
    other = compare_runs([path], tmp_path / "comparison").read_text(encoding="utf-8")
    for text in (page, other):
        assert "<script" not in text
        assert "<img src=x" not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in report_text(Run.open(path)) + status_line(Run.open(path)) + comparison_text([path])


# ---- comparison


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


def edit_records(path, change):
    records = [json.loads(line) for line in io.StringIO((path / "journal.jsonl").read_text(encoding="utf-8"))]
    (path / "journal.jsonl").write_text("".join(json.dumps(change(r)) + "\n" for r in records), encoding="utf-8")


def edit_geometry(path, geometry):
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8")) | {"geometry": geometry}
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def read_table(path):
    """A CSV file with floats that round-trip in every version of pandas."""
    frame = pd.read_csv(path, dtype=str)
    return frame.apply(lambda column: pd.to_numeric(column) if column.name in ("uid", "step") else as_floats(column))


def as_floats(column):
    try:
        return column.map(float, na_action="ignore").astype("float64")
    except ValueError:
        return column

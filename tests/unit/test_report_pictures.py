"""Pictures of a run: what is drawn against what the run says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from helpers_fake_run import FLOOR, make_fake_run
from helpers_report import edit_geometry, edit_records

from lcsc.report import directions, grids, plots
from lcsc.report.run import Run


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


def test_what_stands_over_the_convergence_fits_the_picture(tmp_path):
    path = make_fake_run(tmp_path / "run", name="gpt_digits_mixed_all", num_trials=4)
    edit_records(path, lambda r: r | {"block": (None, 3)[r["uid"] % 2]} if r.get("kind") == "trial" else r)
    run = Run.open(path)
    assert run.noise == "search and fresh seeds"
    figure = run.plot_convergence()
    assert max(text.get_window_extent().x1 for text in figure.texts) <= figure.bbox.x1


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


def test_geometry_plot_speaks_of_the_winner_s_way_only_where_it_draws_one(tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=3)
    heading = "The checkpoints' directions"
    assert directions.geometry(Run.open(path)).texts[0].get_text() == f"{heading}, and where the winner went"
    edit_geometry(path, {key: value for key, value in Run.open(path).geometry.items() if key != "way"})
    figure = directions.geometry(Run.open(path))
    assert figure.texts[0].get_text() == heading
    assert not figure.axes[0].lines


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

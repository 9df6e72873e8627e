"""A run directory read as data: numbers against the journal, and damage refused by what it says."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from helpers_fake_run import FLOOR, framed, make_fake_run, read_records
from helpers_report import edit_records

from lcsc.core.errors import RunError
from lcsc.report.html import write_report
from lcsc.report.run import Run, open_run
from lcsc.report.tables import (
    report_text,
    status_line,
)


def test_trials_are_the_journal_with_its_cumulative_minimum(finished):
    frame, records = open_run(finished).trials(), read_records(finished, "trial")
    assert list(frame.columns) == ["uid", "value", "best_so_far", "status", "seconds", "images", "may_win"]
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


def test_the_baseline_with_the_final_score_stands_for_its_family(tmp_path):
    """A second look on other seeds may prefer another member than the search seeds did."""
    path = make_fake_run(tmp_path / "run")
    members = [record for record in read_records(path, "baseline") if record["family"] == "ema"]
    shown = max(members, key=lambda record: record["value"])
    edit_records(
        path,
        lambda record: (
            {**record, "label": shown["label"], "vector": shown["vector"], "coef": shown["coef"]}
            if record["kind"] == "report" and record["who"] == "ema"
            else record
        ),
    )
    run = Run.open(path)
    assert run.baselines().query("tuned and family == 'ema'")["label"].tolist() == [shown["label"]]
    assert run.tuned("ema")["label"] == shown["label"]
    assert run.coefficients()["ema_coef"].tolist() == shown["coef"]
    (ema,) = [line for line in run.plot_coefficients().axes[0].lines if shown["label"] in line.get_label()]
    assert ema.get_ydata().tolist() == shown["coef"]


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
    last = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with open(path / "journal.jsonl", "ab") as file:
        file.write(framed([{"seq": seq, "kind": "trial", "uid": 3, "value": 1.5, "status": "ok"}], last))
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
    assert (f"trials: {noise} · lines: search seeds" in texts) == (noise != "search seeds")


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
        (b'{"seq": 4, "kind": "tri', "its checksum is wrong"),
        (b"\xff\xfe", "its checksum is wrong"),
        ('{"seq": 4, "kind": 5}', "not a record"),
        ('{"seq": 5, "kind": "floor", "value": 1}', "out of sequence"),
        ('{"seq": 4, "kind": "trial", "uid": 1, "status": "ok"}', "a trial record without `value`"),
        ('{"seq": 4, "kind": "floor", "value": NaN}', "NaN is not a score"),
        ('{"seq": 4, "kind": "floor", "value": "low"}', "`value` is 'low', not a number"),
        ('{"seq": 4, "kind": "floor", "value": 1, "coef": "x"}', "`coef` is not a list of numbers"),
        ('{"seq": 4, "kind": "floor", "value": 1, "coef": [[1], "x"]}', "`coef` is not a list of numbers"),
    ],
)
def test_broken_line_elsewhere_is_refused_by_number(tmp_path, line, reason):
    path = make_fake_run(tmp_path / "run")
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[4] = line if isinstance(line, bytes) else framed([line], lines[3] + b"\n")[:-1]
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
        ('{"schema": 7}', "has schema 7; this lcsc reads 2"),
        ('{"schema": 2, "name": "x", "metric": "m", "bank": {}}', "lacks `config`"),
        ('{"schema": 2, "name": "x", "metric": "m", "bank": {}, "config": {}}', r"lacks `bank\.steps`"),
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

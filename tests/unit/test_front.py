"""Quality against NFE: points against the journal, lines against arithmetic, the picture against both."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from helpers_fake_run import FLOOR, framed, make_fake_run, read_records
from helpers_pictures import fine
from PIL import Image

from lcsc.report.compare import compare_runs
from lcsc.report.front import JOINT, OWN, draw, front_files, fronts
from lcsc.report.run import Run

FACTORS = {1: 2.5, 2: 1.6, 8: 0.7}


def joint_run(folder, factors=FACTORS, **settings):
    """A run whose objective scored at several NFEs: each report record has `fid_digits@n` among the others."""
    path = make_fake_run(folder, num_trials=5, samples=False, **settings)
    info = json.loads((path / "run.json").read_text())
    calls = "+".join(map(str, factors))
    info |= {"metric": f"fid_digits@{calls}", "nfe": calls}
    (path / "run.json").write_text(json.dumps(info))
    records = []
    for record in map(json.loads, (path / "journal.jsonl").read_text().splitlines()):
        if record["kind"] == "report":
            at = {f"fid_digits@{n}": {"value": record["value"] * f, "se": record["se"] * f} for n, f in factors.items()}
            record["others"] = {**at, **{f"kid_digits@{n}": {"value": 0.1, "se": 0.01} for n in factors}}
        records.append(record)
    (path / "journal.jsonl").write_bytes(framed(records))
    return path


def own_run(folder, nfe, best, **settings):
    return make_fake_run(folder, nfe=nfe, best=best, num_trials=5, samples=False, **settings)


@pytest.fixture
def one(tmp_path):
    return joint_run(tmp_path / "joint")


@pytest.fixture
def several(tmp_path):
    return [own_run(tmp_path / f"own{n}", n, best) for n, best in ((1, 190.0), (2, 120.0), (8, 60.0))]


def opened(paths):
    return [Run.open(path) for path in paths]


def test_one_run_with_several_nfes_is_a_front(one):
    (front,) = fronts(opened([one]))
    records = read_records(one, "report")
    assert (front.metric, front.floor) == ("fid_digits", FLOOR)
    assert len(front.points) == 3 * len(records)
    assert set(front.points["coefficients"]) == {JOINT}
    for record in records:
        part = front.points[front.points["who"] == record["who"]]
        assert part["nfe"].tolist() == list(FACTORS)
        assert part["value"].tolist() == [record["value"] * f for f in FACTORS.values()]
        assert part["se"].tolist() == [record["se"] * f for f in FACTORS.values()]
        assert set(part["label"]) == {record["label"]}


def test_runs_at_different_nfes_are_a_front(several):
    (front,) = fronts(opened(several))
    best = front.lines().query("who == 'best'")
    assert best["nfe"].tolist() == [1, 2, 8]
    assert best["value"].tolist() == [190.0, 120.0, 60.0]
    assert set(best["coefficients"]) == {OWN}


def test_of_a_baseline_tuned_twice_the_better_counts(one, several):
    (front,) = fronts(opened([one, *several]))
    lines = front.lines()
    ema = lines[lines["who"] == "ema"].set_index("nfe")["value"]
    for n, factor in FACTORS.items():
        tuned = next(r["value"] for r in read_records(one, "report") if r["who"] == "ema")
        assert ema[n] == min(tuned, tuned * factor)  # the made-up runs tune the same EMA at every NFE
    best = lines[lines["who"] == "best"]
    assert best.groupby("coefficients").size().to_dict() == {JOINT: 3, OWN: 3}


def test_seeds_are_averaged_with_the_error_among_them(tmp_path):
    values = {1: (100.0, 110.0, 120.0), 4: (50.0,)}
    paths = [own_run(tmp_path / f"{n}-{i}", n, v, seed=i) for n, vs in values.items() for i, v in enumerate(vs)]
    best = fronts(opened(paths))[0].lines().query("who == 'best'").set_index("nfe")
    assert best.loc[1, ["value", "num_runs"]].tolist() == [110.0, 3]
    assert best.loc[1, "se"] == pytest.approx(np.std(values[1], ddof=1) / np.sqrt(3), rel=1e-12)
    assert best.loc[4, ["value", "se", "num_runs"]].tolist() == [50.0, 1.5, 1]


def test_what_was_not_scored_alike_shares_no_front(several, tmp_path):
    strange = [own_run(tmp_path / f"s{n}", n, 70.0, detector_digest="0" * 64) for n in (2, 4)]
    alone = own_run(tmp_path / "alone", 3, 70.0, num_images_report=500)
    unfinished = own_run(tmp_path / "unfinished", 5, 1.0, finished=False)
    found = fronts(opened([*several, *strange, alone, unfinished]))
    assert [sorted(set(front.points["nfe"])) for front in found] == [[1, 2, 8], [2, 4]]
    assert sorted(front_files(opened([*several, *strange]))) == [
        "front.csv",
        "front.png",
        "front_2.csv",
        "front_2.png",
    ]
    assert front_files(opened([alone])) == {}


def edit_info(path, change):
    info = json.loads((path / "run.json").read_text())
    change(info)
    (path / "run.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info["fingerprints"].update(bank="c0" * 32),
        lambda info: info["fingerprints"]["evaluator"].update(model="Consistency()"),
        lambda info: info["config"].update(operator={"name": "linear", "rank": 8}),
        lambda info: info["config"].update(searcher={"name": "random"}),
        lambda info: info["config"]["searcher"].update(step=0.1),
        lambda info: info["config"]["sampler"].update(name="heun"),
        lambda info: info["config"]["search"].update(num_trials=7),
    ],
    ids=["bank", "model", "operator", "searcher", "setting", "sampler", "budget"],
)
def test_what_was_not_searched_alike_shares_no_front(several, tmp_path, change):
    others = [own_run(tmp_path / f"other{n}", n, best, seed=1) for n, best in ((1, 90.0), (2, 70.0), (8, 50.0))]
    (front,) = fronts(opened([*several, *others]))  # alike but for the seed: one line of means
    assert front.lines().query("who == 'best'")["value"].tolist() == [140.0, 95.0, 55.0]
    for path in others:
        edit_info(path, change)
    found = fronts(opened([*several, *others]))
    values = [front.lines().query("who == 'best'")["value"].tolist() for front in found]
    assert values == [[190.0, 120.0, 60.0], [90.0, 70.0, 50.0]]
    assert fronts(opened([several[0], others[2]])) == []  # one point each is no front


def test_a_front_says_what_was_searched_and_its_steps_may_differ(several):
    (front,) = fronts(opened(several))
    assert front.subject == "EDM(sigma_data=0.5) · operator linear · searcher cma · bank 9b9b9b9b9b9b"
    texts = [text.get_text() for text in draw(front).texts]
    assert f"{front.sentence()} · report seeds ± 1 standard error\n{front.subject}" in texts


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (204.9, 81.0, "at 5 NFE is at least as good as the best baseline at 5, at 1 within the error"),
        (208.0, 900.0, "at 1 NFE is within the error of the best baseline at 5"),
        (190.0, 81.0, "at 1 NFE is at least as good as the best baseline at 5"),
        (230.0, 195.0, "at 5 NFE is at least as good as the best baseline at 5"),
        (230.0, 197.0, "at 5 NFE is within the error of the best baseline at 5"),
    ],
)
def test_a_difference_within_its_error_is_no_better_score(tmp_path, first, second, said):
    (front,) = fronts(opened([own_run(tmp_path / f"own{n}", n, v) for n, v in ((1, first), (5, second))]))
    lines = front.lines()
    rival = lines.query("who == 'ema' and nfe == 5").iloc[0]
    assert (rival["value"], rival["se"]) == (204.93, 3.0493)  # twice hypot(3.05, 2.95) is 8.5
    assert front.sentence() == f"LCSC {said}"


def test_scores_without_errors_are_compared_as_they_are(several):
    for path in several:
        text = (path / "journal.jsonl").read_text().splitlines()
        rows = [row | {"se": None} if row["kind"] == "report" else row for row in map(json.loads, text)]
        (path / "journal.jsonl").write_bytes(framed(rows))
    (front,) = fronts(opened(several))
    assert front.sentence() == "LCSC at 1 NFE is at least as good as the best baseline at 8"


def test_the_sentence_names_the_fewest_calls_that_do(several):
    (front,) = fronts(opened(several))
    rival = front.lines().query("who != 'best' and nfe == 8")["value"].min()
    assert 190.0 < rival < 210.0
    assert front.sentence() == "LCSC at 1 NFE is at least as good as the best baseline at 8"
    (shorter,) = fronts(opened(several[1:]))
    assert shorter.sentence() == "LCSC at 2 NFE is at least as good as the best baseline at 8"


def test_no_sentence_where_the_baseline_wins(tmp_path):
    (front,) = fronts(opened([own_run(tmp_path / f"{n}", n, 900.0) for n in (1, 2)]))
    assert front.sentence() == ""


def test_the_files_hold_the_points_and_the_picture(one, several):
    with fine():
        files, again = (front_files(opened([one, *several])) for _ in range(2))
    table = pd.read_csv(io.BytesIO(files["front.csv"]))
    pd.testing.assert_frame_equal(table, fronts(opened([one, *several]))[0].points, check_dtype=False)
    assert Image.open(io.BytesIO(files["front.png"])).size == (1800, 1000)
    assert files == again


def test_the_comparison_shows_each_front(several, tmp_path):
    strange = [own_run(tmp_path / f"s{n}", n, 70.0, detector_digest="0" * 64) for n in (2, 4)]
    page = compare_runs([*several, *strange], tmp_path / "out").read_text(encoding="utf-8")
    inside = [
        base64.b64decode(found, validate=True) for found in re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    ]
    assert inside == [(tmp_path / "out" / name).read_bytes() for name in ("front.png", "front_2.png")]
    for front in fronts(opened([*several, *strange])):
        assert f"{front.subject} · {front.sentence()}</p>" in page
    alone = compare_runs(several[:1], tmp_path / "alone").read_text(encoding="utf-8")
    assert "<img" not in alone
    assert "Quality against network calls" not in alone


def test_the_picture_draws_the_lines_with_their_errors(one, several):
    (front,) = fronts(opened([one, *several]))
    figure, lines = draw(front), front.lines()
    ax = figure.axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    drawn = sorted(tuple(bar.lines[0].get_ydata()) for bar in ax.containers)
    assert drawn == sorted(tuple(part["value"]) for _, part in _lines(lines))
    texts = [text.get_text() for text in figure.texts]
    assert {f"LCSC, {JOINT}", f"LCSC, {OWN}", "EMA", "floor: real vs real"} <= set(texts)
    bars = [np.array(bar.lines[2][0].get_segments()) for bar in ax.containers]
    first = next(bar for bar in bars if bar[-1][:, 1].mean() == pytest.approx(60.0))
    np.testing.assert_allclose(first[:, 1, 1] - first[:, 0, 1], 2 * np.array([2.9, 2.2, 1.6]))


def _lines(lines):
    keys = lines["who"] + np.where(lines["who"] == "best", lines["coefficients"], "")
    return [(key, part.sort_values("nfe")) for key, part in lines.groupby(keys)]


def test_an_error_bar_reaches_no_logarithm_of_zero(tmp_path):
    wide = joint_run(tmp_path / "wide", {1: 1e-3, 2: 1.0})
    text = (wide / "journal.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        for other in record.get("others", {}).values():
            other["se"] = 1e3
    (wide / "journal.jsonl").write_bytes(framed(records))
    (front,) = fronts(opened([wide]))
    ends = [segment[:, 1].min() for bar in draw(front).axes[0].containers for segment in bar.lines[2][0].get_segments()]
    assert min(ends) > 0


def test_scores_without_logarithm_say_so(tmp_path):
    (front,) = fronts(opened([joint_run(tmp_path / "below", {1: -1.0, 2: 1.0})]))
    assert "there is no logarithm to draw" in draw(front).axes[0].texts[0].get_text()

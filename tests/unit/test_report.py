"""The report of a run: files against the journal, pages against their rules."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest
from helpers_fake_run import make_fake_run, read_records
from helpers_pictures import fine
from helpers_report import EVIL, edit_records, read_table
from PIL import Image

from lcsc.report.compare import compare_runs, comparison_text
from lcsc.report.html import write_report
from lcsc.report.run import Run
from lcsc.report.tables import (
    report_text,
    status_line,
)


@pytest.fixture(scope="module")
def finished(finished):
    """The finished run with its report."""
    with fine():
        write_report(finished)
    return finished


@pytest.fixture(scope="module")
def running(running):
    """The unfinished run with its report."""
    write_report(running)
    return running


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
    with fine():
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


def test_facts_say_what_auto_chose_and_what_the_search_paid(tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=20, searcher="auto")
    summary, info = (json.loads((path / name).read_text()) for name in ("summary.json", "run.json"))
    info["config"]["search"]["penalty"] = 2.5
    (path / "run.json").write_text(json.dumps(info))
    (path / "summary.json").write_text(json.dumps({**summary, "searcher_ran": "gradient", "image_forwards": 1234567}))
    page = write_report(path).read_text()
    for name, value in (
        ("searcher", "auto (gradient)"),
        ("price on distance", "2.5"),
        ("image-forwards", "1,234,567"),
    ):
        assert re.search(rf">{name}</t[hd]>\s*<td[^>]*>{re.escape(value)}<", page), name

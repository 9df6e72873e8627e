"""Loss against cache: which points nothing beats, of one run and of several, in numbers and in the page."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
from helpers_fake_run import framed, make_fake_run
from helpers_pictures import fine
from PIL import Image

from lcsc.core.pareto import pareto
from lcsc.report.cache import cache_files, cache_points, draw
from lcsc.report.compare import compare_runs
from lcsc.report.run import Run
from lcsc.report.status import Status

HEADS = {"baseline": [2, 2], "select": [1, 2], "report": [1, 2]}


def cached_run(folder, seed=0, heads=(1, 2), **settings):
    """A run whose records tell the heads and the cache of their candidates; trials take 1 to 4 heads in turn."""
    path = make_fake_run(folder, num_trials=8, samples=False, seed=seed, **settings)
    records = []
    for record in map(json.loads, (path / "journal.jsonl").read_text().splitlines()):
        counts = HEADS.get(record["kind"])
        if record["kind"] == "trial":
            counts = [1 + record["uid"] % 4, 2]
        if record["kind"] == "report" and record["who"] == "best":
            counts = list(heads)
        if counts:
            record |= {"num_kv_heads": counts, "cache_bytes_per_token": 64 * sum(counts)}
        records.append(record)
    (path / "journal.jsonl").write_bytes(framed(records))
    return path


def test_points_that_nothing_beats():
    cost = np.array([4, 1, 2, 2, 3, 1])
    loss = np.array([1.0, 5.0, 3.0, 2.5, 2.5, 5.0])
    assert pareto(cost, loss).tolist() == [True, True, False, True, False, False]


def test_a_run_shows_its_trials_and_baselines(tmp_path):
    run = Run.open(cached_run(tmp_path / "run"))
    (points,) = cache_points([run])
    trials, baselines = points[points["kind"] == "trial"], points[points["kind"] == "baseline"]
    scored = [r for r in run._records("trial") if r["value"] is not None]
    assert trials["value"].tolist() == [r["value"] for r in scored]
    assert trials["cache_bytes_per_token"].tolist() == [64 * (3 + r["uid"] % 4) for r in scored]
    assert set(baselines["heads"]) == {"2 2"}
    assert points["pareto"].sum() >= 1
    with fine():
        files = cache_files([run])
    assert set(files) == {"cache.png", "cache.csv"}
    assert pd.read_csv(io.BytesIO(files["cache.csv"]))["value"].tolist() == points["value"].tolist()
    assert Image.open(io.BytesIO(files["cache.png"])).size == (1800, 920)
    coded = make_fake_run(tmp_path / "coded", num_trials=8, samples=False)
    records = [json.loads(line) for line in (coded / "journal.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "trial":
            record |= {"bits": [2, 1 + record["uid"]], "file_bytes": 1000 + record["uid"]}
    (coded / "journal.jsonl").write_bytes(framed(records))
    with fine():
        files = cache_files([Run.open(coded)])
    assert set(files) == {"size.png", "size.csv"}
    table = pd.read_csv(io.BytesIO(files["size.csv"]))
    assert table["file_bytes"].tolist() == [1000 + r["uid"] for r in records if r["kind"] == "trial" and r["value"]]
    assert cache_files([Run.open(make_fake_run(tmp_path / "plain", num_trials=3, samples=False))]) == {}


def test_several_runs_show_their_results(tmp_path):
    sizes = {"a": ((1, 1), 90.0), "b": ((1, 2), 80.0), "c": ((4, 4), 70.0)}
    paths = [cached_run(tmp_path / name, heads=heads, best=best) for name, (heads, best) in sizes.items()]
    (points,) = cache_points(map(Run.open, paths))
    ours = points[points["who"] == "best"]
    assert dict(zip(ours["run"], ours["cache_bytes_per_token"], strict=True)) == {"a": 128, "b": 192, "c": 512}
    assert ours["pareto"].tolist() == [True, True, True]
    assert not points[points["who"] != "best"]["pareto"].any()
    page = compare_runs(paths, tmp_path / "out")
    assert "Loss against cache" in page.read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"cache.png", "cache.csv"}


def test_a_long_front_is_listed_from_end_to_end(tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=30, samples=False)
    records = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "trial":
            uid = record["uid"]
            record |= {"num_kv_heads": [uid + 1], "cache_bytes_per_token": 64 * (uid + 1), "value": 200.0 - uid}
    (path / "journal.jsonl").write_bytes(framed(records))
    run = Run.open(path)
    (points,) = cache_points([run])
    texts = [text.get_text() for text in draw(points, [run]).texts]
    listed = [text for text in texts if " B  " in text]
    assert listed[0].endswith("  1")
    assert listed[-1].endswith("  30")
    assert f"{len(listed)} of 30 points of the line" in texts


def test_trials_beyond_a_budget_are_drawn_hollow_and_are_not_the_best(tmp_path):
    path = make_fake_run(tmp_path / "run", num_trials=6, samples=False, finished=False)
    records = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "trial":
            record |= {"value": 100.0 + record["uid"], "status": "ok", "may_win": record["uid"] >= 2}
    (path / "journal.jsonl").write_bytes(framed(records))
    run = Run.open(path)
    assert run.best["uid"] == 2
    assert run.trials()["best_so_far"].tolist()[2:] == [102.0] * 4
    assert run.trials()["best_so_far"].isna().tolist() == [True, True, False, False, False, False]
    ax = run.plot_convergence().axes[0]
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_ydata().tolist() for line in hollow] == [[100.0, 101.0]]
    assert "2 beyond the budget" in " ".join(text.get_text() for text in ax.texts)
    assert dict(Status(run).rows())["best so far"].startswith("102.0 (trial 2")

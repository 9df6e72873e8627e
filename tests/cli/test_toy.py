"""The whole chain on the problem with a known answer: search, report, export, verify, sweep, compare."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_cli import TOY

from lcsc.bank import CheckpointBank
from lcsc.cli.main import main
from lcsc.core.registry import build
from lcsc.export.weights import read_recipe
from lcsc.models.network import load_network
from lcsc.search.frames import read_records


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the toy was searched, and what the search printed; not to be touched."""
    folder, out = tmp_path_factory.mktemp("made"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lcsc"])
        assert main(["search", *TOY]) == 0
    return folder, out.getvalue()


@pytest.fixture
def run(here, made):
    """A finished toy run in a folder of its own."""
    folder, out = made
    shutil.copytree(folder, here, dirs_exist_ok=True)
    (path,) = (p.parent for p in here.glob("runs/*/run.json"))
    return path, out


def test_finds_the_known_optimum(run, here):
    path, out = run
    summary = json.loads((path / "summary.json").read_text())
    assert summary["report"]["ratio"] < 0.5
    assert summary["num_checkpoints"] == 12
    assert summary["num_coefficients"] == 11
    assert summary["num_trials"] == 30
    assert summary["metric"] == "fid_pixels"
    assert summary["nfe"] == 15
    assert sum(row["coef"] for row in summary["coefficients"]) == pytest.approx(1, abs=1e-9)
    assert set(summary["report"]["baselines"]) == {"last", "best_single", "ema", "power_ema", "uniform", "wsm"}
    worst = max(row["value"] for row in summary["report"]["baselines"].values())
    assert summary["report"]["best"]["value"] < worst
    value = f"{summary['report']['best']['value']:.3g}"[:5]
    assert "ratio" in out
    assert value in out
    # the exported network is the combination of the checkpoints, in plain arithmetic
    bank = CheckpointBank.open(here / "banks" / "toy_gaussian")
    coef_K = np.array([row["coef"] for row in summary["coefficients"]])
    wanted_P = coef_K @ bank.matrix().double().numpy()
    got_P = bank.layout.flatten(load_network(path / "best").state_dict()).numpy()
    np.testing.assert_allclose(got_P, wanted_P, atol=1e-5)


@pytest.mark.faults
def test_a_longer_search_comes_close_to_the_truth_exactly(here, lcsc):
    """The Fréchet distance of what the exported network samples to the truth, in closed form.

    For a Gaussian denoiser every sampler is affine in the noise, pixel by pixel, so the mean and the standard
    deviation of its samples are the images of noise 0 and the slope.
    """
    code, _, err = lcsc("search", *TOY, "search.num_trials=250", "search.num_images=400", "run_dir=long", "quiet=true")
    assert code == 0, err
    truth, sampler = build("dataset", "gaussian"), build("sampler", "heun", num_steps=8)

    @torch.no_grad()
    def distance(folder):
        denoise = functools.partial(build("model", "direct").denoise, load_network(folder))
        mean, one = (sampler(denoise, torch.full((1, 1, 2, 2), value))[0].double() for value in (0.0, 1.0))
        return float(((mean - truth.mean_CHW) ** 2 + ((one - mean).abs() - truth.std_CHW) ** 2).sum())

    bank = CheckpointBank.open(here / "banks" / "toy_gaussian")
    singles = [distance(row.path.parent) for row in bank.rows]
    assert distance(here / "long" / "best") < 0.1 * min(singles)


def test_a_descent_finds_the_optimum_and_continues_bit_for_bit(here, lcsc):
    words = ["search", *TOY, "searcher=gradient", "search.num_trials=40", "search.num_images=100", "quiet=true"]
    code, _, err = lcsc(*words)
    assert code == 0, err
    (path,) = (p.parent for p in here.glob("runs/*/run.json"))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["report"]["ratio"] < 0.5
    records, _ = read_records(path / "journal.jsonl")
    trials = [record for record in records if record["kind"] == "trial"]
    assert [record["block"] for record in trials] == list(range(40))
    assert trials[0]["image_forwards"] == 4 * 100 * 15
    assert summary["image_forwards"] == sum(record.get("image_forwards", 0) for record in records)
    whole = (path / "journal.jsonl").read_bytes()
    (path / "journal.jsonl").write_bytes(whole[: len(whole) // 2])  # torn in the middle of a record
    (path / "summary.json").unlink()
    assert lcsc(*words)[0] == 0
    assert (path / "journal.jsonl").read_bytes() == whole


def test_run_directory_is_as_described(run):
    path, _ = run
    names = {p.name for p in path.iterdir()}
    assert {"run.json", "journal.jsonl", "timing.jsonl", "samples.npz", "summary.json", "best", "report"} <= names
    assert (path / "report" / "report.html").stat().st_size > 10_000
    assert json.loads((path / "run.json").read_text())["fingerprints"]["protocol"] == 2
    records, _ = read_records(path / "journal.jsonl")
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "floor"
    assert kinds.count("trial") == 30
    assert kinds.count("select") == 15 + 3  # the best of each baseline family, each once; finalists
    assert kinds.count("report") == 7
    images = np.load(path / "samples.npz")
    assert images["best"].shape == images["last"].shape == images["ema"].shape == (64, 1, 2, 2)


def test_the_same_line_again_changes_nothing(run, lcsc):
    path, _ = run
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    code, out, _ = lcsc("search", *TOY)
    assert code == 0
    assert "finished already" in out
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


@pytest.mark.parametrize("format", ["diffusers", "safetensors"])
def test_export_scores_what_the_run_scored(run, here, lcsc, format):
    path, _ = run
    code, out, err = lcsc("export", f"run={path}", "to=out", f"format={format}", "max_shard_size=20")
    assert code == 0, err
    best = json.loads((path / "summary.json").read_text())["report"]["best"]
    assert f"scores {best['value']:.6g}" in out
    recipe = read_recipe(here / "out")
    assert recipe["coef"] == [row["coef"] for row in json.loads((path / "summary.json").read_text())["coefficients"]]
    assert [len(parent["files"]) for parent in recipe["parents"]] == [1] * 12
    card = (here / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "exactly the run's" in card
    assert "lcsc search experiment=toy_gaussian" in card
    code, out, err = lcsc("verify", "out")  # the recipe names the bank, and rebuilding it gives the same bits
    assert (code, err) == (0, "")
    if format == "diffusers":
        assert len(list((here / "out").glob("*.safetensors"))) == 2  # sharded: two tensors of 16 bytes
        for name, tensor in load_network(here / "out").state_dict().items():
            assert torch.equal(tensor, load_network(path / "best").state_dict()[name])


def test_report_verb_draws_again(run, lcsc):
    path, _ = run
    page = path / "report" / "report.html"
    page.unlink()
    code, out, _ = lcsc("report", f"run={path}")
    assert code == 0
    assert page.exists()
    assert "ratio" in out


@pytest.mark.slow
def test_sweep_and_comparison(here, lcsc):
    code, out, err = lcsc("search", "-m", *TOY, "search.num_trials=8", "searcher=cma,random", "seed=1", "quiet=true")
    assert code == 0, err
    runs = sorted(here.glob("runs/*/summary.json"))
    assert len(runs) == 2
    found = {
        (info["config"]["searcher"]["name"], info["config"]["seed"])
        for info in (json.loads((r.parent / "run.json").read_text()) for r in runs)
    }
    assert found == {("cma", 1), ("random", 1)}
    code, out, err = lcsc("report", "runs=runs/*")
    assert code == 0, err
    assert out.count("random") >= 1
    assert (here / "comparison" / "comparison.html").exists()


@pytest.mark.faults
def test_two_lines_make_a_front_of_quality_against_calls(here, lcsc):
    """One set of coefficients for each NFE, all from the same bank, against the baselines tuned at that NFE."""
    words = [*TOY, "sampler=euler", "search.num_trials=3", "quiet=true"]
    code, _, err = lcsc("search", "-m", *words, "sampler.num_steps=1,2")
    assert code == 0, err
    code, _, err = lcsc("report", "runs=runs/*")
    assert code == 0, err
    runs = [json.loads(file.read_text()) for file in here.glob("runs/*/run.json")]
    assert sorted(run["nfe"] for run in runs) == [1, 2]
    assert len({run["fingerprints"]["bank"] for run in runs}) == 1
    points = pd.read_csv(here / "comparison" / "front.csv").query("who == 'best'").set_index("run")
    for file in here.glob("runs/*/summary.json"):
        summary, point = json.loads(file.read_text()), points.loc[file.parent.name]
        assert (point["nfe"], point["coefficients"]) == (summary["nfe"], "a set for each NFE")
        assert point["value"] == pytest.approx(summary["report"]["best"]["value"], rel=1e-12)
    page = (here / "comparison" / "comparison.html").read_text(encoding="utf-8")
    assert base64.b64encode((here / "comparison" / "front.png").read_bytes()).decode() in page


def test_list_shows_every_part_with_its_source(lcsc):
    code, out, _ = lcsc("list", "metrics", "operator")
    assert code == 0
    for word in ("fid_digits", "kid", "1706.08500", "1801.01401", "linear", "2404.02241", "whitening"):
        assert word in out
    assert "euler" not in out

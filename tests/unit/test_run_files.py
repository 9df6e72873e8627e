"""What a finished search leaves beside its journal: summary, report and cards say what a user of the model needs."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import sys

import pytest

from lcsc.bank import CheckpointBank
from lcsc.cli.export import export_run
from lcsc.core.errors import ConfigError, MissingExtraError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.network import load_network
from lcsc.operators.base import Candidate
from lcsc.report.html import write_report
from lcsc.report.run import Run
from lcsc.report.tables import number, report_text
from lcsc.search.budget import Budget
from lcsc.search.engines.inline import Inline
from lcsc.search.problem import Problem
from lcsc.search.run import few_images, run_search

NET = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
BUDGET = Budget(4, 40, 2, 60, 80)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Four checkpoints of an ideal denoiser."""
    return trained(tmp_path_factory.mktemp("toy") / "bank", NET, build("dataset", "gaussian"))


def trained(out, net, data):
    trainer = build("trainer", "gaussian_toy", num_checkpoints=4)
    return trainer.train(arch=net, model=build("model", "direct"), dataset=data, out=out, seed=0, progress=False)


def problem_of(bank, objective="sample_quality", *, search_times=False, budget=BUDGET, searcher="gradient", **settings):
    given = {"model": "direct", "dataset": "gaussian", "metric": "fid_pixels"}
    parts = {kind: settings.pop(kind, None) or build(kind, name) for kind, name in given.items()}
    parts["sampler"] = build("sampler", "euler", num_steps=3, sigma_max=5.0, search_times=search_times)
    scorer = build("objective", objective, **parts, **settings, device="cpu")
    operator = build("operator", "linear")
    return Problem(CheckpointBank.open(bank), operator, build("searcher", searcher), scorer, budget, seed=0)


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


# ---- searched noise levels


@pytest.fixture(scope="module")
def timed(bank, tmp_path_factory):
    """A finished search of weights and noise levels at 1 and 3 network calls."""
    problem = problem_of(bank, "fid_nfe", search_times=True, nfe=[1, 3])
    return run_search(problem, name="toy", runs_dir=tmp_path_factory.mktemp("runs"), quiet=True)


class Given:
    """A sampler on the levels that a card gives."""

    def __init__(self, sampler, levels):
        self.sampler, self.levels, self.sigma_max = sampler, levels, sampler.sigma_max

    def nfe(self):
        return self.sampler.nfe()

    def __call__(self, denoise, noise_NCHW, labels_N=None, *, rng=None):
        return self.sampler.run(self.levels, denoise, noise_NCHW, labels_N, rng=rng)


def test_a_model_used_as_its_card_says_has_the_cards_score(timed, bank):
    summary, card = summary_of(timed), (timed / "best" / "README.md").read_text()
    (found,) = re.findall(r"^- 3 network evaluations, `Euler\(num_steps=3, .*`: `levels = \[(.*)\]`$", card, re.M)
    levels = [float(level) for level in found.split(", ")]
    assert summary["levels"] == {"3": levels}  # one call has no level to move
    own = problem_of(bank)
    net, sampler = load_network(timed / "best"), own.objective.sampler
    assert levels[0] == 5.0
    assert levels != sampler.levels()

    def score(sampler):
        layout = own.bank.layout
        candidate = Candidate(NET, layout, lambda theta_P: layout.flatten(net.state_dict(), theta_P), {})
        metric = build("objective", "sample_quality", model=own.objective.model, sampler=sampler,
                       metric=own.objective.metric, dataset=own.objective.dataset, device="cpu")  # fmt: skip
        return metric(candidate, seed=0, purpose=Purpose.REPORT, images=range(80)).value

    lines = [json.loads(line) for line in (timed / "journal.jsonl").read_text().splitlines()]
    best = next(line for line in lines if line["kind"] == "report" and line["who"] == "best")
    wanted = best["others"]["fid_pixels@3"]["value"]
    assert score(Given(sampler, levels)) == pytest.approx(wanted, rel=1e-9)
    assert score(sampler) != pytest.approx(wanted, rel=1e-3)


def test_the_report_shows_searched_levels_in_full(timed, bank, tmp_path):
    page = write_report(timed).read_text(encoding="utf-8")
    levels = ", ".join(map(repr, summary_of(timed)["levels"]["3"]))
    assert f'<td class="left">searched noise levels at 3 NFE</td><td class="left">{levels}</td>' in page
    plain = run_search(problem_of(bank), name="toy", runs_dir=tmp_path, quiet=True)
    assert summary_of(plain)["levels"] == {}
    assert "levels" not in (plain / "best" / "README.md").read_text()


# ---- engines that cannot start

BROKEN = [
    ("slurm", {"cluster": "moon"}, ConfigError, None),
    ("slurm", {}, MissingExtraError, "submitit"),
    ("ray", {}, MissingExtraError, "ray"),
]


@pytest.mark.parametrize(("name", "settings", "error", "package"), BROKEN)
def test_an_engine_that_cannot_start_leaves_nothing(bank, tmp_path, monkeypatch, name, settings, error, package):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    where = {"runs_dir": tmp_path, "run_dir": tmp_path / "mine" if name == "ray" else None}
    with pytest.raises(error, match=f"engine.*{name}"):
        run_search(problem_of(bank), name="toy", quiet=True, engine=build("engine", name, **settings), **where)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_cannot_start_leaves_what_another_began(bank, tmp_path):
    class Interrupting(Inline):
        def start(self, site):
            crew = super().start(site)
            crew.collect = lambda timeout=None: (_ for _ in ()).throw(KeyboardInterrupt)
            return crew

    def search(engine):
        run_search(problem_of(bank), name="toy", runs_dir=tmp_path, quiet=True, engine=engine)

    with pytest.raises(KeyboardInterrupt):
        search(Interrupting())
    (run,) = tmp_path.iterdir()
    with pytest.raises(ConfigError):
        search(build("engine", "slurm", cluster="moon"))
    assert (run / "run.json").is_file()
    assert list(tmp_path.iterdir()) == [run]


# ---- vetoes


def test_vetoes_of_guards_are_in_summary_report_and_terminal(bank, tmp_path):
    budget = dataclasses.replace(BUDGET, guards={"kid_pixels": 0.0})
    others = (build("metric", "kid_pixels"),)
    problem = problem_of(bank, budget=budget, searcher="random", other_metrics=others)
    path = run_search(problem, name="toy", runs_dir=tmp_path, quiet=True)
    lines = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    selected = [line for line in lines if line["kind"] == "select"]
    rival = min((row for row in selected if not row["label"].startswith("trial")), key=lambda row: row["value"])
    worse = [row for row in selected if "vetoed" in row]
    assert worse  # random trials are worse than the best baseline
    assert all(row["label"].startswith("trial") for row in worse)
    assert all(row["others"]["kid_pixels"]["value"] > rival["others"]["kid_pixels"]["value"] for row in worse)
    summary = summary_of(path)
    assert [row["label"] for row in summary["vetoed"]] == [row["label"] for row in worse]
    assert [row["value"] for row in summary["vetoed"]] == [row["value"] for row in worse]
    page = html.unescape(write_report(path).read_text(encoding="utf-8"))
    for row in summary["vetoed"]:
        assert row["reason"].startswith("`kid_pixels` is ")
        said = f"{row['label']}, {number(row['value'])} on the select seeds, is vetoed by a guard: {row['reason']}."
        assert said in report_text(Run.open(path))
        assert f'<p class="faint">{said}</p>' in page


# ---- exports


def test_an_exports_card_has_the_same_table_of_places_as_the_runs(timed, tmp_path):
    export_run(timed, tmp_path / "out")
    rows, table = [], "| model | distance from last | sum of abs(coef) | max abs(coef) |"
    for card in (timed / "best" / "README.md", tmp_path / "out" / "README.md"):
        text = card.read_text()
        assert table in text
        rows.append(text[text.index(table) : text.index("## Use")])
    assert rows[0] == rows[1]
    assert rows[0].count("\n| ") == 1 + len(summary_of(timed)["report"]["baselines"])


# ---- too few images


def test_fewer_images_than_features_are_noted(tmp_path, capsys):
    data, metric = build("dataset", "gaussian", shape=[1, 8, 8]), build("metric", "fid_digits")  # 64 features
    net = {"class": "GaussianDenoiser", "config": {"shape": [1, 8, 8]}}
    bank = trained(tmp_path / "bank", net, data)

    def notes(**sizes):
        budget = dataclasses.replace(BUDGET, **sizes)
        return few_images(problem_of(bank, dataset=data, metric=metric, budget=budget))

    said = "not above the 64 features of detector `digits`, so their covariance is singular and `fid_digits` strongly"
    said += " biased; such scores compare only with those of equally many images."
    assert notes() == [f"note: `search.num_images` (40) and `search.num_images_select` (60): {said}"]
    assert notes(num_images=65, num_images_select=64) == [f"note: `search.num_images_select` (64): {said}"]
    assert notes(num_images=65, num_images_select=65) == []
    raced = {"num_images": 90, "num_images_select": 65, "prefixes": [30, 70]}
    assert notes(**raced) == [f"note: `search.prefixes` (30): {said}"]
    problem = problem_of(bank, dataset=data, metric=metric, searcher="random", budget=Budget(1, 40, 1, 70, 80))
    run_search(problem, name="toy", runs_dir=tmp_path)
    assert f"note: `search.num_images` (40): {said}" in capsys.readouterr().out.splitlines()

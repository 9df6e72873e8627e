"""Objectives of the user's own, from a command line to a finished, exported run; and losses that need no sampler."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_cli import TOY

from lcsc.bank import Layout
from lcsc.cli.train import train
from lcsc.config.hydra_app import compose_config
from lcsc.core import registry
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.network import load_network
from lcsc.objectives.command import fill_in
from lcsc.operators.base import Candidate
from lcsc.search.run import run_search
from lcsc.search.setup import build_objective, build_problem, refuse_code

#: The toy with a handful of evaluations.
SMALL = [*TOY, "bank.last=2", "search.num_trials=3", "search.num_finalists=1", "quiet=true"]

#: The last of the network's numbers, standard deviation of the last pixel: the best one is nearest to 0.1.
LAST = "tail -c 4 {path}/*.safetensors | od -A n -t f4 | awk '{d = $1 - 0.1; print d * d + 1%s}'"

SCORER = '''
import torch

calls = []


def gap(model, *, seed, purpose, images):
    """How far the standard deviation of the last pixel is from 0.1, without an error."""
    calls.append((type(model).__name__, model.training, seed, purpose.name, images))
    return 1 + (model.std_CHW[-1, -1, -1] - 0.1) ** 2 + torch.randn(()) * 0
'''


@pytest.fixture(scope="module")
def candidate():
    """A toy network's tensors as a candidate."""
    arch = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
    tensors = {"mean_CHW": torch.arange(4.0).reshape(1, 2, 2), "std_CHW": torch.full((1, 2, 2), 0.5)}
    layout = Layout.of(dict.fromkeys(tensors, (1, 2, 2)))
    return Candidate(arch, layout, lambda theta_P: layout.flatten(tensors, theta_P), {})


def command(text, **settings):
    return build("objective", "command", command=text, **settings)


def score(objective, candidate, purpose=Purpose.SELECT, images=range(30, 90), full=True):
    return objective(candidate, seed=7, purpose=purpose, images=images, full=full)


def words_of(name, **fields):
    """The objective `name` with its fields, as words."""
    return [f"objective={name}", *(f'objective.{key}="{value}"' for key, value in fields.items())]


def found_in(path):
    """A finished run's summary, journal and run.json, and the last standard deviation of the winner's pixels."""
    summary, info = (json.loads((path / f"{name}.json").read_text()) for name in ("summary", "run"))
    records = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    last = float(load_network(path / "best").std_CHW.detach().flatten()[-1])
    return summary, records, info, last


def searched(*words):
    """The same search without the command line and without its report."""
    config = compose_config([*SMALL, *words])
    train(config)
    return found_in(run_search(build_problem(config, trust=True), name="x", quiet=True))


def test_a_command_is_searched_exported_and_reported(here, lcsc):
    words = [*SMALL, *words_of("command", command=LAST % ", 0.5", label="gap")]  # with a standard error
    code, out, err = lcsc("search", *words)
    assert code == 0, err
    (path,) = (p.parent for p in here.glob("runs/*/summary.json"))
    summary, records, info, last = found_in(path)
    assert summary["report"]["best"]["value"] == pytest.approx(1 + (last - 0.1) ** 2, rel=1e-5)
    assert summary["report"]["best"]["se"] == 0.5
    assert (summary["metric"], summary["nfe"], summary["floor"], summary["detector"]) == ("gap", 1, None, "command")
    assert [r["image_forwards"] for r in records if r["kind"] == "trial"] == [64] * 3
    assert "gap" in out
    assert not {"model", "sampler", "metric", "dataset"} & set(info["config"])
    code, _, err = lcsc("export", f"run={path}", "to=out", "trust=true")  # built again from the run's configuration
    assert code == 0, err
    again = build_problem(info["config"], trust=True)
    assert run_search(again, name="gap", quiet=True) == path.relative_to(here)  # found again


def test_what_a_strangers_run_names_is_not_run_unasked(here, lcsc):
    """A command, a function and a part of another package, put into a finished run's configuration."""
    info = searched(*words_of("command", command="echo 3"))[2]
    theirs = f"run=runs/{info['run_id']}"
    file = here / "runs" / info["run_id"] / "run.json"
    (here / "evil_scores.py").write_text("open('pwned', 'w')\ndef score(model, **circumstances):\n    return 3.0\n")

    def set_objective(**objective):
        file.write_text(json.dumps({**info, "config": {**info["config"], "objective": objective}}))

    for objective, said in (
        (
            {"name": "command", "command": "touch pwned;\necho 3"},
            r"asks to run the command `touch pwned;\necho 3`, and",
        ),
        ({"name": "function", "function": "evil_scores:score"}, "asks to run the function `evil_scores:score`, and"),
    ):
        set_objective(**objective)
        code, _, err = lcsc("export", theirs, "to=out")
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err
        assert "add `trust=true`" in err
        assert not (here / "pwned").exists()
        assert not (here / "out").exists()
    set_objective(name="command", command="touch pwned; echo 3")
    assert lcsc("export", theirs, "to=out", "trust=yes")[2].startswith("lcsc: `trust` is `yes`; it must be")
    assert lcsc("export", theirs, "to=out", "trust=true")[0] == 0
    assert (here / "pwned").exists()


def test_a_part_of_another_package_is_not_run_unasked(monkeypatch):
    @dataclass(frozen=True)
    class Foreign:
        """An objective of somebody's package."""

    monkeypatch.setattr(Foreign, "__module__", "lcsc_theirs.objective")
    monkeypatch.setitem(registry._PARTS["objective"], "theirs", registry.Part("objective", "theirs", Foreign, "x", {}))
    parts = {"operator": {"name": "linear"}, "searcher": {"name": "auto"}, "other_metrics": [{"name": "kid_pixels"}]}
    with pytest.raises(ConfigError, match="objective `theirs` of the package `lcsc_theirs.objective`, and nothing"):
        build_problem({**parts, "objective": {"name": "theirs"}})
    config = {**parts, "objective": {"name": "sample_quality"}}
    monkeypatch.setitem(registry._PARTS["detector"], "theirs", registry.Part("detector", "theirs", Foreign, "x", {}))
    refuse_code(config)
    with pytest.raises(ConfigError, match="detector `theirs` of the package"):
        refuse_code({**config, "metric": {"name": "fid", "detector": "theirs"}})


def test_a_function_is_searched(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(here)])
    (here / "my_scorer.py").write_text(SCORER)
    summary, _, info, last = searched(*words_of("function", function="my_scorer:gap"))
    assert summary["report"]["best"]["value"] == pytest.approx(1 + (last - 0.1) ** 2, rel=1e-6)
    assert summary["report"]["best"]["se"] is None
    assert "±" not in Path("runs", info["run_id"], "best", "README.md").read_text().split("| model |")[0]
    calls = sys.modules.pop("my_scorer").calls
    assert ("GaussianDenoiser", False, 0, "REPORT", range(200)) in calls
    assert {purpose for _, _, _, purpose, _ in calls} == {"SEARCH", "SELECT", "REPORT"}


def test_a_search_says_which_checkpoints_are_the_same(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path, str(here)])
    (here / "my_scorer.py").write_text(SCORER)
    config = compose_config([*SMALL, *words_of("function", function="my_scorer:gap"), "bank.last=3"])
    train(config)
    run_search(build_problem(config, trust=True), name="x")
    assert "duplicates" not in capsys.readouterr().out
    first, _, last = build_problem(config, trust=True).bank.rows
    shutil.copy(first.files[0], last.files[0])
    run_search(build_problem(config, trust=True), name="x")
    sys.modules.pop("my_scorer")
    said = f"note: duplicates, steps with the same bits: {first.step} = {last.step}"
    assert capsys.readouterr().out.splitlines().count(said) == 1


def test_a_held_out_loss_is_descended(here):
    summary, records, info, _ = searched(*words_of("denoising_loss"), "objective.sigma_data=0.15", "searcher=gradient")
    assert (summary["metric"], summary["nfe"], summary["floor"]) == ("denoising_loss", 1, None)
    assert [r["image_forwards"] for r in records if r["kind"] == "trial"] == [3 * 64] * 3
    assert summary["report"]["best"]["se"] > 0
    assert {"model", "dataset"} <= set(info["config"])
    assert not {"sampler", "metric"} & set(info["config"])


def test_only_the_parts_that_an_objective_has_are_built():
    config = {"objective": {"name": "command", "command": "true"}, "dataset": {"name": "npz", "path": "/absent.npz"}}
    assert build_objective(config).command == "true"
    config["objective"] = {"name": "denoising_loss"}
    with pytest.raises(ConfigError, match="found no file `/absent.npz`"):
        build_objective({**config, "model": {"name": "edm"}}).dataset.images()


def test_the_command_gets_the_candidate_and_the_circumstances(tmp_path, monkeypatch, candidate):
    """Also where a path holds what a shell would run."""
    evil = tmp_path / "a b;touch pwned $(touch pwned) 'c"
    evil.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(evil))
    monkeypatch.setattr("tempfile.tempdir", None)
    kept = tmp_path / "kept"
    text = f"cp -r {{path}} {kept}; echo first; echo {{seed}} {{purpose}} {{num_images}} {{first_image}} > said; echo 3"
    text += '; echo "$LCSC_PATH|$LCSC_SEED $LCSC_PURPOSE $LCSC_NUM_IMAGES $LCSC_FIRST_IMAGE" > env'
    found = score(command(text + "; echo 2.5 1e-1; echo"), candidate)
    assert (found.value, found.se, found.num_images, found.nfe) == (2.5, 0.1, 60, 1)
    assert (tmp_path / "said").read_text() == "7 select 60 30\n"
    where, _, rest = (tmp_path / "env").read_text().rpartition("|")
    assert (Path(where).is_relative_to(evil), rest) == (True, "7 select 60 30\n")
    assert not (tmp_path / "pwned").exists()
    assert list(evil.iterdir()) == []  # deleted
    for name, tensor in candidate.weights().items():
        assert torch.equal(load_network(kept).state_dict()[name], tensor)
    with pytest.raises(ConfigError, match=r"has `\{path\}` inside quotes.* set `TMPDIR` to a plainer path"):
        score(command('echo "{path}"'), candidate)
    assert fill_in("awk '{print}' {path}", {"path": "/a"}) == "awk '{print}' /a"
    assert shlex.split(fill_in(r"a \" {path} 'x{path}'", {"path": "/a-b"})) == ["a", '"', "/a-b", "x/a-b"]


def test_higher_is_better_and_scores_without_an_error(candidate):
    found = score(command("echo 0.75", higher_is_better=True, label="accuracy", nfe=4), candidate)
    assert (found.value, found.se, found.image_forwards) == (-0.75, None, 240)
    assert command("echo 1", higher_is_better=True, label="accuracy").name == "neg_accuracy"
    assert score(command("echo 1 0.5"), candidate, full=False).se is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo no >&2; echo out of memory >&2; exit 3", "ended with 3: out of memory$"),
        ("exit 1", "ended with 1: it said nothing$"),
        ("echo five", "printed `five` last; wanted is one finite number"),
        ("echo 1; echo nan", "printed `nan` last"),
        ("echo 1 2 3", "printed `1 2 3` last"),
        ("echo 1 -1", "printed `1 -1` last"),
        ("true", "printed `` last"),
    ],
)
def test_a_command_that_fails_is_a_failed_candidate(candidate, text, said):
    with pytest.raises(EvaluationError, match=said):
        score(command(text), candidate)


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path, candidate):
    began = time.monotonic()
    with pytest.raises(
        EvaluationError, match=r"took longer than `objective.timeout`, 0.3 s, and was killed; it said: hm$"
    ):
        score(command(f"echo hm >&2; sleep 60 & echo $! > {tmp_path}/pid; wait", timeout=0.3), candidate)
    assert time.monotonic() - began < 20
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child lives on")


def test_an_edited_script_is_another_evaluator(tmp_path):
    script = tmp_path / "score.sh"
    digests = set()
    for text in ("echo 1", "echo 2"):
        script.write_text(text)
        digests.add(command(f"sh {script} {{path}}").circumstances()["detector_digest"])
    assert len(digests) == 2


def test_a_function_gets_a_network_in_order(tmp_path, monkeypatch, candidate):
    """The weights are the candidate's whatever a function did to the network before; no architecture gives tensors."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "spoilers.py").write_text(
        "import torch\n"
        "def spoil(model, **circumstances):\n"
        "    value = float(model.mean_CHW.sum())\n"
        "    model.train().double().requires_grad_(True)\n"
        "    return value\n"
        "def random(model, **circumstances):\n    return torch.rand(())\n"
        "def keys(model, **circumstances):\n    return sum(t.sum() for t in model.values())\n"
        "def wrong(model, **circumstances):\n    raise RuntimeError('bad\\nluck')\n"
        "def text(model, **circumstances):\n    return 'good'\n"
        "def huge(model, **circumstances):\n    return 10**400\n"
        "def huger(model, **circumstances):\n    return 10**5000\n"
        "def leave(model, **circumstances):\n    raise SystemExit(3)\n"
        "value = 3\n"
    )

    def function(name, **settings):
        return build("objective", "function", function=f"spoilers:{name}", device="cpu", **settings)

    spoil = function("spoil", label="total", higher_is_better=True)
    assert spoil.name == "neg_total"
    assert [score(spoil, candidate).value for _ in range(3)] == [-6.0] * 3
    draws = [
        score(function("random"), candidate, purpose).value
        for purpose in (Purpose.SEARCH, Purpose.SEARCH, Purpose.REPORT)
    ]
    assert draws[0] == draws[1] != draws[2]
    bare = Candidate(None, candidate.layout, candidate.write, {})
    assert score(function("keys"), bare).value == 8.0
    with pytest.raises(EvaluationError, match=r"`spoilers:wrong` raised RuntimeError at spoilers.py:\d+: bad luck$"):
        score(function("wrong"), candidate)
    with pytest.raises(EvaluationError, match="returned `good`; wanted is one finite number"):
        score(function("text"), candidate)
    with pytest.raises(EvaluationError, match=f"returned `1{'0' * 79}`; wanted is one finite number"):
        score(function("huge"), candidate)
    with pytest.raises(EvaluationError, match="returned `a int`; wanted is one finite number"):
        score(function("huger"), candidate)
    with pytest.raises(EvaluationError, match=r"`spoilers:leave` raised SystemExit at spoilers.py:\d+: 3$"):
        score(function("leave"), candidate)
    diverged = Candidate(candidate.arch, candidate.layout, lambda theta_P: theta_P.fill_(np.nan), {})
    for objective in (function("keys"), command("echo 1")):
        with pytest.raises(EvaluationError, match="NaN or Inf"):
            score(objective, diverged)
    for name, said in [
        ("spoilers", "write `package.module:name`"),
        ("spoilers:absent", "but `spoilers` has no `absent`"),
        ("absent_module:f", "importing `absent_module` failed with ModuleNotFoundError"),
        ("spoilers:value", "a int and no function"),
    ]:
        with pytest.raises(ConfigError, match=said):
            build("objective", "function", function=name)

"""The experiment `gpt_digits` at a size for tests: runs and generator made, searched, resumed, exported, verified."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from lcsc import CheckpointBank
from lcsc.bank import Selection
from lcsc.bank.pack import write_pack
from lcsc.core import registry
from lcsc.core.errors import ConfigError
from lcsc.core.seeds import Purpose
from lcsc.datasets.digits import Digits
from lcsc.models.network import load_network
from lcsc.models.weight_generator import open_generator
from lcsc.report.generated import generated_notes
from lcsc.search.evaluate import head_of
from lcsc.searchers.base import Task
from lcsc.training import weight_fit
from lcsc.training.parameter_dit import ParameterDiTTrainer

TINY = {
    **{"num_runs": 8, "num_held_out": 2, "run_steps": 10, "num_saves": 4, "run_batch_size": 8, "num_steps": 6},
    **{"batch_size": 4, "width": 8, "freqs": 4, "sampler_steps": 2, "tokens": "neurons"},
}
NETWORK = {"class": "SmallClassifier", "config": {"hidden": [4]}}
WORDS = [
    *("experiment=gpt_digits", "network=classifier_hidden", "network.config.hidden=[4]", "run_dir=run", "quiet=true"),
    *(f"trainer.{key}={value}" for key, value in TINY.items()),
    *("operator.sampler_steps=2", "search.num_trials=6", "search.num_images=20", "search.num_finalists=2"),
    *("search.num_images_select=20", "search.num_images_report=450"),
]


def trained(out, **changes):
    trainer = ParameterDiTTrainer(**{**TINY, **changes})
    return trainer.train(arch=NETWORK, model=None, dataset=Digits(), out=out, seed=0, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished training; not to be touched."""
    return trained(tmp_path_factory.mktemp("made") / "bank")


@pytest.mark.slow
@pytest.mark.faults
def test_weights_are_learned_searched_resumed_exported_and_verified(here, lcsc):
    code, _, err = lcsc("search", *WORDS)
    assert code == 0, err
    run, bank = here / "run", here / "banks" / "gpt_digits"
    journal, summary = (run / "journal.jsonl").read_bytes(), json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in journal.splitlines()]
    assert summary["metric"] == "classification_loss"
    baselines = {"one_update", "nearest", "mean", "noisy", "sgd", "adam"}
    assert set(summary["report"]["baselines"]) == baselines
    tried = [r for r in records if r.get("kind") == "trial"] or [r for r in records if "proposal" in r]
    assert {r["proposal"] for r in tried} <= {"generated", "nearest", "mean", "noisy", "sgd", "adam"}

    # the copied training checkpoint is at no distance from itself, and the loss of it is what the search measured
    made = open_generator(bank / "generator")
    copied = next(r for r in records if r.get("family") == "nearest")
    assert copied["nearest"]["distance"] == 0
    net = load_network(run / "best")
    data, scorer = Digits(), registry.build("objective", "classification", dataset=Digits())
    rows = torch.from_numpy(scorer.half(Purpose.REPORT))
    with torch.no_grad():
        logits_NC = net(data.images()[rows]).logits
    loss = torch.nn.functional.cross_entropy(logits_NC, data.labels()[rows])
    assert float(loss) == pytest.approx(summary["report"]["best"]["value"], abs=1e-6)
    assert len(made.places) == 6 * 4

    # cut off in the middle and gone on with: the same bytes
    lines = journal.splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "best")
    assert lcsc("search", *WORDS)[0] == 0
    assert (run / "journal.jsonl").read_bytes() == journal

    code, _, err = lcsc("verify", str(run / "best"))
    assert code == 0, err
    code, _, err = lcsc(
        "transform", "operator=generate_weights", f"model={bank}", "operator.goals=1.9", "to=made"
    )  # fmt: skip
    assert code == 0, err
    code, _, err = lcsc("verify", "made")
    assert code == 0, err
    text = (run / "report" / "report.html").read_text()
    assert "nearest training checkpoint" in text


def test_a_training_that_was_interrupted_goes_on_with_the_same_bits(made, tmp_path, monkeypatch):
    whole = made

    class Interrupt(Exception):
        """As if the process died."""

    real, count = weight_fit._step, []

    def dying(*args):
        count.append(0)
        if len(count) == 5:
            raise Interrupt
        return real(*args)

    monkeypatch.setattr(weight_fit, "STATE_EVERY", 2)
    monkeypatch.setattr(weight_fit, "_step", dying)
    with pytest.raises(Interrupt):
        trained(tmp_path / "cut")
    assert not (tmp_path / "cut" / "generator").exists()
    monkeypatch.setattr(weight_fit, "_step", real)
    cut = trained(tmp_path / "cut")
    name = "generator/diffusion_pytorch_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert (cut / "train_log.jsonl").read_bytes() == (whole / "train_log.jsonl").read_bytes()
    assert CheckpointBank.open(cut).digest == CheckpointBank.open(whole).digest


def test_the_operator_says_what_it_cannot_do(made, tmp_path):
    bank = CheckpointBank.open(made)
    plan = registry.build("operator", "generate_weights", sampler_steps=2).plan(bank)
    assert plan.recipe["extrapolation"] is False
    beyond = registry.build("operator", "generate_weights", sampler_steps=2, goals=[2.0, 0.0]).plan(bank)
    assert beyond.recipe["extrapolation"] is True
    assert beyond.recipe["goals"] == [2.0, 0.0]
    told = json.loads((bank.path / "metrics.json").read_text())
    assert plan.recipe["start_metric"] == told["loss"]["0"]
    # a copy of the bank that lies elsewhere, as workers get it, is known by its content; another run is not
    write_pack(bank, tmp_path / "copy.safetensors")
    elsewhere = registry.build("operator", "generate_weights", sampler_steps=2, generator=str(bank.path / "generator"))
    assert elsewhere.plan(CheckpointBank.open(tmp_path / "copy.safetensors")).recipe == plan.recipe
    other = CheckpointBank.open(bank.path / "runs" / "run-00000.safetensors")
    with pytest.raises(ConfigError, match=r"operator\.start_metric"):
        elsewhere.plan(other)
    with pytest.raises(ConfigError, match="`operator.proposal` is `copied`"):
        registry.build("operator", "generate_weights", proposal="copied")
    with pytest.raises(ConfigError, match="`operator.goals` is"):
        registry.build("operator", "generate_weights", goals="low")


def test_runs_of_another_making_are_learned_from(made, tmp_path):
    again = trained(tmp_path / "again", runs=str(made / "runs"), num_steps=2, metric="error")
    found = open_generator(again / "generator")
    assert found.net.metric == "error"
    assert found.rivals == {}
    assert "time" not in found.measured


def test_steps_of_the_sampler_are_searched_where_they_are_null(made):
    bank = CheckpointBank.open(made)
    operator = registry.build("operator", "generate_weights", sampler_steps=None, post_noise=0.0)
    space = operator.space(bank)
    point = space.to_point([0.0] * space.size)
    (box,) = [box for box in space.boxes if box.name == "sampler_steps"]
    for x, count in ((box.lower, 1), (-1.0, 5), (0.0, 10), (1.0, 20), (box.upper, 50)):
        point["sampler_steps"][:] = x
        found = operator.apply(bank, point)
        assert found.recipe["sampler_steps"] == count
        other = registry.build("operator", "generate_weights", sampler_steps=count, post_noise=0.0)
        fixed = other.apply(bank, other.space(bank).to_point([0.0] * other.space(bank).size))
        assert torch.equal(bank.layout.flatten(found.weights()), bank.layout.flatten(fixed.weights()))
    fixed = registry.build("operator", "generate_weights").space(bank)
    assert "sampler_steps" not in [box.name for box in fixed.boxes]


def test_checkpoints_are_combined_with_what_is_generated(made):
    bank = CheckpointBank.open(made)
    operator = registry.build("operator", "generate_weights", sampler_steps=2, combine="all", post_noise=0.0)
    space = operator.space(bank)
    assert [box.level for box in space.boxes if box.name == "coef"] == [1]
    first = registry.build("searcher", "ladder").start(Task(space, 20, 0)).ask()  # refuses bounds of some boxes alone
    assert first.vector.shape == (space.size,)
    point = space.to_point([0.0] * space.size)
    alone = bank.layout.flatten(operator.apply(bank, point).weights())
    point["coef"][:] = [0.0, 0.25, 0.0, -0.5]
    mixed = operator.apply(bank, point)
    wanted_P = 1.25 * alone + 0.25 * bank.matrix()[1] - 0.5 * bank.matrix()[3]
    torch.testing.assert_close(bank.layout.flatten(mixed.weights()), wanted_P, atol=1e-6, rtol=0)

    record = head_of(mixed) | {"who": "best"}
    (sentence,) = generated_notes(SimpleNamespace(reports=[record]))
    assert "asked for" in sentence
    assert " and combined with 4 checkpoints: 1.25 of it and -0.25 of them in sum; it is" in sentence

    # planned again from one step of the bank, as `lcsc verify` does
    plan = operator.plan(bank, point)
    one = CheckpointBank.open(bank.path, select=Selection(bank.steps[0], bank.steps[0]))
    again = plan.settled.plan(one, point)
    assert again.recipe == plan.recipe
    (piece,), (other,) = plan.pieces, again.pieces
    tensors = bank.layout.views(bank.matrix()[0])
    for name, tensor in piece.made(tensors)[0].items():
        assert torch.equal(other.made(tensors)[0][name], tensor)

"""What a failed candidate cost is in its row: network evaluations until somebody noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc.bank import CheckpointBank, Layout
from lcsc.core.errors import EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.network import build_network, save_network
from lcsc.operators.base import Candidate
from lcsc.operators.linear import Linear
from lcsc.search.evaluate import Evaluator
from lcsc.search.racing import Racer

IMAGES = range(40)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_arch):
    folder = tmp_path_factory.mktemp("costs")
    torch.manual_seed(0)
    net = build_network(tiny_arch)
    for step in (1, 2):
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    return CheckpointBank.open(folder)


def evaluator(bank, name="sample_quality", **settings):
    parts = {"model": build("model", "edm"), "dataset": build("dataset", "digits")}
    if name != "denoising_loss":
        parts |= {"sampler": build("sampler", "euler", num_steps=3), "metric": build("metric", "fid_pixels")}
    objective = build("objective", name, **parts, batch_size=12, device="cpu", **settings)
    return Evaluator(bank, Linear(), objective, Linear().space(bank), 0)


def spoil(monkeypatch, kind, call, value=float("nan")):
    """Let the network call number `call` (from 0) of all batches give numbers that are none."""
    calls, real = [], kind.denoise

    def denoise(self, *args, **kwargs):
        calls.append(None)
        return real(self, *args, **kwargs) * (value if len(calls) == call + 1 else 1)

    monkeypatch.setattr(kind, "denoise", denoise)


@pytest.mark.parametrize(
    ("name", "settings", "calls", "cost"),
    [
        ("sample_quality", {}, (0, 0), 3 * 12),  # 3 calls a batch; the first batch of 12 is looked at after them
        ("sample_quality", {}, (7, 7), 3 * 36),  # in the third batch
        ("sample_quality", {}, (11, 11), 3 * 40),
        ("fid_nfe", {"nfe": [1, 3]}, (4, None), 1 * 40 + 3 * 12),  # 4 batches of 1 call, then as above
        ("fid_nfe", {"nfe": [1, 3]}, (None, 8), 4 * 40 + 3 * 12),  # a slope computes them again, and backwards
    ],
)
def test_diverged_samples_cost_what_was_sampled(bank, monkeypatch, name, settings, calls, cost):
    scorer = evaluator(bank, name, **settings)
    for call, measure in zip(calls, (scorer.score, scorer.slope), strict=True):
        if call is None:
            continue
        with monkeypatch.context() as patch:
            spoil(patch, type(scorer.objective.model), call)
            row = measure(np.zeros(1), Purpose.SEARCH, IMAGES)
        assert (row["value"], row["status"], row["image_forwards"]) == (None, "failed", cost), row
        assert "pixels are NaN or Inf" in row["reason"]


def test_weights_that_are_no_numbers_cost_nothing(bank):
    with np.errstate(all="ignore"):
        row = evaluator(bank).score(np.full(1, 1e300), Purpose.SEARCH, IMAGES)
    assert (row["status"], row["image_forwards"]) == ("failed", 0), row


def test_a_race_counts_the_stages_before(bank, monkeypatch):
    scorer = evaluator(bank)
    spoil(monkeypatch, type(scorer.objective.model), 8)  # 2 batches of the first 24 images take 6 calls
    row = Racer(scorer, (24, 40), 0.05).full(np.zeros(1))
    assert (row["status"], row["images"], row["image_forwards"]) == ("failed", 40, 3 * (24 + 12)), row


def test_a_race_for_several_nfes_counts_the_members_before(bank, monkeypatch):
    parts = {
        "model": build("model", "edm"),
        "dataset": build("dataset", "digits"),
        "sampler": build("sampler", "euler"),
    }
    metric = build("metric", "fid_pixels")
    objective = build("objective", "fid_nfe", **parts, metric=metric, nfe=[1, 2], batch_size=40, device="cpu")
    scorer = Evaluator(bank, Linear(), objective, Linear().space(bank), 0)
    spoil(monkeypatch, type(objective.model), 1)  # the first call of the second member, which takes two before it looks
    row = Racer(scorer, (40, 60), 0.05).full(np.zeros(1))
    assert (row["status"], row["image_forwards"]) == ("failed", 40 + 80), row


def test_a_loss_and_a_metric_that_break_cost_everything(bank, monkeypatch):
    loss = evaluator(bank, "denoising_loss")
    monkeypatch.setattr(type(loss.objective), "losses", lambda self, net, images, *_: images.sum((1, 2, 3)) * torch.nan)
    assert loss.score(np.zeros(1), Purpose.SEARCH, IMAGES)["image_forwards"] == 40
    scorer = evaluator(bank)

    def fail(self, state, reference):
        raise EvaluationError("no")

    monkeypatch.setattr(type(scorer.objective.metric), "compute", fail)
    assert scorer.score(np.zeros(1), Purpose.SEARCH, IMAGES)["image_forwards"] == 120
    assert scorer.slope(np.zeros(1), Purpose.SEARCH, IMAGES)["image_forwards"] == 120


@pytest.mark.parametrize("text", ["exit 3", "echo nan"])
def test_a_command_that_fails_counts_as_one_that_worked(text):
    layout = Layout.of({"x": (2,)})
    candidate = Candidate(None, layout, lambda theta_P: theta_P.fill_(1.0), {})
    with pytest.raises(EvaluationError) as error:
        build("objective", "command", command=text, nfe=4)(candidate, seed=0, purpose=Purpose.SEARCH, images=IMAGES)
    assert error.value.image_forwards == 160

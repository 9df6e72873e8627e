"""The demo itself with a tiny budget: train on real scans, search, report, export, load in diffusers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from helpers_cli import TINY_TRAINING

TINY = [
    *TINY_TRAINING,
    "search.num_trials=6",
    "search.num_images=40",
    "search.num_finalists=2",
    "search.num_images_select=60",
    "search.num_images_report=80",
    "train_if_missing=true",
]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "nfe"), [("digits", 5), ("digits_consistency", 1)])
def test_the_demo_chain(here, lcsc, experiment, nfe):
    code, out, err = lcsc("search", f"experiment={experiment}", *TINY)
    assert code == 0, err
    (path,) = (p.parent for p in here.glob("runs/*/run.json"))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["experiment"] == experiment
    assert summary["nfe"] == nfe
    assert summary["metric"] == "fid_digits"
    assert summary["detector"] == "digits"
    assert summary["num_checkpoints"] == 5
    assert summary["num_trials"] == 6
    kid = json.loads((path / "journal.jsonl").read_text().splitlines()[-1])["others"]["kid_digits"]
    assert kid["se"] > 0
    assert "ratio" in out
    assert "report.html" in out
    checkpoints = sorted((here / "banks" / experiment).glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == [f"checkpoint-{step:06d}" for step in (4, 8, 12, 16, 20)]
    net = UNet2DModel.from_pretrained(path / "best")
    sources = [UNet2DModel.from_pretrained(c / "unet").conv_in.bias.detach().double() for c in checkpoints]
    wanted = sum(row["coef"] * bias for row, bias in zip(summary["coefficients"], sources, strict=True))
    torch.testing.assert_close(net.conv_in.bias.detach().double(), wanted, atol=1e-6, rtol=1e-5)
    code, out, _ = lcsc("search", f"experiment={experiment}", *TINY)
    assert code == 0
    assert "finished already" in out

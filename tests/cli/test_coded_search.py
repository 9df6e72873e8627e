"""The demo's bank packed with loss, searched, and its winner made of the exact bank, as docs/codec.md shows it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers_cli import TINY_TRAINING
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank

LOSS = ["experiment=digits", *TINY_TRAINING, "objective=denoising_loss", "searcher=cma", "quiet=true"]
BUDGET = {"num_trials": 4, "num_images": 16, "num_finalists": 1, "num_images_select": 16, "num_images_report": 64}


def test_the_winner_of_a_lossy_bank_is_made_of_the_exact_one(here, lcsc):
    assert lcsc("train", *LOSS[:-3], "bank.path=exact")[0] == 0
    code, out, err = lcsc("bank", "pack", "from=exact", "to=packed", "codec=lossy", "bits_w=2", "anchor_every=5")
    assert (code, err) == (0, "")
    assert lcsc("bank", "unpack", "from=packed", "to=plain")[0] == 0
    assert CheckpointBank.open(here / "plain").digest == CheckpointBank.open(here / "packed").digest
    search = ["search", *LOSS, *(f"search.{key}={value}" for key, value in BUDGET.items()), "bank.path=packed"]
    assert lcsc(*search, "run_dir=run")[0] == 0
    assert CheckpointBank.open(here / "packed").digest != CheckpointBank.open(here / "exact").digest
    searched = json.loads((here / "run" / "summary.json").read_text())["report"]["best"]["value"]

    code, out, err = lcsc("export", "run=run", "to=out", "bank=exact")
    assert (code, err) == (0, "")
    made = load_file(here / "out" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].double()
    coefs = json.loads((here / "run" / "summary.json").read_text())["coefficients"]
    rows = CheckpointBank.open(here / "exact")
    biases = [rows.layout.views(row_P)["conv_in.bias"].double() for row_P in rows.matrix()]
    wanted = sum(row["coef"] * bias for row, bias in zip(coefs, biases, strict=True))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)
    value, apart = map(
        float, re.search(r"it scores (\S+), (\S+) from the run's on the bank that it searched", out).groups()
    )
    assert abs(value - searched) < 0.05 * searched  # the same coefficients of nearly the same checkpoints
    assert apart == pytest.approx(value - searched, rel=0.1, abs=1e-5)
    assert apart != 0
    assert lcsc("verify", "out", "bank=exact")[0] == 0
    assert lcsc("verify", "out", "bank=packed")[0] == 2  # which holds other numbers
    assert "searched in packed" in (here / "out" / "README.md").read_text()

    assert lcsc("bank", "pack", "from=exact", "to=few", "last=3", "codec=lossless")[0] == 0
    code, _, err = lcsc("export", "run=run", "to=out2", "bank=few")
    assert code == 2
    assert "`bank` is `few`, which does not hold steps 4 to 20" in err

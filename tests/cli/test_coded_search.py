"""The demo's bank packed with loss, searched, and its winner made of the exact bank, as docs/codec.md shows it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers_cli import TINY_TRAINING
from helpers_text import CONFIG, LLAMA, language_bank
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank
from lcsc.report.run import Run

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


def test_searched_bits_are_those_of_a_whole_bank(here, lcsc):
    language_bank(here / "bank")
    words = ["operator=compress", "experiment=codec_small", "bank.path=bank", "searcher=additive_front", "quiet=true"]
    words += ["operator.num_groups=2", "operator.mean_bits=8", "operator.anchor_every=3", "operator.tau=0.5"]
    words += ["objective.block_length=32", "search.num_trials=14", "search.num_images=8", "search.num_finalists=2"]
    words += ["search.num_images_select=8", "search.num_images_report=8", "searcher.at_most=27200"]
    pack = ["bank", "pack", "from=bank", "codec=lossy", "run=run"]
    words += ["objective=distillation", f"objective.teacher={max((here / 'bank').iterdir())}"]
    code, out, err = lcsc("search", *words, "run_dir=run")
    assert code == 0, err
    best = Run.open(here / "run").best
    assert best["file_bytes"] <= 27200  # where eight bits everywhere, a baseline, are nearest to the teacher
    assert 2 in best["bits"] or 3 in best["bits"]
    trials = [json.loads(line) for line in (here / "run" / "journal.jsonl").read_text().splitlines()]
    trials = [trial for trial in trials if trial["kind"] == "trial"]
    within = [trial["value"] for trial in trials if trial["file_bytes"] <= 27200]
    assert len(within) < len(trials)
    assert min(trial["value"] for trial in trials) < min(within)  # dearer ones are lower, and do not count
    assert Run.open(here / "run").trials()["best_so_far"].iloc[-1] == min(within)

    code, out, err = lcsc(*pack, "to=packed", "start=2")  # the chain that was searched
    assert (code, err) == (0, "")
    assert f"bits {', '.join(map(str, best['bits']))}, tau 0.5, an anchor every 3" in out
    coded = CheckpointBank.open(here / "packed")
    row = coded.layout.views(coded.matrix()[-1])
    made = load_file(here / "run" / "best" / "model.safetensors")
    assert all(torch.equal(row[name], made[name]) for name in made)
    exact = CheckpointBank.open(here / "bank")
    assert not torch.equal(row["lm_head.weight"], exact.layout.views(exact.matrix()[-1])["lm_head.weight"])
    sizes = [file.stat().st_size for file in sorted((here / "packed").iterdir())]
    assert sum(sizes) == pytest.approx(3 * best["file_bytes"], rel=0.02)

    def refused(*more, pack=pack):
        code, _, err = lcsc(*pack, *more, "to=out")
        assert code == 2
        assert not (here / "out").exists()
        return err

    assert "`tau` is given, and the search in `run=run` found its own" in refused("tau=1")
    assert "`run` is `run` and `codec` is `lossless`, which has no bits to take" in refused(
        "codec=lossless", "run=run", pack=pack[:3]
    )
    assert "`run` is a setting of a codec" in lcsc("bank", "pack", "from=bank", "to=out", "run=run")[2]
    shutil.rmtree(here / "bank")
    language_bank(here / "bank", {**LLAMA, "config": {**CONFIG, "num_hidden_layers": 1}})
    assert "which searched 2 groups of" in refused()
    (here / "run" / "summary.json").unlink()
    assert "`run` is not finished. Continue it with: " in refused()

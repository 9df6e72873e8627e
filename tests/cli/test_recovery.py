"""The experiment of lost stages at a size for tests: trained, searched, exported; and `lcsc transform` of one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_text import CONFIG
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SMALL = [
    *("operator=neighbor_recovery", "experiment=recovery_small", "quiet=true"),
    *(f"network.config.{key}={value}" for key, value in {**CONFIG, "num_hidden_layers": 4}.items()),
    "operator.lost=2",
    *("trainer.num_steps=6", "trainer.save_every=6", "trainer.batch_size=4", "trainer.block_length=32"),
    *("objective.block_length=32", "search.num_trials=4", "search.num_images=16", "search.num_finalists=1"),
    *("search.num_images_select=16", "search.num_images_report=32"),
]


@pytest.mark.slow
def test_a_search_repairs_a_model_and_a_transform_does_it_once(here, lcsc):
    code, _, err = lcsc("search", *SMALL, "train_if_missing=true", "run_dir=run")
    assert code == 0, err
    summary = json.loads((here / "run" / "summary.json").read_text())
    rules = {"average", "checkfree", "checkfree_plus", "copy_previous", "copy_next", "skip", "random"}
    assert set(summary["report"]["baselines"]) == rules
    assert summary["searcher_ran"] == "gradient"
    assert (here / "run" / "report" / "report.html").is_file()
    best, (model,) = here / "run" / "best", (here / "banks" / "recovery_small").glob("checkpoint-*6")
    assert len(json.loads((model / "gradient_norms.json").read_text())["layers"]) == 4  # what checkfree weighs by
    old, new = load_file(model / "model.safetensors"), load_file(best / "model.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {n for n in old if "layers.2." in n}
    assert not any(AutoModelForCausalLM.from_pretrained(best, output_loading_info=True)[1].values())

    words = ["operator=neighbor_recovery", f"model={model}", "to=out", "operator.lost=2"]
    code, out, err = lcsc("transform", *words, "operator.grad_norms=[1,2,3,4]", "operator.rule=checkfree")
    assert code == 0, err
    assert "to train on: a fresh optimizer and 1.1 times the learning rate for layers [2]" in out
    made = load_file(here / "out" / "model.safetensors")
    for name in (n for n in old if "layers.2." in n):
        before, after = (old[name.replace("layers.2.", f"layers.{i}.")].double() for i in (1, 3))
        torch.testing.assert_close(made[name], ((2 * before + 4 * after) / 6).float(), rtol=0, atol=1e-7)
    with safe_open(here / "out" / "model.safetensors", framework="pt") as handle:
        recipe = json.loads(handle.metadata()["lcsc_recipe"])
    assert (recipe["rule"], recipe["lost"], recipe["grad_norms"]) == ("checkfree", [2], [1.0, 2.0, 3.0, 4.0])
    assert recipe["train_on"] == {"fresh_optimizer_for_layers": [2], "lr_factor": 1.1}
    assert "| lost | [2] |" in (here / "out" / "README.md").read_text()
    for more, text in ((("operator.lost=7",), "the model has stages 0 to 3"), ((), "`operator.lost` is not set")):
        code, _, err = lcsc("transform", *words[:2], "to=no", *more)
        assert code == 2
        assert text in err
        assert err.count("\n") == 1

"""Sparse upcycling on the line: once, and as the experiment at a size for tests."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers_text import CONFIG
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TINY = [
    *("operator=sparse_upcycling", "experiment=upcycling_small", "run_dir=run", "train_if_missing=true"),
    *(f"network.config.{key}={value}" for key, value in {**CONFIG, "num_hidden_layers": 3, "head_dim": 4}.items()),
    *("trainer.num_steps=4", "trainer.save_every=4", "trainer.batch_size=4", "trainer.block_length=32"),
    *("objective.num_steps=2", "objective.block_length=32", "objective.train_batch_size=2", "operator.num_sparse=1"),
    *("search.num_trials=3", "search.num_images=16", "search.num_finalists=1", "search.num_images_select=16"),
    "search.num_images_report=16",
]


def test_one_model_becomes_a_mixture(here, lcsc):
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    net.save_pretrained(here / "model")
    words = ("transform", "operator=sparse_upcycling", "model=model")
    code, _, err = lcsc(*words, "to=out", "operator.num_experts=8")
    assert code == 0, err
    again, info = AutoModelForCausalLM.from_pretrained(here / "out", output_loading_info=True)
    assert not any(info.values())
    assert (type(again).__name__, again.config.num_local_experts) == ("MixtralForCausalLM", 8)
    ids = torch.arange(20)[None] * 7
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, net(ids).logits, rtol=0, atol=1e-5)
    with safe_open(here / "out" / "model.safetensors", framework="pt") as handle:
        assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in handle.keys()  # noqa: SIM118 - no mapping
        recipe = json.loads(handle.metadata()["lcsc_recipe"])
    assert [recipe[key] for key in ("layers", "num_experts", "top_k", "normalize")] == [[0, 1], 8, 2, True]
    card = (here / "out" / "README.md").read_text()
    assert "| num_experts | 8 |" in card
    code, _, err = lcsc("verify", "out")
    assert code == 0, err
    code, _, err = lcsc(*words, "to=more", "operator.top_k=9")
    assert code == 2
    assert "`operator.top_k` is 9 of 8 experts; take at most all of them." in err
    assert not (here / "more").exists()


@pytest.mark.faults
def test_the_experiment_is_searched_reported_exported_and_resumed(here, lcsc):
    code, _, err = lcsc("search", *TINY)
    assert code == 0, err
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["metric"] == "uptrained_loss"
    assert set(summary["report"]["baselines"]) >= {"alternate", "last_half"}
    assert (here / "run" / "report" / "report.html").is_file()
    net = AutoModelForCausalLM.from_pretrained(here / "run" / "best")
    assert type(net).__name__ == "Qwen3MoeForCausalLM"
    assert len(net.config.mlp_only_layers) == 2
    code, _, err = lcsc("verify", "run/best")
    assert code == 0, err
    journal = (here / "run" / "journal.jsonl").read_bytes()
    (here / "run" / "summary.json").unlink()
    lines = journal.splitlines(keepends=True)
    (here / "run" / "journal.jsonl").write_bytes(b"".join(lines[:-3]))
    shutil.rmtree(here / "run" / "best")
    code, _, err = lcsc("search", *TINY)
    assert code == 0, err
    assert (here / "run" / "journal.jsonl").read_bytes() == journal

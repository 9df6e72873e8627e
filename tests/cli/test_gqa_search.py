"""A search over key/value heads, from a folder of transformers to an export that transformers opens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

#: the stored heads of the candidate's own configuration: the fewest win
HEADS = "grep num_key_value_heads {path}/config.json | tr -dc 0-9"


@pytest.fixture
def searched(here, lcsc):
    """A finished run over one checkpoint; its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=4, **sizes)).save_pretrained(here / "model")
    words = ["name=gqa", "operator=gqa", "searcher=cma", "objective=command", "bank.path=model", "run_dir=run"]
    small = ["search.num_trials=4", "search.num_finalists=1", "search.num_images=1", "search.num_images_select=1"]
    code, _, err = lcsc(
        "search", *words, *small, "search.num_images_report=1", f"objective.command='{HEADS}'", "quiet=true"
    )
    assert code == 0, err
    return here / "run"


@pytest.mark.slow
def test_a_search_ends_with_a_model_of_transformers(here, lcsc, searched):
    best = json.loads((searched / "summary.json").read_text())["report"]["best"]
    for folder in (searched / "best", here / "out"):
        if not folder.exists():
            code, _, err = lcsc("export", f"run={searched}", "to=out", "trust=true")
            assert code == 0, err
        net, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert net.config.num_key_value_heads == best["value"] == 1
        card = (folder / "README.md").read_text()
        assert "library_name: transformers" in card
        assert "from transformers import LlamaForCausalLM" in card
        assert "# gqa: one checkpoint after `gqa`, chosen by lcsc" in card
        assert "| num_kv_heads | [1, 1, 1] |" in card
        assert "checkpoint-averaging" not in card
        code, out, err = lcsc("verify", str(folder))
        assert code == 0, err
        assert "bit for bit from 1 checkpoints of" in out
    config = here / "out" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    code, _, err = lcsc("verify", "out")
    assert code == 2
    assert "config.json` is not what the recipe gives" in err

"""The language-model experiment at a size for tests: trained, searched, reported, exported, opened by transformers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers_text import CONFIG
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lcsc.core.registry import build
from lcsc.core.seeds import Purpose

TINY = [
    "experiment=tiny_lm",
    *(f"network.config.{key}={value}" for key, value in CONFIG.items()),
    *("trainer.num_steps=12", "trainer.save_every=3", "trainer.batch_size=4", "trainer.block_length=32"),
    *("objective.block_length=32", "search.num_trials=5", "search.num_images=16", "search.num_finalists=1"),
    *("search.num_images_select=16", "search.num_images_report=32"),
]


@pytest.mark.slow
def test_train_search_report_export(here, lcsc):
    code, out, err = lcsc("search", *TINY, "train_if_missing=true", "run_dir=run")
    assert code == 0, err
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["metric"] == "language_modeling"
    assert summary["searcher_ran"] == "gradient"
    assert summary["num_checkpoints"] == 4
    assert set(summary["report"]["baselines"]) >= {"last", "ema", "wsm", "uniform"}
    assert "language_modeling" in out
    assert re.search(r"\[.+\] \d+ blocks/s, ", out)
    assert "images/s" not in out
    best = here / "run" / "best"
    assert sorted(path.name for path in best.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (best / "README.md").read_text()
    assert "from transformers import LlamaForCausalLM" in card
    assert "image" not in card.split("## How it was made")[0]
    page = (here / "run" / "report" / "report.html").read_text()
    assert "over stretches of the text" in page
    assert re.findall("images?[ -](?:sampled|forwards|saved)", page) == []
    assert re.search(
        r"decoding, LCSC</td><td class=\"left\">[\d,]+ tokens a second \([\d,]+ to [\d,]+\), 8 texts", page
    )

    # transformers' own loss of what it loads, on the blocks that the run reported on
    text = build("dataset", "text")
    scorer = build("objective", "language_modeling", dataset=text, block_length=32, device="cpu")
    net = AutoModelForCausalLM.from_pretrained(best).eval()
    assert type(net).__name__ == "LlamaForCausalLM"
    rows = torch.from_numpy(scorer._rows(0, Purpose.REPORT, range(32)))
    ids_NT = scorer._blocks(Purpose.REPORT)[rows].long()
    with torch.no_grad():
        loss = float(net(input_ids=ids_NT, labels=ids_NT).loss)
    assert loss == pytest.approx(summary["report"]["best"]["value"], abs=1e-6)
    assert net.lm_head.weight is net.model.embed_tokens.weight

    records = [
        json.loads(line[line.index("{") :]) for line in (here / "run" / "journal.jsonl").read_text().splitlines()
    ]
    (best_record,) = [r for r in records if r.get("kind") == "report" and r.get("who") == "best"]
    assert best_record["others"]["kv_cache_bytes"] == {"value": 128.0, "se": 0.0}
    assert best_record["others"]["bits_per_byte"]["value"] == pytest.approx(loss / 0.6931472, abs=1e-5)

    code, out, err = lcsc("verify", "run/best")
    assert code == 0, err
    code, out, err = lcsc("export", "run=run", "to=shards", "max_shard_size=20KB")
    assert code == 0, err
    assert len(list((here / "shards").glob("model-*.safetensors"))) > 1
    assert (here / "shards" / "model.safetensors.index.json").is_file()
    again = AutoModelForCausalLM.from_pretrained(here / "shards")
    whole = load_file(best / "model.safetensors")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_text_and_images_are_not_mixed_up_on_the_line(here, lcsc):
    code, _, err = lcsc("search", "experiment=tiny_lm", "dataset=digits")
    assert code == 2
    assert "objective `language_modeling` reads text, and data set `Digits` holds images. Choose dataset=text." in err
    code, _, err = lcsc("train", "experiment=digits", "dataset=text")
    assert code == 2
    assert "this trainer reads images, and data set `Text` holds text" in err
    assert list(here.iterdir()) == []

"""The experiment `gqa_small` at a size for tests: trained, searched, stopped and continued, reported, exported."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from helpers_text import CONFIG
from transformers import AutoModelForCausalLM

from lcsc.models.network import load_network
from lcsc.report.run import Run

TINY = [
    *("operator=gqa", "experiment=gqa_small"),
    *(f"network.config.{key}={value}" for key, value in CONFIG.items() if "num_" not in key),
    *("network.config.num_hidden_layers=2", "network.config.num_attention_heads=4"),
    *("network.config.num_key_value_heads=4", "trainer.num_steps=2", "trainer.save_every=2", "trainer.batch_size=2"),
    *("trainer.block_length=32", "objective.block_length=32", "objective.decode_tokens=2", "operator.max_kv_heads=4"),
    *("search.num_trials=9", "search.num_images=8", "search.num_finalists=2", "search.num_images_select=8"),
    *("search.num_images_report=8", "train_if_missing=true"),
]


def records(run):
    lines = (run / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_train_search_stop_continue_report_export_verify(here, lcsc):
    code, out, err = lcsc("search", *TINY, "run_dir=run")
    assert code == 0, err
    assert "share the noise" not in out + err
    run = here / "run"
    trials = [record for record in records(run) if record["kind"] == "trial"]
    heads = [trial["num_kv_heads"] for trial in trials]
    assert heads[0] == [4, 4]
    assert sorted(heads[1:5]) == [[1, 4], [2, 4], [4, 1], [4, 2]]
    assert all(sum(counts) <= 4 for counts in heads[5:])
    assert [trial["cache_bytes_per_token"] for trial in trials] == [2 * sum(counts) * 4 * 4 for counts in heads]
    assert sum(summary_heads(run)) <= 4
    # what exceeds the sum informs, and is not the best of anything
    assert [trial.get("may_win", True) for trial in trials] == [sum(counts) <= 4 for counts in heads]
    allowed = [trial["value"] for trial in trials if sum(trial["num_kv_heads"]) <= 4]
    assert Run.open(run).trials()["best_so_far"].iloc[-1] == min(allowed)
    labels = [r["label"] for r in records(run) if r["kind"] == "select"]
    assert next(label for label in labels if label.startswith("heads ")) in {f"heads {a}, {b}" for a, b in heads[5:]}
    # the baselines are equal numbers with the same sum
    assert {r["num_kv_heads"] == [2, 2] for r in records(run) if r["kind"] == "baseline"} == {True}

    # what a killed run leaves is continued to the same bytes
    whole = (run / "journal.jsonl").read_bytes()
    shutil.copytree(run, here / "again", ignore=shutil.ignore_patterns("best", "summary.json", "report", "lock"))
    (here / "again" / "journal.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:9]))
    code, _, err = lcsc("search", *TINY, "run_dir=again")
    assert code == 0, err
    assert (here / "again" / "journal.jsonl").read_bytes() == whole

    points = pd.read_csv(run / "report" / "cache.csv", keep_default_na=False)
    assert len(points) == 9 + 4
    kept = points[points["pareto"].astype(str) == "True"].sort_values("cache_bytes_per_token")
    assert kept["value"].astype(float).is_monotonic_decreasing
    page = (run / "report" / "report.html").read_text()
    assert "Loss against cache" in page
    assert "trials changed one layer at a time" in page
    assert "detector" not in page
    assert "metric digest" in page

    code, _, err = lcsc("export", f"run={run}", "to=out")
    assert code == 0, err
    card = (here / "out" / "README.md").read_text()
    assert "# gqa_small: one checkpoint after `gqa`, chosen by lcsc" in card
    assert f"| num_kv_heads | {summary_heads(run)} |" in card
    assert "checkpoint-averaging" not in card
    code, out, err = lcsc("verify", "out")
    assert code == 0, err
    assert "bit for bit from 1 checkpoints of" in out
    net, ids = load_network(here / "out"), torch.arange(32)[None]
    held = net(ids, use_cache=True).past_key_values
    sizes = [layer.keys.shape[1] for layer in held.layers]
    assert sizes == summary_heads(run)
    if len(set(sizes)) == 1:
        assert torch.equal(AutoModelForCausalLM.from_pretrained(here / "out")(ids).logits, net(ids).logits)
    config = here / "out" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    code, _, err = lcsc("verify", "out")
    assert code == 2
    assert "config.json` is not what the recipe gives" in err


def summary_heads(run):
    """Of the winner, by its report record."""
    return next(r["num_kv_heads"] for r in records(run) if r["kind"] == "report" and r["who"] == "best")

"""The experiments on tunes at a size for tests: trained, searched, reported, exported, asked for a tune."""

from __future__ import annotations

import json

import pytest
from helpers_text import CONFIG

TINY = [
    *("experiment=text_to_music_small", "dataset.num=30", "dataset.every=5", "dataset.stretch=64"),
    *(f"network.config.{key}={value}" for key, value in CONFIG.items() if key.startswith(("num_", "hid", "inter"))),
    *("trainer.num_steps=4", "trainer.save_every=2", "trainer.batch_size=2", "trainer.block_length=128"),
    *("objective.samples=2", "objective.max_tokens=8", "objective.checker=lcsc", "search.num_trials=2"),
    *("search.num_images=4", "search.num_finalists=1", "search.num_images_select=4", "search.num_images_report=6"),
    *("train_if_missing=true", "quiet=true"),
]


@pytest.mark.faults
def test_train_search_report_export_and_ask(here, lcsc):
    code, out, err = lcsc("search", *TINY, "run_dir=runs/tunes")
    assert code == 0, err
    records = [json.loads(line) for line in (here / "runs" / "tunes" / "journal.jsonl").read_text().splitlines()]
    (best,) = [record for record in records if record["kind"] == "report" and record["who"] == "best"]
    others = best["others"]
    gap = others["shuffled_loss"]["value"] - best["value"]
    assert others["conditioning_gap"]["value"] == pytest.approx(gap, abs=1e-6)
    assert others["validity"] == {"value": 0.0, "se": 0.0}
    assert others["validity_ceiling"]["value"] == 1
    assert 0 < others["eds_floor"]["value"] < 1
    page = (here / "runs" / "tunes" / "report" / "report.html").read_text()
    assert "conditioning_gap" in page
    page = " ".join(page.split())
    assert "Lower is better in the first column; likeness (bleu, eds), validity" in page
    assert "(over tunes), on a part of the tunes that neither" in page
    assert "network calls a pair" in page
    card = (here / "runs" / "tunes" / "best" / "README.md").read_text()
    assert "pairs of text and tune as the winner. The standard error covers which tunes these are." in card
    assert "image" not in card.split("## How it was made")[0]
    # the newest run on tunes is asked, and its model has learnt nothing yet
    code, out, err = lcsc("generate", "music", "a jig in D, 6/8", "to=out", "tries=1", "max_tokens=8")
    assert code == 2
    assert out == "model: runs/tunes/best\n"
    assert "no valid tune for `a jig in D, 6/8` in 1 tries" in err
    assert not (here / "out").exists()


SMALL = [
    *("dataset.num=30", "dataset.every=5", "trainer.num_steps=4", "trainer.save_every=2", "trainer.batch_size=2"),
    *("objective.samples=2", "objective.max_tokens=8", "objective.checker=lcsc", "search.num_trials=2"),
    *("search.num_images=4", "search.num_finalists=1", "search.num_images_select=4", "search.num_images_report=6"),
    *("train_if_missing=true", "quiet=true"),
]


@pytest.mark.faults  # takes long: two trainings and two searches
def test_a_decoder_of_tunes_gets_an_encoder_and_their_training_is_combined(here, lcsc):
    words = ["operator=warm_start", "experiment=text_to_music", *SMALL, "network.config.n_embd=16"]
    code, _, err = lcsc("search", *words, "objective.num_steps=1", "objective.train_batch_size=2", "run_dir=runs/warm")
    assert code == 0, err
    records = [json.loads(line) for line in (here / "runs" / "warm" / "journal.jsonl").read_text().splitlines()]
    assert {record["label"] for record in records if record["kind"] == "baseline"} == {"random", "zero", "copy"}
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    assert best["others"]["trained_tokens"]["value"] > 0
    code, out, err = lcsc("verify", "runs/warm/best")
    assert code == 0, err
    assert "bit for bit" in out
    code, _, err = lcsc("generate", "music", "a jig in D, 6/8", "to=out")  # what is still to be trained is not asked
    assert "there is no model that writes tunes here yet" in err

    words = ["experiment=text_to_music_tuned", *SMALL, "trainer.start=runs/warm/best", "objective.samples=0"]
    code, _, err = lcsc("search", *words, "run_dir=runs/tuned")
    assert code == 0, err
    summary = json.loads((here / "runs" / "tuned" / "summary.json").read_text())
    assert (summary["searcher"], summary["num_checkpoints"]) == ("auto", 2)
    code, out, err = lcsc("generate", "music", "a jig in D, 6/8", "to=out", "tries=1", "max_tokens=8")
    assert out == "model: runs/tuned/best\n"
    assert "no valid tune for `a jig in D, 6/8` in 1 tries" in err

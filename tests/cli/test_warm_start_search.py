"""The experiment `warm_start_small` at a size for tests: trained, searched, exported, verified, and it generates."""

from __future__ import annotations

import json

import pytest
import torch

from lcsc.models.network import load_network

TINY = [
    *("operator=warm_start", "experiment=warm_start_small", "network.config.n_embd=16", "network.config.n_layer=3"),
    *("trainer.num_steps=2", "trainer.save_every=1", "trainer.batch_size=2", "trainer.block_length=32"),
    *(
        "objective.num_steps=2",
        "search.race_steps=[1]",
        "objective.samples=2",
        "objective.block_length=24",
        "objective.source_length=16",
    ),
    *("objective.train_batch_size=2", "search.num_trials=8", "search.num_images=20", "search.num_finalists=1"),
    *(
        "operator.cross_attention=copy",
        "search.num_images_select=4",
        "search.num_images_report=4",
        "train_if_missing=true",
        "quiet=true",
    ),
]


@pytest.mark.faults  # takes long: a training, a search with its report, and an export
def test_train_search_export_verify_generate(here, lcsc):
    code, _, err = lcsc("search", *TINY, "run_dir=run")
    assert code == 0, err
    records = [json.loads(line) for line in (here / "run" / "journal.jsonl").read_text().splitlines()]
    trials = [record for record in records if record["kind"] == "trial"]
    assert len(trials) == 8
    # moves are long enough that other layers and steps come up
    assert len({(*trial["decoder_layers"], trial["decoder_step"]) for trial in trials}) >= 3
    assert all(len(trial["decoder_layers"]) == trial["encoder_layers"] == 2 for trial in trials)
    baselines = {record["label"] for record in records if record["kind"] == "baseline"}
    assert baselines == {"first layers", "last layers", "spread layers"}
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    code, _, err = lcsc("export", "run=run", "to=out")
    assert code == 0, err
    code, out, err = lcsc("verify", "out")
    assert code == 0, err
    assert "bit for bit from 1 checkpoints of" in out
    net = load_network(here / "out")
    assert net.config.decoder.n_layer == len(best["decoder_layers"])
    assert net.encoder.embeddings.word_embeddings.weight is net.decoder.lm_head.weight
    written = net.generate(torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False)
    assert written[0, 0] == 0
    assert len(written[0]) <= 5
    card = (here / "out" / "README.md").read_text()
    assert "from lcsc.models.encoder_decoder import SharedEncoderDecoderModel" in card

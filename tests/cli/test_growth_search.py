"""The experiment `growth_small` at a size for tests: searched by a training of each candidate, resumed, exported."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Windows

SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY = [
    *("operator=orthogonal_growth", "experiment=growth_small", "train_if_missing=true", "run_dir=run", "quiet=true"),
    *(f"network.config.{key}={value}" for key, value in {**SIZES, "num_key_value_heads": 2}.items()),
    *("trainer.num_steps=4", "trainer.save_every=4", "trainer.block_length=16", "objective.block_length=16"),
    *(
        "objective.num_steps=1",
        "operator.num_layers=4",
        "operator.copy_scale=1",
        "search.num_trials=2",
        "search.batch_size=2",
    ),
    *("operator.method=interposition", "trainer.batch_size=2", "objective.train_batch_size=2"),
    *("search.num_finalists=1", "search.num_images=4", "search.num_images_select=6", "search.num_images_report=8"),
]


@pytest.mark.slow
@pytest.mark.faults
def test_a_growth_is_searched_resumed_and_exported(here, lcsc):
    code, _, err = lcsc("search", *TINY)
    assert code == 0, err
    run = here / "run"
    journal, summary = (run / "journal.jsonl").read_bytes(), json.loads((run / "summary.json").read_text())
    assert summary["metric"] == "uptrained_loss"
    assert set(summary["report"]["baselines"]) == {f"interposition {rule}" for rule in ("spread", "first", "last")}
    training, scores = 3 * 1 * 2, len(journal.splitlines()) - 1  # network calls; baselines, trials and so on
    assert summary["image_forwards"] == summary["images_sampled"] + training * scores

    # the best, opened by transformers and trained again, has the reported loss
    text = build("dataset", "text")
    net = AutoModelForCausalLM.from_pretrained(run / "best")
    assert net.config.num_hidden_layers == 4
    scorer = build(
        "objective", "uptrained_loss", dataset=text, block_length=16, num_steps=1, train_batch_size=2,
        learning_rate=2e-3, device="cpu",
    )  # fmt: skip
    windows = Windows(text.tokens(TextPart.TRAIN), scorer, SeedRange(0, Purpose.TRAIN))
    scorer.fit.run(net, windows, here / "states")
    rows = torch.from_numpy(scorer._rows(0, Purpose.REPORT, range(8)))
    ids_NT = scorer._blocks(Purpose.REPORT)[rows].long()
    with torch.no_grad():
        logits_NTV = net.eval()(input_ids=ids_NT).logits
    loss = torch.nn.functional.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten())
    assert float(loss) == pytest.approx(summary["report"]["best"]["value"], abs=1e-5)

    # cut off in the middle and gone on with: the same bytes
    lines = journal.splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "best")
    code, _, err = lcsc("search", *TINY)
    assert code == 0, err
    assert (run / "journal.jsonl").read_bytes() == journal
    assert json.loads((run / "summary.json").read_text())["report"] == summary["report"]

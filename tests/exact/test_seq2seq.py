"""The loss of targets given sources: transformers' own, for encoder-decoders and for language models alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_warm import live, model, saved
from torch.utils.flop_counter import FlopCounterMode

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.datasets.pair_tasks import pairs_of, plain_text
from lcsc.metrics.text_measures import measure_texts
from lcsc.models.fit import Windows
from lcsc.models.flops import pair_training_flops
from lcsc.models.pairs import PairWindows
from lcsc.objectives.seq2seq import Seq2Seq
from lcsc.operators.warm_start import WarmStart

TEXT = build("dataset", "text", stretch=256, every=40)
DROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
ASKED = {"seed": 5, "purpose": Purpose.SEARCH, "images": range(6)}
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")


def objective(**settings):
    return Seq2Seq(**{"dataset": TEXT, "block_length": 20, "source_length": 12, "device": "cpu", **settings})


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    still = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "gpt2": DROPS}
    return {
        kind: saved(model(kind, vocab_size=256, **dict.fromkeys(drops, 0.0)), folder / kind)
        for kind, drops in still.items()
    }


def made(banks, name, **settings):
    kind = "gpt2" if name in ("gpt", "rnd2gpt") else "bert"
    return WarmStart(combination=name, **settings).apply(banks[kind], {})


@torch.no_grad()
@pytest.mark.parametrize("name", ["bertshare", "rnd2gpt", "gpt"])
def test_it_is_transformers_loss_of_the_targets(banks, name):
    scorer, candidate = objective(), made(banks, name)
    net = live(candidate)
    blocks = scorer._blocks(Purpose.SEARCH)[torch.from_numpy(scorer._rows(5, Purpose.SEARCH, range(6)))].long()
    if name == "gpt":
        labels = torch.cat([torch.full((6, 12), -100), blocks[:, 12:]], 1)
        wanted = net(input_ids=blocks, labels=labels).loss
    else:
        assert not (blocks == net.config.pad_token_id).any()
        wanted = net(input_ids=blocks[:, :12], labels=blocks[:, 12:].contiguous()).loss
    score = scorer(candidate, **ASKED, full=True)
    assert score.value == pytest.approx(float(wanted), rel=1e-6)
    bits = score.others["bits_per_byte"]["value"]
    assert bits == pytest.approx(score.value / np.log(2))  # a token is a byte
    assert score.others["parameters"]["value"] == candidate.recipe["counts"]["parameters"]


@pytest.mark.parametrize("name", ["bert2bert", "gpt"])
def test_fine_tuning_is_adamw_on_pairs_of_the_training_part(banks, name):
    """Two steps in plain torch, then the plain loss."""
    candidate = made(banks, name)
    scorer = objective(num_steps=2, train_batch_size=3, learning_rate=0.01, batch_size=1)
    plain = objective()
    net = plain._live(candidate)
    windows = Windows(TEXT.tokens(TextPart.TRAIN), scorer.fit, SeedRange(0, Purpose.TRAIN))
    optimizer = torch.optim.AdamW(net.net.parameters(), lr=0.01, weight_decay=0.0)
    net.net.requires_grad_(True)
    for step in range(2):
        ids = torch.stack([windows[3 * step + i]["input_ids"] for i in range(3)])
        if name == "gpt":
            labels = torch.cat([torch.full((3, 12), -100), ids[:, 12:]], 1)
            loss = net.net(input_ids=ids, labels=labels).loss
        else:
            start = torch.full((3, 1), net.net.config.decoder_start_token_id)
            given = torch.cat([start, ids[:, 12:-1]], 1)
            loss = net.net(input_ids=ids[:, :12], decoder_input_ids=given, labels=ids[:, 12:].contiguous()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.net.parameters(), 1.0)
        optimizer.step()
    wanted = plain.batches(net, 5, Purpose.SEARCH, range(6))
    mean = float(torch.cat([losses.detach() for losses in wanted]).mean())
    assert scorer(candidate, **ASKED).value == pytest.approx(mean, rel=1e-5)


def test_windows_are_the_same_texts_for_every_kind_of_network(banks):
    fit = objective(num_steps=2, train_batch_size=3).fit
    seeds, text = SeedRange(0, Purpose.TRAIN), TEXT.tokens(TextPart.TRAIN)
    both = PairWindows(text, fit, seeds, live(made(banks, "bert2bert")), 12)
    alone = PairWindows(text, fit, seeds, live(made(banks, "gpt")), 12)
    assert len(both) == len(alone) == 6
    for i in range(6):
        ids = alone[i]["input_ids"]
        assert both[i]["input_ids"].tolist() == ids[:12].tolist()
        assert both[i]["decoder_input_ids"].tolist() == [1, *ids[12:-1].tolist()]
        assert both[i]["labels"].tolist() == ids[12:].tolist()
        assert alone[i]["labels"].tolist() == [-100] * 12 + ids[12:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["bertshare", "rnd2gpt"])
def test_operations_are_those_that_torch_counts(banks, name):
    net = live(made(banks, name))
    for side in (net.encoder, net.decoder):
        side.set_attn_implementation("eager")  # whose products torch sees
    ids = torch.ones(1, 12, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(input_ids=ids, decoder_input_ids=ids[:, :8], use_cache=False)
    pooler = 2 * 16 * 16 if "pooler.dense.weight" in dict(net.encoder.named_parameters()) else 0  # of one token
    assert pair_training_flops(net, 1, 12, 8) == pytest.approx(3 * (counter.get_total_flops() - pooler), rel=1e-9)


def test_what_does_not_fit_is_refused(banks, tmp_path):
    with pytest.raises(ConfigError, match="`objective.source_length` is 20; it must be at least 1 and below"):
        objective(source_length=20)
    with pytest.raises(ConfigError, match="`block_length` is 30, and the network reads at most 24 tokens"):
        objective(block_length=40, source_length=30)(made(banks, "bert2bert"), **ASKED)
    small = WarmStart().apply(saved(model("bert"), tmp_path / "small"), {})
    with pytest.raises(ConfigError, match="the network has 40 tokens, and the text 256"):
        objective()(small, **ASKED)


def test_sources_to_restore_are_plain_and_as_long_as_their_targets(banks):
    assert plain_text(b"Who's there?\n\nNAY, answer  me: stand!") == b"whos there nay answer me stand"
    assert plain_text("É-ä".encode()) == "Éä".encode()  # bytes of other letters stay
    text = b"Long live\nthe King! "
    pair = pairs_of(torch.tensor([list(text)]), "restore")
    assert bytes(pair[0].tolist()) == b"long live the king  " + text
    assert pairs_of(torch.tensor(list(text), dtype=torch.uint8), "continue").tolist() == list(text)
    scorer = objective(task="restore", source_length=None, num_steps=1, train_batch_size=2)
    net = live(made(banks, "bert2bert"))
    row = scorer._windows(net, SeedRange(0, Purpose.TRAIN))[1]
    assert bytes(row["input_ids"].tolist()) == plain_text(bytes(row["labels"].tolist())).ljust(20)
    assert row["decoder_input_ids"].tolist() == [1, *row["labels"][:-1].tolist()]
    assert (scorer._source, scorer._window) == (20, 40)


@torch.no_grad()
def test_restoring_is_transformers_loss_of_whole_blocks(banks):
    scorer, candidate = objective(task="restore", source_length=None), made(banks, "bertshare")
    blocks = scorer._blocks(Purpose.SEARCH)[torch.from_numpy(scorer._rows(5, Purpose.SEARCH, range(6)))].long()
    sources = torch.tensor([list(plain_text(bytes(row)).ljust(20)) for row in blocks.tolist()])
    score = scorer(candidate, **ASKED, full=True)
    assert score.value == pytest.approx(float(live(candidate)(input_ids=sources, labels=blocks).loss), rel=1e-6)
    assert score.others["bits_per_byte"]["value"] == pytest.approx(score.value / np.log(2))


@pytest.mark.parametrize("name", ["bertshare", "rnd2gpt", "gpt"])
def test_texts_are_the_likeliest_tokens_one_after_the_other(banks, name):
    """Against a forward pass on all that was written, for each token, without a cache."""
    scorer, candidate = objective(samples=3, batch_size=2), made(banks, name)
    rows = scorer._rows(5, Purpose.SEARCH, range(3))
    net = live(candidate)
    written = [row[0] for row in scorer.write(net, rows, Purpose.SEARCH)]
    for text, block in zip(written, scorer._blocks(Purpose.SEARCH)[torch.from_numpy(rows)].long(), strict=True):
        given = block[None, :12] if name == "gpt" else torch.tensor([[net.config.decoder_start_token_id]])
        first = given.shape[1]
        for _ in range(8):
            with torch.no_grad():
                more = (
                    {"input_ids": given}
                    if name == "gpt"
                    else {"input_ids": block[None, :12], "decoder_input_ids": given}
                )
                given = torch.cat([given, net(**more).logits[:, -1:].argmax(-1)], 1)
        assert text == bytes(given[0, first:].tolist()).decode(errors="replace").strip()


def test_full_scores_hold_measures_of_what_it_writes(banks):
    scorer, candidate = objective(samples=4), made(banks, "bert2bert")
    score = scorer(candidate, **ASKED, full=True)
    rows = scorer._rows(5, Purpose.SEARCH, range(6))[:4]
    wanted = measure_texts(*zip(*scorer.write(live(candidate), rows, Purpose.SEARCH), strict=True))
    for key, measure in wanted.items():
        assert score.others[key] == {"value": measure.value, "se": measure.se}
        assert score.others[f"{key}_floor"]["value"] == measure.floor
    assert (score.further, score.image_forwards) == (4, 10)
    assert scorer(candidate, **ASKED).further == 0
    assert "bleu" not in objective()(candidate, **ASKED, full=True).others
    assert scorer.circumstances()["detector_digest"] != objective().circumstances()["detector_digest"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "translate"}, "`objective.task` is `translate`; it must be one of continue, restore"),
        ({"task": "restore"}, "`objective.task` is `restore` with `source_length` 12"),
        ({"samples": 1}, "`objective.samples` is 1; it must be 0, or at least 2"),
    ],
)
def test_tasks_and_samples_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        objective(**settings)

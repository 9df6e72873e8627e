"""Banks of masked language models: what is hidden, transformers' loss, the same bits after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.causal_lm import check_text
from lcsc.models.fit import Windows
from lcsc.models.network import load_network
from lcsc.training.folder import BankFolder
from lcsc.training.masked_lm import MaskedLM

CONFIG = {
    **{"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 1},
}
STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
BERT = {"class": "BertForMaskedLM", "config": {**CONFIG, **STILL}}
SMALL = {"num_steps": 3, "batch_size": 4, "save_every": 1, "block_length": 32}
TEXT = build("dataset", "text", stretch=64)
SEEDS = SeedRange(3, Purpose.TRAIN)


def train(out, arch=BERT, dataset=TEXT, **settings):
    trainer = MaskedLM(**{**SMALL, **settings})
    return trainer.train(arch=arch, model=None, dataset=dataset, out=out, seed=3, progress=False)


def windows(**settings):
    return MaskedLM(**{**SMALL, **settings}).windows(None, TEXT, SEEDS)


def test_a_share_is_hidden_and_only_that_is_asked_for():
    trainer = MaskedLM(**{**SMALL, "num_steps": 100})
    whole, hidden = Windows(TEXT.tokens(TextPart.TRAIN), trainer, SEEDS), windows(num_steps=100)
    assert len(hidden) == 400
    true = torch.stack([whole[i]["input_ids"] for i in range(400)])
    shown, labels = (torch.stack([hidden[i][key] for i in range(400)]) for key in ("input_ids", "labels"))
    chosen = labels != -100
    assert torch.equal(labels[chosen], true[chosen])
    assert torch.equal(shown[~chosen], true[~chosen])
    num = chosen.numel()
    assert abs(int(chosen.sum()) - 0.15 * num) < 4 * (0.15 * 0.85 * num) ** 0.5
    kept, masked = (shown == true)[chosen].float().mean(), (shown == 3)[chosen].float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.03)
    assert float(kept) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(windows(num_steps=1)[2]["input_ids"], shown[2])  # whatever was asked for before


def test_the_first_step_is_adams_on_transformers_loss(tmp_path):
    bank = train(tmp_path / "bank", num_steps=1, learning_rate=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(int(SEEDS.generator(0).integers(2**63)))
        net = transformers.BertForMaskedLM(transformers.BertConfig(**BERT["config"]))
    rows = [windows(num_steps=1)[i] for i in range(4)]
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    net(input_ids=ids, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    saved = load_network(bank / "checkpoint-000001")
    assert type(saved) is transformers.BertForMaskedLM
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.faults  # the way to go on is that of `causal_lm`
def test_an_interrupted_bank_of_a_roberta_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    """With dropout; the interruption comes between a checkpoint and the state behind it."""
    arch = {"class": "RobertaForMaskedLM", "config": {**CONFIG, "type_vocab_size": 1}}
    whole = train(tmp_path / "whole", arch)
    write = BankFolder.write_checkpoint

    def interrupted(self, net, step, beside=None):
        write(self, net, step, beside)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BankFolder, "write_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", arch)
    cut = train(tmp_path / "cut", arch)
    for step in (1, 2, 3):
        a, b = (load_file(bank / f"checkpoint-00000{step}" / "model.safetensors") for bank in (whole, cut))
        assert all(torch.equal(a[name], b[name]) for name in a)
    bank = CheckpointBank.open(cut)
    assert (bank.steps, bank.arch["class"]) == ((1, 2, 3), "RobertaForMaskedLM")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token": 32}, "`trainer.mask_token` is 32; it must be a token from 0 to 255 that the text does"),
        ({"mask_token": 256}, "`trainer.mask_token` is 256; it must be a token from 0 to 255"),
        ({"mask_probability": 0.0}, r"`trainer.mask_probability` is 0.0; it must be in \(0, 1\]"),
        ({"arch": {"class": "GPT2LMHeadModel"}}, "trainer `masked_lm` makes language models of transformers, not"),
        ({"block_length": 41}, "`block_length` is 41, and the network reads at most 40 tokens"),
        ({"dataset": build("dataset", "digits")}, "trainer `masked_lm` reads text"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "bank", **settings)
    assert not (tmp_path / "bank").exists()


def test_positions_of_a_roberta_begin_behind_its_padding():
    config = transformers.RobertaConfig(**CONFIG)
    net = transformers.RobertaForMaskedLM(config).eval()
    check_text(config, 256, 38)
    net(input_ids=torch.from_numpy(np.full((1, 38), 7)))
    with pytest.raises(ConfigError, match="`block_length` is 39, and the network reads at most 38 tokens"):
        check_text(config, 256, 39)

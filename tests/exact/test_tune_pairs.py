"""Texts and tunes in encoder-decoders: transformers' own loss, fine-tuning by hand, and drawing without a cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_warm import live, model, saved

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Fit
from lcsc.models.network import build_network, save_network
from lcsc.models.sampling import sample
from lcsc.models.tune_pairs import TuneSteps, tune_inputs, tune_losses
from lcsc.music.tokens import END, PAD, TUNE, VOCAB_SIZE, encode, pair_tokens, prompt_tokens
from lcsc.operators.linear import Linear
from lcsc.operators.warm_start import WarmStart

DATA = build("dataset", "tunes", num=30, longest=200, every=5)
STILL = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
ENCODER_STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
ASKED = {"seed": 0, "purpose": Purpose.SEARCH, "images": range(4)}
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    net = model("gpt2", vocab_size=VOCAB_SIZE, n_positions=256, n_layer=2, **STILL)
    return saved(net, tmp_path_factory.mktemp("tunes") / "gpt2")


def warm(bank, **settings):
    tokens = {"start_token": TUNE, "end_token": END, "pad_token": PAD}
    return WarmStart(combination="rnd2gpt", **tokens, **settings).apply(bank, {})


def quiet(net):
    """Without dropout, which a random encoder has."""
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return net


def objective(**settings):
    quick = {"samples": 0, "checker": "lcsc", "device": "cpu", "batch_size": 3}
    return build("objective", "music", dataset=DATA, **{**quick, **settings})


@torch.no_grad()
def test_it_is_transformers_loss_of_the_tune_after_its_text(bank):
    scorer, candidate = objective(), warm(bank)
    net = live(candidate)
    pairs = [scorer._held[row] for row in scorer._rows(0, Purpose.SEARCH, range(4))]
    wanted = []
    for pair in pairs:  # one by one there is no padding, and transformers shifts the labels itself
        labels = torch.tensor([[*encode(pair.tune), END]])
        assert not (labels == net.config.pad_token_id).any()
        wanted.append(float(net(input_ids=torch.tensor([prompt_tokens(pair.text)]), labels=labels).loss))
    np.testing.assert_allclose(tune_losses(net, pairs), wanted, rtol=1e-5)
    score = scorer(candidate, **ASKED, full=True)
    assert score.value == pytest.approx(np.mean(wanted), rel=1e-6)
    assert score.others["conditioning_gap"]["value"] != 0
    assert score.image_forwards == 4 + 4
    written = objective(max_tokens=12).write(net, np.arange(2), Purpose.REPORT)
    assert written == ["", ""]  # none ends so early


def test_fine_tuning_is_adamw_on_whole_pairs_of_the_training_part(bank):
    scorer, candidate = objective(num_steps=2, train_batch_size=3, learning_rate=0.01), warm(bank)
    plain = objective()
    for tuned in (scorer, plain):
        fresh = tuned._fresh
        tuned.__dict__["_fresh"] = lambda some, fresh=fresh: (lambda one: (quiet(one.net), one)[1])(fresh(some))
    net = plain._live(candidate)
    steps = TuneSteps(DATA.pairs(TextPart.TRAIN), scorer.fit, SeedRange(0, Purpose.TRAIN), net.net)
    optimizer = torch.optim.AdamW(net.net.parameters(), lr=0.01, weight_decay=0.0)
    net.net.requires_grad_(True).train()
    for step in range(2):
        net.net(**tune_inputs(net.net, [steps[3 * step + i] for i in range(3)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    net.net.requires_grad_(False).eval()
    by_hand = torch.cat(list(plain.batches(net, **ASKED))).double().mean()
    before = objective()(candidate, **ASKED).value
    score = scorer(candidate, **ASKED, full=True)
    assert score.value == pytest.approx(float(by_hand), abs=2e-5)
    assert before - score.value > 0.01
    assert score.others["trained_tokens"]["value"] == steps.tokens
    assert score.image_forwards == 4 + 4 + 3 * 2 * 3
    assert "behind a training" in scorer.no_gradient
    assert plain.no_gradient is None
    circumstances = [some.circumstances()["detector_digest"] for some in (scorer, plain, objective(num_steps=3))]
    assert len(set(circumstances)) == 3


def test_steps_are_passes_over_all_pairs_with_little_padding(bank):
    pairs, fit, seeds = DATA.pairs(TextPart.TRAIN), Fit(9, 4, 200, 1e-3), SeedRange(3, Purpose.TRAIN)
    net = build_network(bank.arch)
    steps = TuneSteps(pairs, fit, seeds, net)
    assert (len(pairs), len(steps)) == (10, 36)
    passes = [[steps[i].tune for i in range(start, start + 8)] for start in (0, 8)]
    assert [len(set(tunes)) for tunes in passes] == [8, 8]  # 10 fill two batches of 4
    assert passes[0] != passes[1]
    again = TuneSteps(pairs, fit, seeds, net)
    assert [again[i] for i in (35, 3, 17)] == [steps[i] for i in (35, 3, 17)]
    sizes = np.array([len(pair_tokens(steps[i].text, steps[i].tune)) for i in range(8)]).reshape(2, 4)
    shorter, longer = sorted(sizes.tolist(), key=sum)
    assert max(shorter) <= min(longer)
    few = TuneSteps(pairs[:2], fit, seeds, net)
    assert {few[i] for i in range(4)} == set(pairs[:2])


def test_a_language_model_learns_tunes_with_or_without_their_texts(bank):
    net = build_network(bank.arch)
    pair = DATA.pairs(TextPart.TRAIN)[0]
    given = tune_inputs(net, [pair])
    labels = given["labels"][0]
    assert given["input_ids"].tolist() == [pair_tokens(pair.text, pair.tune)]
    assert labels[labels >= 0].tolist() == [*encode(pair.tune), END]
    alone = tune_inputs(net, [pair], texts=False, most=9)
    assert alone["input_ids"].tolist() == [[TUNE, *encode(pair.tune)[:8]]]
    assert alone["labels"].tolist() == [[-100, *encode(pair.tune)[:8]]]
    with pytest.raises(ConfigError, match="an encoder-decoder reads texts"):
        TuneSteps([pair], Fit(1, 1, 9, 1e-3), SeedRange(0, Purpose.TRAIN), live(warm(bank)), False)
    text = len(prompt_tokens(pair.text))
    with pytest.raises(ConfigError, match=f"`block_length` is {text}, and the longest text takes {text} tokens"):
        TuneSteps([pair], Fit(1, 1, text, 1e-3), SeedRange(0, Purpose.TRAIN), net)  # nothing of a tune would be left
    TuneSteps([pair], Fit(1, 1, text + 1, 1e-3), SeedRange(0, Purpose.TRAIN), net)


@torch.no_grad()
def naive(net, prompt, begun, rng, top_p, temperature, most):
    """Token after token, each from a full pass without a cache: the nucleus, the temperature, Gumbel's draw."""
    composite, written = net.config.is_encoder_decoder, list(begun)
    for _ in range(most):
        if composite:
            first = [net.config.decoder_start_token_id, *written]
            logits = net(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([first]), use_cache=False)
        else:
            logits = net(input_ids=torch.tensor([[*prompt, *written]]), use_cache=False)
        scores = logits.logits[0, -1].double().numpy()
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        order = np.argsort(-chances)
        kept = order[: np.searchsorted(np.cumsum(chances[order]), top_p) + 1]
        noisy = np.full(len(scores), -np.inf)
        noisy[kept] = scores[kept] / temperature
        written.append(int(np.argmax(noisy + rng.gumbel(size=len(scores)))))
        if written[-1] == END:
            break
    return written[len(begun) :]


@pytest.mark.parametrize("kind", ["encoder-decoder", "language model"])
def test_the_cache_draws_what_full_passes_draw(bank, kind):
    net = live(warm(bank, cross_attention="copy")) if kind == "encoder-decoder" else build_network(bank.arch).eval()
    for parameter in net.parameters():
        parameter.data *= 3  # so that what came before matters
    prompts = [
        prompt_tokens(text) for text in ("a jig in D, 6/8", "a reel in E minor, 4/4, called The Mill", "a waltz")
    ]
    begun = [[], encode("M:4/4\nL:1/8\n"), []]
    how = {"top_p": 0.7, "temperature": 1.6}

    def rngs():
        return [SeedRange(5, Purpose.REPORT).generator(row) for row in range(3)]

    drawn = sample(net, prompts, rngs(), end=END, pad=PAD, begun=begun, max_tokens=14, **how)
    wanted = [naive(net, *row, **how, most=14) for row in zip(prompts, begun, rngs(), strict=True)]
    assert drawn == wanted
    assert len(set(map(tuple, drawn))) == 3
    with pytest.raises(ConfigError, match="network reads at most 256"):
        sample(net, [[5] * 300], rngs()[:1], end=END, pad=PAD)


def test_an_encoder_decoder_is_trained_as_a_bank_and_combined(bank, tmp_path):
    candidate = warm(bank)
    save_network(live(candidate), tmp_path / "start")
    trainer = build("trainer", "tunes", num_steps=4, save_every=2, batch_size=2, block_length=200, start="x")
    trainer = replace(trainer, start=str(tmp_path / "start"), learning_rate=0.01)
    args = {"arch": candidate.arch, "model": None, "dataset": DATA, "seed": 1, "progress": False}
    tuned = CheckpointBank.open(trainer.train(out=tmp_path / "bank", **args))
    assert tuned.steps == (2, 4)
    assert tuned.arch["class"] == "SharedEncoderDecoderModel"
    first, last = (objective()(Linear().apply(tuned, {"z": z}), **ASKED).value for z in ends(tuned))
    before = objective()(candidate, **ASKED).value
    assert last < first < before
    middle = Linear().apply(tuned, {"z": np.zeros(1)})
    slope = objective().slope(middle, **ASKED)
    values = [objective()(Linear().apply(tuned, {"z": np.array([z])}), **ASKED).value for z in (-0.05, 0.05)]
    wanted = (values[1] - values[0]) / 0.1
    assert Linear().pull_back(tuned, {"z": np.zeros(1)}, slope.grad_P)["z"][0] == pytest.approx(wanted, rel=0.02)
    with pytest.raises(ConfigError, match="makes language models and encoder-decoders of transformers, not `UNet2D"):
        trainer.train(out=tmp_path / "other", **{**args, "arch": {"class": "UNet2DModel", "config": {}}})
    with pytest.raises(ConfigError, match="network reads at most 256"):
        replace(trainer, block_length=300).train(out=tmp_path / "other", **args)


def ends(bank):
    """Coordinates of the first and the last checkpoint."""
    return [Linear().point(bank, row)["z"] for row in np.eye(2)]

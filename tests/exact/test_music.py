"""The text-to-music objective against transformers' own loss, and sampling against its distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_text import CONFIG, language_bank
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.metrics.tune_measures import bleu, bleu_counts, eds
from lcsc.models.network import build_network
from lcsc.models.sampling import sample
from lcsc.music.tokens import END, PAD, VOCAB_SIZE, pair_tokens, prompt_tokens
from lcsc.operators.base import Candidate

ARCH = {
    "class": "LlamaForCausalLM",
    "config": {**CONFIG, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 400},
}
DATA = build("dataset", "tunes", num=40, longest=300)
GIVEN = {"seed": 0, "purpose": Purpose.REPORT, "images": range(4)}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return CheckpointBank.open(language_bank(tmp_path_factory.mktemp("music") / "bank", ARCH))


def single(bank, k=3):
    return Candidate(bank.arch, bank.layout, lambda out: out.copy_(bank.matrix()[k]), {}, bank.constants)


def objective(**settings):
    quick = {"samples": 3, "max_tokens": 24, "checker": "lcsc", "device": "cpu", "batch_size": 3}
    return build("objective", "music", dataset=DATA, **{**quick, **settings})


def transformers_loss(net, text, tune):
    ids = torch.tensor([pair_tokens(text, tune)])
    labels = ids.clone()
    labels[0, : len(prompt_tokens(text))] = -100
    with torch.no_grad():
        return float(net(input_ids=ids, labels=labels).loss)


def test_it_is_transformers_loss_of_the_tune_given_its_text(bank):
    scorer = objective()
    score = scorer(single(bank), **GIVEN, full=True)
    net = AutoModelForCausalLM.from_pretrained(bank.rows[3].files[0].parent).eval()
    pairs, rows = DATA.pairs(TextPart.REPORT), scorer._rows(0, Purpose.REPORT, range(4)) - 4
    assert sorted(rows) == [0, 1, 2, 3]
    wanted = [transformers_loss(net, pairs[row].text, pairs[row].tune) for row in rows]
    assert score.value == pytest.approx(np.mean(wanted), abs=1e-6)
    assert score.se == pytest.approx(np.std(wanted, ddof=1) / 2, rel=1e-3)
    others = [transformers_loss(net, pairs[(row + 1) % 4].text, pairs[row].tune) for row in rows]
    assert score.others["shuffled_loss"]["value"] == pytest.approx(np.mean(others), abs=1e-6)
    gap = np.array(others) - wanted
    assert score.others["conditioning_gap"]["value"] == pytest.approx(gap.mean(), abs=1e-6)
    assert score.others["conditioning_gap"]["se"] == pytest.approx(gap.std(ddof=1) / 2, rel=1e-2)
    # 4 pairs, again with other texts, and 3 tunes
    assert (score.num_images, score.nfe, score.further, score.image_forwards) == (4, 1, 7, 11)


def test_measures_are_those_of_the_tunes_that_it_writes(bank):
    scorer = objective(max_tokens=40)
    rows = scorer._rows(0, Purpose.REPORT, range(4))
    found = scorer(single(bank), **GIVEN, full=True).others
    tunes = scorer.write(scorer._live(single(bank)).net, rows[:3], Purpose.REPORT)
    real = [scorer._held[row].tune for row in rows[:3]]
    other = [scorer._unrelated[row].tune for row in rows[:3]]
    assert found["eds"]["value"] == pytest.approx(eds(tunes, real).mean())
    assert found["eds_floor"]["value"] == pytest.approx(eds(other, real).mean())
    assert found["bleu_4_floor"]["value"] == pytest.approx(bleu(bleu_counts(other, real).sum(0), 4))
    assert found["validity"]["value"] == 0
    assert found["validity_ceiling"]["value"] == 1
    assert {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "diversity", "diversity_ceiling", "copying", "whole_bars"} <= set(
        found
    )
    assert "validity_floor" not in found
    assert set(objective(samples=0)(single(bank), **GIVEN, full=True).others) == {"shuffled_loss", "conditioning_gap"}


def test_races_scores_and_slopes_agree(bank):
    scorer = objective()
    blocks = scorer.block_states(single(bank), seed=0, purpose=Purpose.REPORT, images=range(4), num_blocks=2)
    value = scorer(single(bank), **GIVEN).value
    assert scorer.value_of(blocks.states, Purpose.REPORT) == pytest.approx(value, abs=1e-12)
    slope = scorer.slope(single(bank), **GIVEN)
    assert slope.value == pytest.approx(value, abs=1e-6)
    step = 1e-2 * slope.grad_P / slope.grad_P.norm()
    ahead, behind = (
        Candidate(bank.arch, bank.layout, lambda out, s=s: out.copy_(bank.matrix()[3] + s * step), {}, bank.constants)
        for s in (1, -1)
    )
    change = scorer(ahead, **GIVEN).value - scorer(behind, **GIVEN).value
    assert change == pytest.approx(2e-2 * float(slope.grad_P.norm()), rel=0.02)


def unigram(probabilities):
    """A network that gives every next token these probabilities."""
    net = build_network({**ARCH, "config": {**ARCH["config"], "tie_word_embeddings": False}}).eval()
    scores = torch.full((VOCAB_SIZE,), -1e4)
    for token, probability in probabilities.items():
        scores[token] = float(np.log(probability))
    net.forward_before = net.forward

    def forward(*args, **kwargs):
        out = net.forward_before(*args, **kwargs)
        out.logits = scores.expand(out.logits.shape)
        return out

    net.forward = forward
    return net


def test_draws_have_the_nucleus_at_the_temperature():
    # the smallest set with a probability of 0.85 is the first three
    net = unigram({10: 0.5, 11: 0.3, 12: 0.15, 13: 0.05})
    rngs = [np.random.default_rng(i) for i in range(30)]
    drawn = sample(net, [[2, 3]] * 30, rngs, end=END, pad=PAD, top_p=0.85, temperature=2.0, max_tokens=20)
    counts = np.bincount(np.concatenate(drawn), minlength=14)[10:14]
    wanted = np.array([0.5, 0.3, 0.15]) ** 0.5  # the temperature comes behind the cut
    assert counts.sum() == 600
    assert counts[3] == 0
    assert chisquare(counts[:3], 600 * wanted / wanted.sum()).pvalue > 0.01


def test_a_text_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    net = build_network(ARCH).eval()
    prompts = [prompt_tokens(text) for text in ("a jig in D", "a reel in E minor, 4/4, called The Mill", "a waltz")]

    def write(rows, **settings):
        rngs = [SeedRange(5, Purpose.REPORT).generator(row) for row in rows]
        return sample(net, [prompts[row] for row in rows], rngs, end=END, pad=PAD, **{"max_tokens": 12, **settings})

    together = write([0, 1, 2])
    assert together == write([0, 1, 2])
    assert [write([row])[0] for row in range(3)] == together
    assert all(len(text) == 12 or text[-1] == END for text in together)
    own = net.generation_config
    own.update(repetition_penalty=5.0, num_beams=3, suppress_tokens=together[0])  # as a folder may say
    assert write([0, 1, 2]) == together
    assert net.generation_config is own
    assert own.num_beams == 3
    assert len(write([1], max_tokens=9999)[0]) <= 400 - len(prompts[1])
    with pytest.raises(ConfigError, match="a prompt has 401 tokens, and the network reads at most 400"):
        sample(net, [[5] * 401], [np.random.default_rng(0)], end=END, pad=PAD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "`objective.batch_size` is 3 and `samples` 1; they must be at least 1, and 0 or at least 2"),
        ({"top_p": 0.0}, "`objective.top_p`, `temperature`, `max_tokens` are 0.0, 1.0, 24"),
        ({"checker": "ear"}, "`objective.checker` is `ear`; it must be one of auto, abc2midi, lcsc"),
        ({"dataset": build("dataset", "text")}, "reads texts and their tunes; data set `Text` holds none. Choose"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build("objective", "music", **{"dataset": DATA, "batch_size": 3, "max_tokens": 24, **settings})


def test_networks_that_do_not_fit_are_refused(tmp_path):
    arch = {**ARCH, "config": {**ARCH["config"], "max_position_embeddings": 99}}
    short = CheckpointBank.open(language_bank(tmp_path / "short", arch))
    with pytest.raises(ConfigError, match=r"longest pair has [12]\d\d tokens, and the network reads at most 99"):
        objective()(single(short), **GIVEN)
    of_bytes = CheckpointBank.open(language_bank(tmp_path / "bytes"))
    with pytest.raises(ConfigError, match="the network has 256 tokens, and the text 128"):
        objective()(single(of_bytes), **GIVEN)


def test_circumstances_tell_samplings_and_judges_apart(monkeypatch):
    first = objective().circumstances()
    assert first["checker"] == "lcsc"
    assert first == objective().circumstances()
    assert objective(top_p=0.5).circumstances()["detector_digest"] != first["detector_digest"]
    monkeypatch.setenv("PATH", "")
    from lcsc.music.files import abc2midi_version

    abc2midi_version.cache_clear()
    assert objective(checker="auto").circumstances() == first
    with pytest.raises(ConfigError, match="`abc2midi`, which is not installed"):
        objective(checker="abc2midi")
    abc2midi_version.cache_clear()

"""The language-model objective against transformers' own loss, and its derivative against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_text import CONFIG, LLAMA, MIXTURE, TIED, language_bank
from transformers import AutoModelForCausalLM

from lcsc.bank import CheckpointBank, Layout
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.datasets.base import TextPart
from lcsc.models.network import build_network, save_network
from lcsc.objectives.base import why_no_gradient
from lcsc.objectives.mean_loss import grouped_se
from lcsc.operators.base import Candidate

TEXT = build("dataset", "text", stretch=512)


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    # all experts for each token: where some are chosen the loss jumps, and differences are no derivative
    soft = {**MIXTURE, "config": {**MIXTURE["config"], "num_experts_per_tok": 4}}
    archs = {"llama": LLAMA, "tied": TIED, "mixture": MIXTURE, "soft mixture": soft}
    return {name: CheckpointBank.open(language_bank(folder / name, arch)) for name, arch in archs.items()}


def objective(**settings):
    return build("objective", "language_modeling", dataset=TEXT, device="cpu", **{"block_length": 32, **settings})


def last(bank):
    return build("operator", "linear").apply(bank, {"z": np.zeros(bank.num_checkpoints - 1)})


def transformers_loss(bank, k, ids_NT):
    theirs = AutoModelForCausalLM.from_pretrained(bank.rows[k].files[0].parent).eval()
    with torch.no_grad():
        return np.array([float(theirs(input_ids=row[None], labels=row[None]).loss) for row in ids_NT])


@pytest.mark.parametrize("name", ["llama", "tied", "mixture"])
@pytest.mark.parametrize("purpose", [Purpose.SEARCH, Purpose.REPORT])
def test_it_is_transformers_loss_over_all_blocks(banks, name, purpose):
    bank, scorer = banks[name], objective()
    blocks = TEXT.tokens(TextPart.REPORT if purpose is Purpose.REPORT else TextPart.SEARCH).reshape(-1, 32).long()
    num = 48
    single = Candidate(bank.arch, bank.layout, lambda out: out.copy_(bank.matrix()[2]), {}, bank.constants)
    score = scorer(single, seed=3, purpose=purpose, images=range(num), full=True)
    rows = scorer._rows(3, purpose, range(num))
    assert len(set(rows)) == num
    wanted = transformers_loss(bank, 2, blocks[torch.from_numpy(rows)])
    assert score.value == pytest.approx(wanted.mean(), abs=1e-6)
    assert score.se == pytest.approx(grouped_se(wanted, rows // 16), rel=1e-3)
    assert score.others["bits_per_byte"]["value"] == pytest.approx(wanted.mean() / math.log(2), abs=2e-6)
    net = build_network(bank.arch)
    size = sum(p.numel() for p in net.parameters())
    assert score.others["parameters"]["value"] == size
    # 2 layers of 4 experts of 3 matrices of 16 x 8, of which a token uses 2
    wanted_active = size - 2 * 2 * 3 * 16 * 8 if name == "mixture" else None
    assert (score.others.get("active_parameters") or {}).get("value") == wanted_active
    assert score.others["kv_cache_bytes"]["value"] == (256 if name == "mixture" else 128)
    assert (score.image_forwards, score.nfe) == (num, 1)


def test_every_block_comes_up_once_before_any_again(banks):
    scorer = objective()
    size = len(TEXT.tokens(TextPart.SEARCH)) * 16
    rows = scorer._rows(0, Purpose.SEARCH, range(size + 5))
    assert sorted(rows[:size]) == list(range(size))
    assert np.array_equal(scorer._rows(0, Purpose.SEARCH, range(3, 9)), rows[3:9])
    batched = objective(batch_size=5)
    a, b = (s(last(banks["tied"]), seed=0, purpose=Purpose.SEARCH, images=range(12)).value for s in (scorer, batched))
    assert a == pytest.approx(b, abs=1e-6)


def test_races_and_scores_agree(banks):
    scorer, candidate = objective(), last(banks["llama"])
    given = {"seed": 1, "purpose": Purpose.SEARCH}
    blocks = scorer.block_states(candidate, images=range(20), num_blocks=4, **given)
    assert len(blocks.states) == 4
    assert scorer.value_of(blocks.states, Purpose.SEARCH) == pytest.approx(
        scorer(candidate, images=range(20), **given).value, abs=1e-12
    )


@pytest.mark.parametrize("name", ["llama", "tied", "soft mixture"])
def test_slope_is_the_derivative_of_the_value(banks, name):
    bank, scorer, operator = banks[name], objective(), build("operator", "linear")
    assert why_no_gradient(scorer, operator) is None
    rng = np.random.default_rng(0)
    given = {"seed": 0, "purpose": Purpose.SEARCH, "images": range(8)}
    z = rng.normal(size=bank.num_checkpoints - 1) * 0.1
    slope = scorer.slope(operator.apply(bank, {"z": z}), **given)
    assert slope.image_forwards == 24
    assert slope.value == pytest.approx(scorer(operator.apply(bank, {"z": z}), **given).value, abs=1e-6)
    grad = operator.pull_back(bank, {"z": z}, slope.grad_P)["z"]
    assert np.abs(grad).max() > 1e-3
    for i, step in enumerate(np.eye(len(z)) * 0.03):
        above, below = (scorer(operator.apply(bank, {"z": z + s}), **given).value for s in (step, -step))
        assert grad[i] == pytest.approx((above - below) / 0.06, rel=0.02, abs=2e-4)


def test_what_does_not_fit_is_refused(banks, tmp_path):
    with pytest.raises(ConfigError, match="reads text, and data set `Digits` holds images"):
        build("objective", "language_modeling", dataset=build("dataset", "digits"))
    for settings, message in (
        ({"block_length": 1}, "`objective.block_length` is 1; it must be at least 2 and at most the text's stretch of"),
        ({"block_length": 513}, "`objective.block_length` is 513"),
        ({"batch_size": 0}, "`objective.batch_size` is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            objective(**settings)
    given = {"seed": 0, "purpose": Purpose.SEARCH, "images": range(2)}
    with pytest.raises(ConfigError, match="`block_length` is 128, and the network reads at most 64 tokens"):
        objective(block_length=128)(last(banks["llama"]), **given)
    save_network(build_network({**LLAMA, "config": {**CONFIG, "vocab_size": 300}}), tmp_path / "checkpoint-1")
    other = CheckpointBank.open(tmp_path)
    single = Candidate(other.arch, other.layout, lambda out: out.copy_(other.matrix()[0]), {})
    with pytest.raises(ConfigError, match="the network has 300 tokens, and the text 256: they would not mean the same"):
        objective()(single, **given)
    denoiser = Candidate({"class": "GaussianDenoiser", "config": {}}, Layout.of({}), lambda out: None, {})
    with pytest.raises(ConfigError, match="runs language models of transformers, and the checkpoints hold `Gaussian"):
        objective()(denoiser, **given)


def test_circumstances_tell_texts_apart(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 100)
    mine = build("dataset", "text", path=str(tmp_path / "a.txt"), stretch=32)
    first = objective().circumstances()
    other = build("objective", "language_modeling", dataset=mine, block_length=32, device="cpu").circumstances()
    assert first["data_digest"] != other["data_digest"]
    assert (
        first["detector_digest"]
        == other["detector_digest"]
        != objective(block_length=16).circumstances()["detector_digest"]
    )


def test_speed_is_measured_beside_the_score(banks, monkeypatch):
    bank, scorer = banks["llama"], objective(decode_tokens=5)
    single = Candidate(bank.arch, bank.layout, lambda out: out.copy_(bank.matrix()[2]), {}, bank.constants)
    ticks = iter([0, 1, 10, 12, 20, 24, 30, 31, 40, 45, 50, 52])  # six rounds, of which the first warms up
    monkeypatch.setattr("lcsc.models.decoding.time.perf_counter", lambda: next(ticks))
    row = scorer.speed(single)
    assert row["tokens_per_second"] == {"median": 20.0, "min": 8.0, "max": 40.0}  # 8 texts x 5 tokens
    facts = (row["batch"], row["context"], row["device"], row["dtype"], row["threads"])
    assert facts == (8, 27, "cpu", "float32", torch.get_num_threads())
    assert objective(decode_tokens=0).speed(single) is None


def test_bits_per_byte_count_the_bytes_of_the_text(banks):
    """Tokens that stand for 1, 2 and 3 bytes in turn; the first of a block has no loss, so its bytes do not count."""

    class Longer:
        name, vocab_size = "longer", 256

        def tokens(self, part):
            return TEXT.tokens(part)

        def byte_counts(self, part):
            return torch.arange(TEXT.tokens(part).numel()).view_as(TEXT.tokens(part)) % 3 + 1

    bank, scorer = banks["llama"], build("objective", "language_modeling", dataset=Longer(), block_length=32)
    single = Candidate(bank.arch, bank.layout, lambda out: out.copy_(bank.matrix()[2]), {}, bank.constants)
    score = scorer(single, seed=3, purpose=Purpose.REPORT, images=range(9), full=True)
    rows = scorer._rows(3, Purpose.REPORT, range(9))
    num = sum((row * 32 + at) % 3 + 1 for row in rows for at in range(1, 32))
    assert score.others["bits_per_byte"]["value"] == pytest.approx(score.value * 9 * 31 / num / math.log(2), rel=1e-12)


def test_networks_may_have_a_few_more_rows_than_a_tokenizer_has_tokens():
    from lcsc.models.causal_lm import check_text

    config = build_network(LLAMA).config
    check_text(config, 256, 8)
    config.vocab_size = 1300
    check_text(config, 300, 8)
    for num in (256, 1301, 270):
        with pytest.raises(ConfigError, match=f"the network has 1300 tokens, and the text {num}"):
            check_text(config, num, 8)

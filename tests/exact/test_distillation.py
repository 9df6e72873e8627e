"""Divergence from a teacher against scipy's and torch's on transformers' models, and how it grows near the teacher."""

from __future__ import annotations

import pytest
import torch
from helpers_text import CONFIG, LLAMA, language_bank
from scipy.stats import entropy
from transformers import AutoModelForCausalLM

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.datasets.base import TextPart
from lcsc.objectives.mean_loss import grouped_se
from lcsc.operators.base import Candidate

TEXT = build("dataset", "text", stretch=512)
IMAGES = range(24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return language_bank(tmp_path_factory.mktemp("distillation") / "bank")


def objective(teacher, name="distillation", **settings):
    own = {} if name == "language_modeling" else {"teacher": str(teacher)}
    return build("objective", name, dataset=TEXT, device="cpu", block_length=32, **own, **settings)


def mixed(bank, share):
    """The last checkpoint, moved by a share of its difference from the first."""
    rows = bank.matrix()
    row_P = rows[-1] + share * (rows[0] - rows[-1])
    return Candidate(bank.arch, bank.layout, lambda out: out.copy_(row_P), {}, bank.constants)


def logits(place, ids_NT):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(place).eval()(input_ids=ids_NT).logits[:, :-1].double()


def test_it_is_the_divergence_of_transformers_models(folder):
    bank, places = CheckpointBank.open(folder), sorted(folder.iterdir())
    scorer = objective(places[-1], batch_size=10)
    score = scorer(mixed(bank, 1.0), seed=3, purpose=Purpose.REPORT, images=IMAGES, full=True)
    rows_N = scorer._rows(3, Purpose.REPORT, IMAGES)
    ids_NT = TEXT.tokens(TextPart.REPORT).reshape(-1, 32)[torch.from_numpy(rows_N)].long()
    teacher, own = logits(places[-1], ids_NT), logits(places[0], ids_NT)
    p, q = (found.softmax(2).numpy() for found in (teacher, own))
    each_N = entropy(p, q, axis=2).mean(1)
    assert score.value == pytest.approx(each_N.mean(), rel=1e-5)
    assert score.value > 0.01
    by_torch = torch.nn.functional.kl_div(own.log_softmax(2), teacher.log_softmax(2), log_target=True, reduction="none")
    assert score.value == pytest.approx(float(by_torch.sum(2).mean()), rel=1e-5)
    assert score.se == pytest.approx(grouped_se(each_N, rows_N // 16), rel=1e-4)
    same_NT = (teacher.argmax(2) == own.argmax(2)).double().numpy()
    assert 0 < same_NT.mean() < 1
    assert score.others["agreement"]["value"] == pytest.approx(same_NT.mean(), abs=1e-7)
    assert score.others["agreement"]["se"] == pytest.approx(grouped_se(same_NT.mean(1), rows_N // 16), rel=1e-6)
    assert "bits_per_byte" not in score.others
    assert (score.image_forwards, scorer.circumstances()["nfe"]) == (2 * len(IMAGES), 2)
    itself = scorer(mixed(bank, 0.0), seed=3, purpose=Purpose.REPORT, images=IMAGES, full=True)
    assert itself.value == pytest.approx(0, abs=1e-7)
    assert itself.others["agreement"]["value"] == 1


def test_near_the_teacher_it_grows_as_the_square_and_its_derivative_is_that_of_differences(folder):
    bank, scorer = CheckpointBank.open(folder), objective(sorted(folder.iterdir())[-1])
    given = {"seed": 0, "purpose": Purpose.SEARCH, "images": IMAGES}
    values = [scorer(mixed(bank, share), **given).value for share in (0.1, 0.2, -0.2)]
    assert values[1] == pytest.approx(4 * values[0], rel=0.2)  # a loss would move by twice as much,
    assert values[2] == pytest.approx(values[1], rel=0.4)  # and down on one side
    rows, step = bank.matrix(), 1e-2
    slope = scorer.slope(mixed(bank, 0.5), **given)
    along = float(slope.grad_P @ (rows[0] - rows[-1]))
    ahead, behind = (scorer(mixed(bank, 0.5 + sign * step), **given).value for sign in (1, -1))
    assert along == pytest.approx((ahead - behind) / (2 * step), rel=2e-2)
    assert slope.image_forwards == 4 * len(IMAGES)


def test_the_teacher_counts_wherever_it_lies_and_mistakes_are_named(folder, tmp_path):
    first, last = sorted(folder.iterdir())[:: len(list(folder.iterdir())) - 1]
    (tmp_path / "copy").symlink_to(last)
    told = [objective(place).circumstances() for place in (first, last, tmp_path / "copy")]
    assert told[1] == told[2]
    assert told[0]["detector_digest"] != told[1]["detector_digest"]
    with pytest.raises(ConfigError, match=r"`objective.teacher` is not set; it must be the folder of a model"):
        objective("")
    with pytest.raises(ConfigError, match="holds no config.json"):
        objective(tmp_path)
    other = {**LLAMA, "config": {**CONFIG, "vocab_size": 300}}
    more = sorted(language_bank(tmp_path / "more", other, num=1).iterdir())[0]
    bank = CheckpointBank.open(folder)
    with pytest.raises(ConfigError, match=r"`objective.teacher` is `.*`: the network has 300 tokens, and the text 256"):
        objective(more)(mixed(bank, 0.0), seed=0, purpose=Purpose.SEARCH, images=range(2))

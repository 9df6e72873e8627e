"""The loss after a continued training: against a training by hand, the same again, and what it counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers_text import LLAMA, MIXTURE, TIED, language_bank

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Windows
from lcsc.models.flops import active_matrices, training_flops
from lcsc.models.network import build_network
from lcsc.objectives.language_modeling import LanguageModeling
from lcsc.objectives.uptrained_loss import UptrainedLoss
from lcsc.operators.linear import Linear

TEXT = build("dataset", "text", stretch=256, every=40)
SETTINGS = {"dataset": TEXT, "block_length": 32, "device": "cpu"}
ASKED = {"seed": 5, "purpose": Purpose.SEARCH, "images": range(6)}


def uptrained(**settings):
    return UptrainedLoss(**{**SETTINGS, "num_steps": 2, "train_batch_size": 3, "learning_rate": 0.01, **settings})


def candidates(tmp_path, arch=LLAMA, num=2):
    """The last checkpoints, untouched."""
    bank = CheckpointBank.open(language_bank(tmp_path / "bank", arch))
    linear = Linear()
    return [linear.apply(bank, linear.space(bank).to_point(np.eye(3)[i])) for i in range(num)]


def test_without_steps_it_is_the_loss_to_the_bit(tmp_path):
    one, _ = candidates(tmp_path)
    plain = LanguageModeling(**SETTINGS)(one, **ASKED, full=True)
    none = uptrained(num_steps=0)
    score = none(one, **ASKED, full=True)
    assert (score.value, score.se, score.image_forwards) == (plain.value, plain.se, plain.image_forwards)
    assert score.others["bits_per_byte"] == plain.others["bits_per_byte"]
    assert none.no_gradient is None
    assert "behind a training" in uptrained().no_gradient


@pytest.mark.parametrize("arch", [TIED, MIXTURE], ids=["tied", "mixture"])
def test_it_is_adamw_on_the_training_part(tmp_path, arch):
    """Two steps in plain torch, then the plain loss."""
    one = candidates(tmp_path, arch)[0]
    objective = uptrained(max_grad_norm=0.5, warmup_steps=1)
    live = LanguageModeling(**SETTINGS)._live(one)
    windows = Windows(TEXT.tokens(TextPart.TRAIN), objective, SeedRange(0, Purpose.TRAIN))
    optimizer = torch.optim.AdamW(live.net.parameters(), lr=0.0, weight_decay=0.0)
    live.net.requires_grad_(True)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 0.01 * step  # rises for one step
        ids_NT = torch.stack([windows[3 * step + i]["input_ids"] for i in range(3)])
        live.net(input_ids=ids_NT, labels=ids_NT).loss.backward()
        torch.nn.utils.clip_grad_norm_(live.net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    live.net.requires_grad_(False)
    by_hand = torch.cat(list(LanguageModeling(**SETTINGS).batches(live, **ASKED))).double().mean()
    before = LanguageModeling(**SETTINGS)(one, **ASKED).value
    assert objective(one, **ASKED).value == pytest.approx(float(by_hand), abs=2e-5)
    assert abs(before - float(by_hand)) > 1e-2


def test_same_bits_whatever_came_before(tmp_path):
    one, two = candidates(tmp_path, MIXTURE)
    objective = uptrained(keep=1)
    first, other = objective(one, **ASKED), objective(two, **ASKED)
    again = objective(one, **ASKED)  # trained anew: only one is kept
    torch.manual_seed(99)
    assert first.value == again.value == uptrained()(one, **ASKED).value != other.value
    longer = objective(one, seed=5, purpose=Purpose.SELECT, images=range(9))
    assert longer.value == uptrained()(one, seed=5, purpose=Purpose.SELECT, images=range(9)).value
    assert one.weights().keys() == candidates(tmp_path / "again", MIXTURE)[0].weights().keys()


def test_a_candidate_is_trained_once_while_it_is_kept(tmp_path, monkeypatch):
    from lcsc.models.fit import Fit

    trained, run = [], Fit.run
    monkeypatch.setattr(Fit, "run", lambda self, net, *a, **k: (trained.append(1), run(self, net, *a, **k)))
    one, two = candidates(tmp_path)
    objective = uptrained(keep=2)
    scores = [objective(c, **ASKED) for c in (one, two, one, two)]
    assert len(trained) == 2
    assert (scores[0], scores[1]) == (scores[2], scores[3])  # also in what they say they cost


def test_races_see_the_trained_network_and_count_its_training_once(tmp_path):
    one = candidates(tmp_path)[0]
    objective = uptrained()
    parts = [
        objective.block_states(one, seed=5, purpose=Purpose.SEARCH, images=images, num_blocks=2)
        for images in (range(4), range(4, 6))
    ]
    states = [state for part in parts for state in part.states]
    score = objective(one, **ASKED)
    assert objective.value_of(states, Purpose.SEARCH) == pytest.approx(score.value, rel=1e-12)
    assert [part.image_forwards for part in parts] == [4 + 3 * 2 * 3, 2]
    assert score.image_forwards == 6 + 3 * 2 * 3


def test_costs_of_a_training(tmp_path):
    one = candidates(tmp_path, MIXTURE)[0]
    others = uptrained()(one, **ASKED, full=True).others
    assert others["trained_tokens"]["value"] == 2 * 3 * 32
    net = build_network(MIXTURE)
    attention, router, expert = 2 * 16 * 32 + 2 * 16 * 16, 4 * 16, 3 * 16 * 8
    assert active_matrices(net) == 2 * (attention + router + 2 * expert) + 256 * 16
    assert active_matrices(build_network(TIED)) == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32) + 256 * 16
    flops = 3 * 192 * (2 * active_matrices(net) + 4 * 2 * 32 * 32)
    assert others["training_flops"]["value"] == training_flops(net, 192, 32) == flops


def test_a_training_that_diverges_is_a_failed_candidate(tmp_path):
    one = candidates(tmp_path)[0]
    with pytest.raises(EvaluationError, match="diverged") as caught:
        uptrained(learning_rate=1e30, max_grad_norm=1e30)(one, **ASKED)
    assert caught.value.image_forwards == 6 + 18


def test_circumstances_tell_the_training():
    one, two = uptrained(), uptrained(learning_rate=0.02)
    assert one.circumstances()["detector_digest"] != two.circumstances()["detector_digest"]
    assert one.circumstances()["metric"] == "uptrained_loss"
    same = dataclasses.replace(one, keep=9, batch_size=5)
    assert same.circumstances() == one.circumstances()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "`objective.num_steps` is -1; it must be at least 0"),
        ({"learning_rate": 0.0}, "`objective.learning_rate`, `weight_decay` are 0.0, 0.0"),
        ({"schedule": "cubic"}, "`objective.schedule` is `cubic`"),
        ({"keep": 0}, "`objective.keep` is 0"),
        ({"device": "cuda:3"}, "`objective.device` is `cuda:3`, and transformers trains on the first GPU"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        uptrained(**settings)


def test_the_size_of_a_scoring_batch_changes_no_training(tmp_path):
    one, _ = candidates(tmp_path)
    values = [uptrained(batch_size=size)(one, **ASKED).value for size in (1, 64)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_training_in_legs_gives_the_same_bits(tmp_path):
    """With dropout and a rate that falls over all steps; another candidate comes between."""
    arch = {**LLAMA, "config": {**LLAMA["config"], "attention_dropout": 0.2}}
    one, two = candidates(tmp_path, arch)
    settings = {"num_steps": 4, "schedule": "linear"}
    objective, asked = uptrained(**settings), {**ASKED, "num_blocks": 2}
    legs = [objective.leg_states(c, **asked, steps=steps) for steps in (range(1), range(1, 3)) for c in (one, two)]
    folders = [course.folder for course in objective.__dict__["_courses"].values()]
    assert len(folders) == 2
    assert all(folder.is_dir() for folder in folders)
    last = objective.leg_states(one, **asked, steps=range(3, 4))
    whole = uptrained(**settings).block_states(one, **asked)
    assert [state.tolist() for state in last.states] == [state.tolist() for state in whole.states]
    assert objective(one, **ASKED).value == uptrained(**settings)(one, **ASKED).value
    assert [leg.image_forwards for leg in (*legs, last)] == [6 + 9, 6 + 9, 6 + 18, 6 + 18, 6 + 9]
    assert sorted(folder.exists() for folder in folders) == [False, True]  # `two` may go on
    early = uptrained(num_steps=3, schedule="linear").block_states(two, **asked)
    assert [state.tolist() for state in legs[3].states] != [state.tolist() for state in early.states]  # falls earlier
    objective.__dict__["_courses"].clear()
    assert not any(folder.exists() for folder in folders)

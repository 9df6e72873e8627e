"""The derivative of a score with respect to the point, against differences of the score itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.core.space import Box, SearchSpace
from lcsc.models.network import build_network, save_network
from lcsc.objectives.base import why_no_gradient
from lcsc.operators.linear import Linear
from lcsc.searchers.base import Task

SHAPE = [1, 4, 4]


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_arch):
    folder = tmp_path_factory.mktemp("slope")
    torch.manual_seed(0)
    net = build_network(tiny_arch)
    for step in range(1, 5):
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    return CheckpointBank.open(folder)


def objective(sampler="euler", metric="fid_pixels", batch_size=64, **settings):
    dataset = build("dataset", "digits")
    return build(
        "objective",
        "sample_quality",
        model=build("model", "edm"),
        sampler=build("sampler", sampler, **settings),
        metric=build("metric", metric),
        dataset=dataset,
        batch_size=batch_size,
        device="cpu",
    )


def slope_z(scorer, bank, z, images):
    operator = Linear()
    candidate = operator.apply(bank, {"z": z})
    slope = scorer.slope(candidate, seed=0, purpose=Purpose.FRESH, images=images)
    return slope, operator.pull_back(bank, {"z": z}, slope.grad_P)["z"]


@pytest.mark.parametrize(
    ("sampler", "settings", "metric"),
    [
        ("euler", {"num_steps": 3}, "fid_pixels"),
        # from sigma 80 an untrained network's Heun steps leave [-1, 1] so far that float32 differences are noise
        ("heun", {"num_steps": 3, "sigma_max": 1.0}, "fid_pixels"),
        ("dpmpp_2m", {"num_steps": 3}, "kid_pixels"),
    ],
)
def test_against_central_differences(bank, sampler, settings, metric):
    scorer, images = objective(sampler, metric, **settings), range(70, 170)
    z = np.array([0.3, -0.2, 0.1])
    slope, found = slope_z(scorer, bank, z, images)
    step = 1e-2
    wanted = []
    for d in range(3):
        sides = []
        for sign in (1, -1):
            moved = z.copy()
            moved[d] += sign * step
            sides.append(slope_z(scorer, bank, moved, images)[0].value)
        wanted.append((sides[0] - sides[1]) / (2 * step))
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    assert slope.image_forwards == 4 * 100 * scorer.sampler.nfe()


def test_batches_do_not_change_it(bank):
    z = np.zeros(3)
    whole, one = slope_z(objective(batch_size=120, num_steps=2), bank, z, range(120))
    parts, other = slope_z(objective(batch_size=32, num_steps=2), bank, z, range(120))
    assert whole.value == pytest.approx(parts.value, rel=1e-6)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(one).max())


def test_the_same_images_as_an_ordinary_score(bank):
    scorer, z = objective(num_steps=2), np.zeros(3)
    candidate = Linear().apply(bank, {"z": z})
    score = scorer(candidate, seed=3, purpose=Purpose.SEARCH, images=range(100))
    slope = scorer.slope(candidate, seed=3, purpose=Purpose.SEARCH, images=range(100))
    assert slope.value == pytest.approx(score.value, rel=1e-6)
    assert score.image_forwards == 200


def test_nothing_is_left_switched_on(bank):
    scorer = objective(num_steps=2)
    slope_z(scorer, bank, np.zeros(3), range(40))
    live = scorer._live(Linear().apply(bank, {"z": np.zeros(3)}))
    assert not any(p.requires_grad or p.grad is not None for p in live.net.parameters())


def test_a_diverged_candidate_is_a_failed_evaluation(bank):
    with pytest.raises(EvaluationError):
        slope_z(objective(num_steps=2), bank, np.full(3, 1e30), range(40))


def test_what_has_no_gradient_says_why(bank):
    class Shell:
        name = "shell"

    assert why_no_gradient(Shell(), Linear()) == "objective `shell` has no derivative"
    assert why_no_gradient(objective(), object()) == "operator `object` is not differentiable"
    assert why_no_gradient(objective(), Linear()) is None
    task = Task(SearchSpace((Box("z", 2),)), 5, 0, no_gradient="objective `shell` has no derivative")
    with pytest.raises(ConfigError, match="needs a derivative, and objective `shell` has no derivative. Use searcher="):
        build("searcher", "gradient").start(task)

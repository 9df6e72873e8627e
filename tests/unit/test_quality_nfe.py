"""One score for several NFEs, against the scores at each of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import gmean

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build, describe
from lcsc.core.seeds import Purpose
from lcsc.models.network import build_network, save_network
from lcsc.objectives.base import Differentiable, Objective, why_no_gradient
from lcsc.operators.linear import Linear

WHERE = {"seed": 0, "purpose": Purpose.SELECT, "images": range(20, 100)}


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_arch):
    folder = tmp_path_factory.mktemp("nfe")
    torch.manual_seed(0)
    net = build_network(tiny_arch)
    for step in range(1, 4):
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    return CheckpointBank.open(folder)


@pytest.fixture(scope="module")
def candidate(bank):
    return Linear().apply(bank, {"z": np.array([0.3, -0.2])})


def objective(name="fid_nfe", sampler=None, metric="fid_pixels", others=(), **settings):
    return build(
        "objective",
        name,
        model=build("model", "edm"),
        sampler=sampler or build("sampler", "euler", sigma_max=5.0),
        metric=build("metric", metric),
        dataset=build("dataset", "digits"),
        other_metrics=tuple(build("metric", other) for other in others),
        batch_size=64,
        device="cpu",
        **settings,
    )


def alone(candidate, steps, **where):
    """The scores that the sampler has at each number of steps, by `sample_quality`."""
    found = []
    for num_steps in steps:
        scorer = objective(
            "sample_quality", build("sampler", "euler", num_steps=num_steps, sigma_max=5.0), others=("kid_pixels",)
        )
        found.append(scorer(candidate, **{**WHERE, **where}))
    return found


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({}, gmean),
        ({"weights": [3.0, 1.0]}, lambda values: gmean(values, weights=[3, 1])),
        ({"combine": "mean"}, np.mean),
        ({"combine": "mean", "weights": [3.0, 1.0]}, lambda values: np.average(values, weights=[3, 1])),
    ],
)
def test_the_value_is_the_mean_of_the_scores_at_each_nfe(candidate, settings, mean):
    score = objective(nfe=[1, 3], **settings)(candidate, **WHERE)
    values = [one.value for one in alone(candidate, (1, 3))]
    assert values[0] > 1.05 * values[1]  # they differ, or the test could not fail
    assert score.value == pytest.approx(mean(values), rel=1e-12)
    assert (score.num_images, score.nfe, score.image_forwards, score.se) == (80, 4, 320, None)
    assert score.others == {}


def test_full_scores_hold_each_nfe_and_bound_the_error(candidate):
    scorer = objective(nfe=[1, 3], others=("kid_pixels",))
    score = scorer(candidate, **WHERE, full=True)
    ones = alone(candidate, (1, 3), full=True)
    assert sorted(score.others) == ["fid_pixels@1", "fid_pixels@3", "kid_pixels@1", "kid_pixels@3"]
    for nfe, one in zip((1, 3), ones, strict=True):
        assert score.others[f"fid_pixels@{nfe}"] == {"value": one.value, "se": one.se}
        assert score.others[f"kid_pixels@{nfe}"] == one.others["kid_pixels"]
    # a geometric mean of n has relative derivative 1/n by each member; fully correlated errors add
    assert score.se / score.value == pytest.approx(np.mean([one.se / one.value for one in ones]), rel=1e-12)
    assert score.value == scorer(candidate, **WHERE).value


@pytest.mark.parametrize("combine", ["log_mean", "mean"])
def test_slope_against_central_differences(bank, combine):
    scorer, operator = objective(nfe=[1, 3], combine=combine, weights=[1.0, 2.0]), Linear()
    z, step, wanted = np.array([0.3, -0.2]), 1e-2, []
    slope = scorer.slope(operator.apply(bank, {"z": z}), **WHERE)
    for e in np.eye(2):
        sides = [scorer(operator.apply(bank, {"z": z + side * step * e}), **WHERE).value for side in (1, -1)]
        wanted.append((sides[0] - sides[1]) / (2 * step))
    found = operator.pull_back(bank, {"z": z}, slope.grad_P)["z"]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    assert slope.value == pytest.approx(scorer(operator.apply(bank, {"z": z}), **WHERE).value, rel=1e-6)
    assert slope.image_forwards == 4 * 80 * (1 + 3)


def test_it_is_an_objective_like_another(candidate):
    scorer, plain = objective(nfe=[1, 3]), objective("sample_quality")
    assert isinstance(scorer, Objective)
    assert isinstance(scorer, Differentiable)
    assert why_no_gradient(scorer, Linear()) is None
    assert scorer.floor() == plain.floor()
    assert scorer.min_images == plain.min_images
    assert scorer.name == "fid_pixels@1+3"
    told, known = scorer.circumstances(), plain.circumstances()
    assert {key: told[key] for key in known if key not in ("nfe", "sampler")} == {
        key: known[key] for key in known if key not in ("nfe", "sampler")
    }
    assert (told["nfe"], told["combine"], told["weights"]) == ("1+3", "log_mean", [0.5, 0.5])
    assert [text.split(",")[0] for text in told["sampler"]] == ["Euler(num_steps=1", "Euler(num_steps=3"]
    assert describe("objective", scorer)["nfe"] == [1, 3]
    images = scorer.images(candidate, seed=0, purpose=Purpose.REPORT, num_images=3)
    one = objective("sample_quality", build("sampler", "euler", num_steps=1, sigma_max=5.0))
    assert torch.equal(images, one.images(candidate, seed=0, purpose=Purpose.REPORT, num_images=3))


def test_weights_are_combined_once(candidate):
    calls = []

    def write(theta_P):
        calls.append(len(theta_P))
        candidate.write(theta_P)

    counted, scorer = replace(candidate, write=write), objective(nfe=[1, 2, 3])
    scorer(counted, **WHERE)
    scorer.slope(counted, **WHERE)
    assert len(calls) == 2


def test_a_failure_says_at_which_nfe(bank):
    broken = Linear().apply(bank, {"z": np.full(2, 1e30)})
    for call in (objective(nfe=[2, 1]), objective(nfe=[2, 1]).slope):
        with pytest.raises(EvaluationError, match=r"^at 2 network calls: .*"):
            call(broken, **WHERE)


def test_a_logarithm_needs_scores_above_zero():
    """KID is unbiased, so that real images can score below 0."""
    message = "at 3 network calls the score is -0.01; a geometric mean needs .* Set `objective.combine` to mean."
    with pytest.raises(EvaluationError, match=message):
        objective(nfe=[1, 3], metric="kid_pixels")._mean([0.2, -0.01])
    assert objective(nfe=[1, 3], metric="kid_pixels", combine="mean")._mean([0.2, -0.01])[0] == pytest.approx(0.095)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": []}, r"`objective.nfe` is \[\]; give numbers of at least 1, each once"),
        ({"nfe": [2, 2]}, r"`objective.nfe` is \[2, 2\]; give numbers"),
        ({"nfe": [0, 2]}, r"`objective.nfe` is \[0, 2\]; give numbers"),
        ({"combine": "median"}, "`objective.combine` is `median`; it must be one of log_mean, mean"),
        ({"nfe": [1, 2], "weights": [1.0]}, r"`objective.weights` is \[1.0\] for 2 numbers"),
        ({"nfe": [1], "weights": [0.0]}, r"`objective.weights` is \[0.0\] for 1 numbers"),
        ({"nfe": [1, 4], "sampler": build("sampler", "heun")}, "`heun` cannot make images with 4 .* is 3 and 5"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        objective(**settings)


def test_the_times_at_each_nfe_are_searched_beside_the_weights(candidate):
    scorer = objective(nfe=[1, 2, 3], sampler=build("sampler", "euler", sigma_max=5.0, search_times=True))
    assert [(box.name, box.size, box.level) for box in scorer.space().boxes] == [("times@2", 1, 1), ("times@3", 2, 1)]
    vector, step, wanted = np.array([0.2, -0.1, 0.3]), 1e-2, []
    for e in np.eye(3):
        sides = [scorer.at(scorer.space().to_point(vector + side * step * e)) for side in (1, -1)]
        wanted.append(np.subtract(*[scorer_at(candidate, **WHERE).value for scorer_at in sides]) / (2 * step))
    found = scorer.space().to_vector(scorer.at(scorer.space().to_point(vector)).slope(candidate, **WHERE).own)
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=1e-2 * np.abs(wanted).max())
    still = scorer.at(scorer.space().to_point(np.zeros(3)))
    assert still(candidate, **WHERE).value == scorer(candidate, **WHERE).value
    assert objective(nfe=[1, 3]).space().boxes == ()

"""Held-out losses against closed forms, and their derivatives against differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lcsc.bank import CheckpointBank, Layout
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.network import build_network, save_network
from lcsc.objectives.base import why_no_gradient
from lcsc.objectives.mean_loss import grouped_se
from lcsc.operators.base import Candidate
from lcsc.operators.linear import Linear

LOSSES = {"denoising_loss": ("edm", (1, 3)), "consistency_loss": ("consistency", (2, 6))}


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_arch):
    folder = tmp_path_factory.mktemp("losses")
    torch.manual_seed(0)
    net = build_network(tiny_arch)
    for step in range(1, 5):
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    return CheckpointBank.open(folder)


def toy_candidate(mean_CHW, std_CHW):
    """A candidate whose network is the ideal denoiser of N(mean, std^2), pixel by pixel."""
    tensors, shape = {"mean_CHW": mean_CHW, "std_CHW": std_CHW}, tuple(mean_CHW.shape)
    layout, arch = Layout.of(dict.fromkeys(tensors, shape)), {"class": "GaussianDenoiser", "config": {"shape": shape}}
    return Candidate(arch, layout, lambda theta_P: layout.flatten(tensors, theta_P), {})


def objective(name, model, dataset=None, **settings):
    return build(
        "objective", name, model=model, dataset=dataset or build("dataset", "digits"), device="cpu", **settings
    )


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.2, 1.3)])
def test_denoising_loss_of_gaussians_is_the_closed_form(shift, stretch):
    """D = m + g (x - m) with g = v / (v + sigma^2) errs by (1 - g) (m - y) + g sigma n, integrated over ln(sigma)."""
    data = build("dataset", "gaussian", num_images=12_000)
    candidate = toy_candidate(data.mean_CHW + shift, data.std_CHW * stretch)
    scorer = objective("denoising_loss", build("model", "direct"), data, p_mean=-1.0, p_std=0.8, sigma_data=0.3)
    score = scorer(candidate, seed=0, purpose=Purpose.SEARCH, images=range(6_000), full=True)
    true_var = data.std_CHW.double().numpy() ** 2
    var = true_var * stretch**2

    def at(log_sigma):
        sigma2 = np.exp(2 * log_sigma)
        gain = var / (var + sigma2)
        error = np.mean((1 - gain) ** 2 * (true_var + shift**2) + gain**2 * sigma2)
        return (sigma2 + 0.3**2) / (sigma2 * 0.3**2) * error * stats.norm.pdf(log_sigma, -1.0, 0.8)

    wanted, _ = integrate.quad(at, -9, 7)
    assert score.se < 0.02 * wanted
    assert abs(score.value - wanted) < 4 * score.se
    assert score.image_forwards == 6_000


@dataclass(frozen=True)
class ExactFlow:
    """The consistency function of N(mean, std^2): the probability-flow ODE scales the distance to the mean."""

    sigma_min: float = 0.01

    def denoise(self, net, x_NCHW, sigma, labels_N=None):
        sigma_N111 = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        var = net.std_CHW**2
        return net.mean_CHW + ((var + self.sigma_min**2) / (var + sigma_N111**2)).sqrt() * (x_NCHW - net.mean_CHW)


def test_consistency_loss_of_a_gaussian_is_the_closed_form():
    """One pixel: the outputs differ by a normal number of known variance; its pseudo-Huber, averaged over the grid."""
    data = build("dataset", "gaussian", shape=[1, 1, 1], num_images=12_000)
    candidate = toy_candidate(data.mean_CHW, data.std_CHW)
    grid_settings = {"sigma_min": 0.01, "sigma_max": 5.0, "rho": 3.0, "p_mean": -1.5, "p_std": 1.2}
    scorer = objective("consistency_loss", ExactFlow(), data, intervals=6, huber=0.1, **grid_settings)
    score = scorer(candidate, seed=0, purpose=Purpose.SEARCH, images=range(6_000), full=True)
    sigmas = np.linspace(0.01 ** (1 / 3), 5.0 ** (1 / 3), 7) ** 3
    chance = np.diff(stats.norm.cdf(np.log(sigmas), -1.5, 1.2))
    var = float(data.std_CHW.double()) ** 2
    slope = np.sqrt((var + 0.01**2) / (var + sigmas**2))
    spread = np.sqrt(np.diff(slope) ** 2 * var + np.diff(slope * sigmas) ** 2)
    huber = [
        integrate.quad(lambda z, s=s: (np.sqrt((s * z) ** 2 + 0.1**2) - 0.1) * stats.norm.pdf(z), -9, 9)[0]
        for s in spread
    ]
    wanted = np.sum(chance / chance.sum() * np.array(huber) / np.diff(sigmas))
    assert score.se < 0.03 * wanted
    assert abs(score.value - wanted) < 4 * score.se
    assert score.image_forwards == 12_000


@pytest.mark.parametrize("name", LOSSES)
def test_slope_against_central_differences(bank, name):
    model, (_, forwards) = LOSSES[name]
    scorer, operator, images = objective(name, build("model", model), batch_size=32), Linear(), range(30, 70)
    z = np.array([0.3, -0.2, 0.1])

    def slope_at(z):
        return scorer.slope(operator.apply(bank, {"z": z}), seed=1, purpose=Purpose.FRESH, images=images)

    slope = slope_at(z)
    found = operator.pull_back(bank, {"z": z}, slope.grad_P)["z"]
    wanted = [(slope_at(z + step).value - slope_at(z - step).value) / 4e-2 for step in np.eye(3) * 2e-2]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    assert slope.image_forwards == forwards * 40
    score = scorer(operator.apply(bank, {"z": z}), seed=1, purpose=Purpose.FRESH, images=images)
    assert slope.value == pytest.approx(score.value, rel=1e-6)
    assert why_no_gradient(scorer, operator) is None
    assert not any(
        p.requires_grad or p.grad is not None for p in scorer._live(operator.apply(bank, {"z": z})).net.parameters()
    )


@pytest.mark.parametrize("name", LOSSES)
def test_images_batches_and_halves(bank, name):
    model = build("model", LOSSES[name][0])
    scorer, candidate = objective(name, model), Linear().apply(bank, {"z": np.zeros(3)})

    def losses(scorer, purpose, images):
        live = scorer._live(candidate)
        with torch.no_grad():
            return torch.cat(list(scorer.batches(live, 0, purpose, images)))

    whole = losses(scorer, Purpose.SEARCH, range(90))
    torch.testing.assert_close(losses(objective(name, model, batch_size=17), Purpose.SEARCH, range(90)), whole)
    torch.testing.assert_close(losses(scorer, Purpose.SEARCH, range(40, 90)), whole[40:])  # image i is image i
    assert not torch.allclose(losses(scorer, Purpose.FRESH, range(90)), whole)
    half = scorer._rows(0, Purpose.SEARCH, range(898))
    assert sorted(half) == sorted(scorer._rows(0, Purpose.SELECT, range(898)))  # every image of the half, once
    assert len({*half, *scorer._rows(0, Purpose.REPORT, range(899))}) == 898 + 899 == len(scorer.dataset.images())
    assert len(set(scorer._rows(0, Purpose.FRESH, range(898, 2 * 898)))) == 898  # the next pass, in another order
    assert (scorer._rows(0, Purpose.FRESH, range(898, 2 * 898)) != scorer._rows(0, Purpose.FRESH, range(898))).any()
    prints = {
        scorer.circumstances()["detector_digest"],
        objective(name, model, p_std=0.5).circumstances()["detector_digest"],
    }
    assert len(prints) == 2


def test_standard_error_of_groups():
    rng = np.random.default_rng(0)
    single = rng.normal(size=50)
    assert grouped_se(single, np.arange(50)) == pytest.approx(stats.sem(single))
    means = rng.normal(size=(40, 1))  # three equal losses an image count as one
    assert grouped_se(np.repeat(means, 3), np.repeat(np.arange(40), 3)) == pytest.approx(stats.sem(means[:, 0]))
    assert grouped_se(single, np.zeros(50)) is None


def test_failures_and_settings_are_said(bank):
    diverged = Linear().apply(bank, {"z": np.full(3, 1e30)})
    for name, (model, _) in LOSSES.items():
        with pytest.raises(EvaluationError):
            objective(name, build("model", model))(diverged, seed=0, purpose=Purpose.SEARCH, images=range(4))
        with pytest.raises(EvaluationError):
            objective(name, build("model", model)).slope(diverged, seed=0, purpose=Purpose.SEARCH, images=range(4))
        with pytest.raises(ConfigError, match="`objective.batch_size` is 0"):
            objective(name, build("model", model), batch_size=0)
    with pytest.raises(ConfigError, match=r"`objective.sigma_data` is 0.5, the model has 0.3; give both the same"):
        objective("denoising_loss", build("model", "edm", sigma_data=0.3))
    with pytest.raises(ConfigError, match="`EDM` has none; use model `consistency` with the same"):
        objective("consistency_loss", build("model", "edm"))
    with pytest.raises(ConfigError, match="`objective.huber` is 0; it must be above 0"):
        objective("consistency_loss", build("model", "consistency"), huber=0)

"""Losses of the trainers against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_training import TOY
from scipy.stats import norm
from torch import Tensor, nn

from lcsc.models.direct import Direct
from lcsc.training.consistency import ConsistencyTraining, noise_grid
from lcsc.training.diffusion import Diffusion


def test_diffusion_loss_is_eq_8_of_edm_in_numpy() -> None:
    rng = np.random.default_rng(0)
    images, net = rng.normal(size=(5, 1, 2, 2)).astype(np.float32), nn.Identity()
    draws = Diffusion().draw(rng, 1, images.shape)

    class Half:
        def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: Tensor, labels_N: Tensor | None = None) -> Tensor:
            return x_NCHW / 2

    got = Diffusion().loss(net, Half(), torch.from_numpy(images), {k: torch.from_numpy(v) for k, v in draws.items()})
    sigma = draws["sigma"].astype(np.float64)
    noisy = images + sigma[:, None, None, None] * draws["noise"]
    error = ((noisy / 2 - images) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(got.numpy(), (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * error, rtol=1e-5)


def test_diffusion_loss_of_the_ideal_denoiser_is_the_posterior_variance() -> None:
    # E[(D - y)^2 | sigma] = s^2 sigma^2 / (s^2 + sigma^2); with s = sigma_data the weight makes it 1 at any sigma.
    net = load_toy(mean=0.25, std=0.5)
    rng = np.random.default_rng(1)
    draws = {k: torch.from_numpy(v) for k, v in Diffusion().draw(rng, 1, (40_000, 1, 2, 2)).items()}
    images = 0.25 + 0.5 * torch.from_numpy(rng.standard_normal((40_000, 1, 2, 2), dtype=np.float32))
    loss_N = Diffusion().loss(net, Direct(), images, draws).detach()
    assert float(loss_N.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(0.5 / 40_000))


def load_toy(mean: float, std: float) -> nn.Module:
    from lcsc.models.network import build_network

    net = build_network(TOY)
    with torch.no_grad():
        net.mean_CHW.fill_(mean)
        net.std_CHW.fill_(std)
    return net


def test_diffusion_draws_sigma_from_the_lognormal() -> None:
    sigma = Diffusion(p_mean=-0.4, p_std=0.7).draw(np.random.default_rng(2), 1, (100_000, 1, 1, 1))["sigma"]
    assert np.log(sigma).mean() == pytest.approx(-0.4, abs=0.01)
    assert np.log(sigma).std() == pytest.approx(0.7, abs=0.01)


def test_consistency_loss_is_the_pseudo_huber_distance_in_numpy() -> None:
    trainer, rng = ConsistencyTraining(), np.random.default_rng(3)
    images = rng.normal(size=(6, 1, 2, 2)).astype(np.float32)
    draws = trainer.draw(rng, 1, images.shape)

    class Scaled:
        def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: Tensor, labels_N: Tensor | None = None) -> Tensor:
            return x_NCHW / (1 + sigma.reshape(-1, 1, 1, 1))

    got = trainer.loss(
        nn.Identity(), Scaled(), torch.from_numpy(images), {k: torch.from_numpy(v) for k, v in draws.items()}
    )

    def f(sigma: np.ndarray) -> np.ndarray:
        s = sigma.astype(np.float64)[:, None, None, None]
        return (images + s * draws["noise"]) / (1 + s)

    c = 0.00054 * math.sqrt(4)
    squared = ((f(draws["sigma"]) - f(draws["sigma_below"])) ** 2).sum(axis=(1, 2, 3))
    expected = (np.sqrt(squared + c**2) - c) / (draws["sigma"] - draws["sigma_below"]).astype(np.float64)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-3)


def test_consistency_target_gives_no_gradient() -> None:
    seen: list[bool] = []

    class Watch:
        def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: Tensor, labels_N: Tensor | None = None) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return net(x_NCHW)

    trainer, net = ConsistencyTraining(), nn.Conv2d(1, 1, 1)
    draws = trainer.draw(np.random.default_rng(0), 1, (3, 1, 2, 2))
    trainer.loss(net, Watch(), torch.zeros(3, 1, 2, 2), {k: torch.from_numpy(v) for k, v in draws.items()}).sum()
    assert seen == [False, True]  # the smaller noise level first


def test_consistency_grid_is_karras_and_its_probabilities_lognormal() -> None:
    from diffusers import EDMEulerScheduler

    grid, cumulative = noise_grid(10, 0.002, 80.0, 7.0, -1.1, 2.0)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(11)
    np.testing.assert_allclose(grid[::-1], scheduler.sigmas[:-1].numpy(), rtol=1e-5)
    cdf = norm.cdf((np.log(grid.astype(np.float64)) + 1.1) / 2.0)
    np.testing.assert_allclose(cumulative, (cdf[1:] - cdf[0]) / (cdf[-1] - cdf[0]), rtol=1e-5)
    draws = ConsistencyTraining().draw(np.random.default_rng(4), 1, (50_000, 1, 1, 1))
    share = np.array([(draws["sigma_below"] == level).mean() for level in grid[:-1]])
    np.testing.assert_allclose(share, np.diff(cumulative, prepend=0), atol=0.01)
    assert np.array_equal(grid[np.searchsorted(grid, draws["sigma"]) - 1], draws["sigma_below"])


def test_consistency_grid_doubles_at_equal_distances() -> None:
    trainer = ConsistencyTraining(num_steps=800, min_intervals=10, max_intervals=80)
    assert [trainer.num_intervals(s) for s in (1, 200, 201, 400, 401, 600, 601, 800)] == [
        10,
        10,
        20,
        20,
        40,
        40,
        80,
        80,
    ]

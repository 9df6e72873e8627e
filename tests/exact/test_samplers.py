"""Samplers against closed forms.

For clean ~ N(mean, std^2) the ideal denoiser is linear and the probability-flow ODE (arXiv:2206.00364, Eq. 1) has the
solution x(sigma) = mean + (x_start - mean) sqrt(std^2 + sigma^2) / sqrt(std^2 + sigma_max^2).
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor, nn

from lcsc.core import registry
from lcsc.core.errors import ConfigError
from lcsc.core.seeds import ImageNoise, Purpose, SeedRange
from lcsc.models.direct import Direct
from lcsc.models.edm import EDM
from lcsc.models.gaussian import GaussianDenoiser
from lcsc.samplers.base import with_nfe
from lcsc.samplers.consistency import ConsistencySampler
from lcsc.samplers.schedule import karras_sigmas

SAMPLERS = sorted(registry.discover("sampler"))
MEAN_CHW = torch.tensor([[[0.3, -0.2], [0.1, 0.0]]], dtype=torch.float64)
STD_CHW = torch.tensor([[[0.5, 1.0], [0.3, 0.7]]], dtype=torch.float64)
RNG = ImageNoise(SeedRange(0, Purpose.SEARCH), range(16))
NOISE_NCHW = torch.from_numpy(RNG.normal((1, 2, 2))).double()


def ideal(x_NCHW: Tensor, sigma: float, labels_N: Tensor | None = None) -> Tensor:
    return MEAN_CHW + STD_CHW**2 / (STD_CHW**2 + sigma**2) * (x_NCHW - MEAN_CHW)


def solution(sigma_max: float, sigma: float = 0.0) -> Tensor:
    shrink_CHW = ((STD_CHW**2 + sigma**2) / (STD_CHW**2 + sigma_max**2)).sqrt()
    return MEAN_CHW + (NOISE_NCHW * sigma_max - MEAN_CHW) * shrink_CHW


def error(name: str, **fields: Any) -> float:
    sampler = registry.build("sampler", name, **fields)
    return (sampler(ideal, NOISE_NCHW) - solution(sampler.sigma_max)).abs().max().item()


def order(name: str, steps: list[int], **fields: Any) -> float:
    """Slope of log error against log number of steps, by least squares."""
    errors = [error(name, num_steps=n, **fields) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def with_steps(name: str, num_steps: int) -> Any:
    """The sampler with that many steps or noise levels."""
    if name == "consistency":
        return ConsistencySampler(sigmas=karras_sigmas(num_steps + 1, 0.01, 80.0, 7.0)[:num_steps])
    return registry.build("sampler", name, num_steps=num_steps)


# sigma_min is small enough for the last step, to 0, not to show: its error is about sigma_min^2 / (2 std)
@pytest.mark.parametrize(
    ("name", "expected", "tolerance"), [("euler", 1, 0.1), ("heun", 2, 0.15), ("dpmpp_2m", 2, 0.15)]
)
def test_order_of_convergence(name: str, expected: float, tolerance: float) -> None:
    assert order(name, [64, 128, 256, 512], sigma_min=1e-4) == pytest.approx(expected, abs=tolerance)


def test_ddim_converges_to_the_solution() -> None:
    assert order("ddim", [50, 100, 200, 500, 1000]) == pytest.approx(1, abs=0.1)
    assert error("ddim", num_steps=1000) < 0.01
    assert error("ddim", num_steps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012) < 0.01


@pytest.mark.parametrize(("name", "bound"), [("euler", 0.02), ("heun", 2e-4), ("dpmpp_2m", 2e-4)])
def test_many_steps_reach_the_solution(name: str, bound: float) -> None:
    assert error(name, num_steps=512) < bound


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_declared_nfe_is_what_is_called(name: str, num_steps: int) -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, x_NCHW: Tensor, sigma_N: Tensor) -> SimpleNamespace:
            calls.append(sigma_N[0].item())
            return SimpleNamespace(sample=ideal(x_NCHW, calls[-1]))

    net, sampler = Counted(), with_steps(name, num_steps)
    sampler(lambda x, sigma, labels: Direct().denoise(net, x, sigma, labels), NOISE_NCHW, rng=RNG)
    assert len(calls) == sampler.nfe()
    assert all(a > b or (name == "heun" and a == b) for a, b in itertools.pairwise(calls))
    assert calls[-1] > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_defaults_are_at_five_calls_or_fewer(name: str) -> None:
    assert 1 <= registry.build("sampler", name).nfe() <= 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_first_call_sees_scaled_noise_and_the_labels(name: str) -> None:
    seen: list[tuple] = []

    def denoise(x_NCHW: Tensor, sigma: float, labels_N: Tensor | None) -> Tensor:
        seen.append((x_NCHW, sigma, labels_N))
        return ideal(x_NCHW, sigma)

    sampler, labels_N = with_steps(name, 2), torch.arange(16)
    sampler(denoise, NOISE_NCHW, labels_N, rng=RNG)
    torch.testing.assert_close(seen[0][0], NOISE_NCHW * sampler.sigma_max, rtol=1e-12, atol=0)
    assert seen[0][1] == sampler.sigma_max
    assert isinstance(seen[0][1], float)
    assert all(labels is labels_N for _, _, labels in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_same_call_same_bits(name: str, dtype: torch.dtype) -> None:
    sampler, noise_NCHW = with_steps(name, 5), NOISE_NCHW.to(dtype)
    untouched = noise_NCHW.clone()

    def denoise(x_NCHW: Tensor, sigma: float, labels_N: Tensor | None) -> Tensor:
        return ideal(x_NCHW, sigma).to(dtype)

    first, second = (sampler(denoise, noise_NCHW, rng=RNG) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == dtype
    assert torch.equal(noise_NCHW, untouched)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_the_batch(name: str) -> None:
    sampler = with_steps(name, 4)
    whole = sampler(ideal, NOISE_NCHW, rng=RNG)
    tail = sampler(ideal, NOISE_NCHW[9:], rng=ImageNoise(RNG.seeds, range(9, 16)))
    assert torch.equal(whole[9:], tail)


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradient_with_respect_to_the_denoiser(name: str) -> None:
    sampler, net = with_steps(name, 4), GaussianDenoiser((1, 2, 2)).double()

    def images(mean_CHW: Tensor, std_CHW: Tensor) -> Tensor:
        parameters = {"mean_CHW": mean_CHW, "std_CHW": std_CHW}

        def denoise(x_NCHW: Tensor, sigma: float, labels_N: Tensor | None) -> Tensor:
            return torch.func.functional_call(net, parameters, (x_NCHW, sigma)).sample

        return sampler(denoise, NOISE_NCHW[:3], rng=ImageNoise(RNG.seeds, range(3)))

    torch.testing.assert_close(
        images(MEAN_CHW, STD_CHW), sampler(ideal, NOISE_NCHW[:3], rng=ImageNoise(RNG.seeds, range(3)))
    )
    assert torch.autograd.gradcheck(images, (MEAN_CHW.clone().requires_grad_(), STD_CHW.clone().requires_grad_()))


@pytest.mark.parametrize(
    ("name", "theirs"), [("euler", EDMEulerScheduler), ("dpmpp_2m", EDMDPMSolverMultistepScheduler)]
)
@pytest.mark.parametrize("num_steps", [1, 2, 6, 20])
def test_edm_samplers_are_diffusers_pipelines(name: str, theirs: type, num_steps: int) -> None:
    """A raw network through diffusers' own preconditioning and schedule, as its pipelines drive it."""

    def net(x_NCHW: Tensor, time: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.tanh(3 * x_NCHW) * (1 + torch.as_tensor(time).reshape(-1, 1, 1, 1)))

    scheduler = theirs(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(num_steps)
    x_NCHW = NOISE_NCHW.float() * 80
    for t in scheduler.timesteps:
        output = net(scheduler.scale_model_input(x_NCHW, t), t).sample
        x_NCHW = scheduler.step(output, t, x_NCHW).prev_sample
    sampler = registry.build("sampler", name, num_steps=num_steps)
    ours = sampler(lambda x, sigma, labels: EDM().denoise(net, x, sigma), NOISE_NCHW.float())
    torch.testing.assert_close(ours, x_NCHW, rtol=1e-3, atol=1e-4)


def test_ddim_is_diffusers_with_noise_prediction() -> None:
    """The published form (predict epsilon, live in x_vp) gives the images of ours (predict D, live in x_ve)."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(10)
    alpha_bar = scheduler.alphas_cumprod.double()
    x_NCHW = NOISE_NCHW * (1 - alpha_bar[-1]).sqrt()
    for t in scheduler.timesteps:
        sigma = ((1 - alpha_bar[t]) / alpha_bar[t]).sqrt().item()
        noisy_NCHW = x_NCHW / alpha_bar[t].sqrt()
        x_NCHW = scheduler.step((noisy_NCHW - ideal(noisy_NCHW, sigma)) / sigma, t, x_NCHW).prev_sample
    sampler = registry.build("sampler", "ddim", num_steps=10)
    torch.testing.assert_close(sampler(ideal, NOISE_NCHW), x_NCHW, rtol=1e-4, atol=1e-5)
    assert sampler.sigma_max == pytest.approx(157.4, abs=0.05)


def test_ddim_is_euler_on_its_own_schedule() -> None:
    """Away from rounding, DDIM without noise is the Euler step in x_ve (arXiv:2206.00364, App. C)."""
    sigmas: list[float] = []

    def denoise(x_NCHW: Tensor, sigma: float, labels_N: Tensor | None) -> Tensor:
        sigmas.append(sigma)
        return ideal(x_NCHW, sigma)

    images = registry.build("sampler", "ddim", num_steps=8)(denoise, NOISE_NCHW)
    x_NCHW = NOISE_NCHW * sigmas[0]
    for sigma, sigma_next in itertools.pairwise([*sigmas, 0.0]):
        x_NCHW = x_NCHW + (sigma_next - sigma) * (x_NCHW - ideal(x_NCHW, sigma)) / sigma
    torch.testing.assert_close(images, x_NCHW, rtol=1e-5, atol=1e-6)


def test_consistency_one_step_is_one_jump() -> None:
    def consistency(x_NCHW: Tensor, sigma: float, labels_N: Tensor | None) -> Tensor:
        """The exact consistency function of Gaussian images: it ends the ODE at sigma_min."""
        return MEAN_CHW + (x_NCHW - MEAN_CHW) * ((STD_CHW**2 + 0.002**2) / (STD_CHW**2 + sigma**2)).sqrt()

    images = ConsistencySampler()(consistency, NOISE_NCHW)
    torch.testing.assert_close(images, solution(80.0, 0.002), rtol=1e-12, atol=1e-12)


def test_consistency_multistep_is_algorithm_1() -> None:
    sampler = ConsistencySampler(sigmas=[80.0, 3.0, 0.5], sigma_min=0.01)
    x_NCHW = ideal(NOISE_NCHW * 80.0, 80.0)
    for stream, tau in ((1, 3.0), (2, 0.5)):
        fresh_NCHW = np.stack(
            [RNG.seeds.generator(i, stream).standard_normal((1, 2, 2), np.float32) for i in range(16)]
        )
        x_NCHW = ideal(x_NCHW + math.sqrt(tau**2 - 0.01**2) * torch.from_numpy(fresh_NCHW).double(), tau)
    assert torch.equal(sampler(ideal, NOISE_NCHW, rng=RNG), x_NCHW)
    with pytest.raises(ConfigError, match=r"with 3 levels needs fresh noise and got none; pass `rng`"):
        sampler(ideal, NOISE_NCHW)


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_karras_sigmas_are_diffusers(num_steps: int) -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(num_steps)
    sigmas = karras_sigmas(num_steps, 0.002, 80.0, 7.0)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=2e-5)
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == (80.0, 0.002, 0.0)


def test_karras_single_step() -> None:
    assert karras_sigmas(1, 0.002, 80.0, 7.0) == [80.0, 0.0]


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "has `num_steps` 0; it needs at least 1"),
        ({"sigma_min": 80.0}, "has `sigma_min` 80.0 and `sigma_max` 80.0; they must satisfy 0 < sigma_min < sigma_max"),
        ({"sigma_min": 0.0}, "has `sigma_min` 0.0 and `sigma_max` 80.0"),
        ({"sigma_max": math.nan}, "has `sigma_min` 0.002 and `sigma_max` nan"),
        ({"rho": 0.0}, "has `rho` 0.0; it must be above 0"),
    ],
)
def test_edm_fields_are_checked(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"sampler `{name}` {message}"):
        registry.build("sampler", name, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "has `num_steps` 0; it needs at least 1"),
        ({"num_steps": 7}, "has `num_steps` 7 and `num_train_timesteps` 1000; the first must divide .* to 1001, or"),
        ({"beta_start": 0.03}, "has `beta_start` 0.03 and `beta_end` 0.02; they must satisfy"),
        ({"beta_end": 1.0}, "has `beta_start` 0.0001 and `beta_end` 1.0"),
        ({"beta_schedule": "linaer"}, "has no `beta_schedule` named `linaer`. Did you mean `linear`?"),
    ],
)
def test_ddim_fields_are_checked(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"sampler `ddim` {message}"):
        registry.build("sampler", "ddim", **fields)


@pytest.mark.parametrize(
    ("sigmas", "sigma_min"),
    [([], 0.002), ([1.0, 80.0], 0.002), ([80.0, 80.0], 0.002), ([80.0, 0.002], 0.002), ([80.0], 0.0)],
)
def test_consistency_fields_are_checked(sigmas: list[float], sigma_min: float) -> None:
    with pytest.raises(
        ConfigError, match=r"sampler `consistency` has `sigmas` \[.*\] and `sigma_min` .*each below the one"
    ):
        ConsistencySampler(sigmas=sigmas, sigma_min=sigma_min)


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("euler", [1, 2, 7]),
        ("heun", [1, 3, 7]),
        ("dpmpp_2m", [1, 2, 7]),
        ("ddim", [1, 2, 8]),
        ("consistency", [1, 2, 7]),
    ],
)
def test_a_sampler_at_another_number_of_calls(name: str, possible: list[int]) -> None:
    sampler = registry.build("sampler", name)
    for nfe in possible:
        found = with_nfe(sampler, nfe)
        assert (found.nfe(), found.sigma_max) == (nfe, pytest.approx(sampler.sigma_max))
    assert with_nfe(sampler, sampler.nfe()) is sampler


def test_consistency_takes_the_levels_of_the_edm_schedule() -> None:
    sampler = ConsistencySampler(sigmas=[60.0, 2.0], sigma_min=0.01, search_times=True)
    assert with_nfe(sampler, 2) is sampler
    found = with_nfe(sampler, 3)
    assert found == ConsistencySampler(karras_sigmas(4, 0.01, 60.0, 7.0)[:3], 0.01, True)
    assert with_nfe(sampler, 1).sigmas == [60.0]


@pytest.mark.parametrize(
    ("name", "nfe", "near"),
    [("heun", 4, "3 and 5"), ("heun", 2, "1 and 3"), ("ddim", 7, "5 and 8"), ("ddim", 1001, "1000")],
)
def test_a_number_of_calls_that_cannot_be_had_is_refused(name: str, nfe: int, near: str) -> None:
    with pytest.raises(
        ConfigError, match=f"`{name}` cannot make images with {nfe} network calls; .* with is {near}\\."
    ):
        with_nfe(registry.build("sampler", name), nfe)

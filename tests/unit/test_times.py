"""Searched noise levels: the schedule to the bit at zero, always falling, and with the right derivative."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import ImageNoise, Purpose, SeedRange
from lcsc.models.network import build_network, save_network
from lcsc.operators.linear import Linear
from lcsc.samplers.schedule import karras_sigmas
from lcsc.samplers.times import NARROWEST, WIDEST, Retimed, Warp, times_box, warp_of

RNG = ImageNoise(SeedRange(0, Purpose.SEARCH), range(6))
NOISE_NCHW = torch.from_numpy(RNG.normal((1, 2, 2))).double()
MEAN_CHW = torch.tensor([[[0.3, -0.2], [0.1, 0.0]]], dtype=torch.float64)
STD_CHW = torch.tensor([[[0.5, 1.0], [0.3, 0.7]]], dtype=torch.float64)
TIMED = {
    "euler": {"num_steps": 4},
    "heun": {"num_steps": 4},
    "dpmpp_2m": {"num_steps": 4},
    "consistency": {"sigmas": [80.0, 9.0, 1.0, 0.2]},
}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def ideal(x_NCHW, sigma, labels_N=None):
    return (MEAN_CHW + STD_CHW**2 / (STD_CHW**2 + sigma**2) * (x_NCHW - MEAN_CHW)).to(x_NCHW.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TIMED)
def test_no_offsets_are_the_sampler_to_the_bit(name, dtype):
    sampler = build("sampler", name, **TIMED[name])
    still = Retimed(sampler, np.zeros(3))
    assert still.levels() == sampler.levels()
    assert (still.sigma_max, still.nfe()) == (sampler.sigma_max, sampler.nfe())
    images = [s(ideal, NOISE_NCHW.to(dtype), rng=RNG) for s in (still, sampler)]
    assert images[0].dtype == dtype
    assert torch.equal(*images)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40, 300])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_no_offsets_are_any_schedule_to_the_bit(num_steps, rho):
    for low in (0.0, 0.001):
        schedule_T = np.array(karras_sigmas(num_steps, 0.002, 80.0, rho)[:-1])
        assert Warp(schedule_T, low).levels(np.zeros(num_steps - 1)).tobytes() == schedule_T.tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 40), rho=st.floats(1, 12), low=st.sampled_from([0.0, 0.0019, 0.001]))
def test_levels_fall_whatever_the_offsets_are(data, count, rho, low):
    warp = Warp(np.array(karras_sigmas(count, 0.002, 80.0, rho)[:-1]), low)
    levels_T = warp.levels(np.array(data.draw(st.lists(NUMBERS, min_size=count - 1, max_size=count - 1))))
    assert levels_T[0] == 80.0
    assert (np.diff(levels_T) < 0).all()
    assert levels_T[-1] > low
    assert np.isfinite(levels_T).all()


def test_an_offset_stretches_its_gap_and_moves_what_follows():
    warp = Warp(np.array([1.0, 0.1, 0.01]))
    np.testing.assert_allclose(warp.levels(np.array([1e9, 0.0])), [1.0, 0.1**WIDEST, 0.1 * 0.1**WIDEST], rtol=1e-12)
    np.testing.assert_allclose(warp.levels(np.array([0.0, -1e9])), [1.0, 0.1, 0.1 * 0.1**NARROWEST], rtol=1e-12)
    small = 1e-4  # exp(o) of a small offset, before it saturates
    np.testing.assert_allclose(warp.levels(np.array([small, 0.0]))[1], 0.1 ** math.exp(small), rtol=1e-11)
    assert warp.levels(np.array([0.0, 0.7]))[1] == 0.1


@pytest.mark.parametrize("low", [0.0, 0.0015])
def test_jacobian_against_central_differences(low):
    warp = Warp(np.array(karras_sigmas(6, 0.002, 80.0, 7.0)[:-1]), low)
    offsets, step = np.array([0.4, -0.9, 0.0, 0.2, -3.0]), 1e-6
    wanted = [(warp.levels(offsets + step * e) - warp.levels(offsets - step * e)) / (2 * step) for e in np.eye(5)]
    np.testing.assert_allclose(warp.jacobian(offsets), np.transpose(wanted), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TIMED)
def test_images_are_differentiable_by_the_levels(name):
    sampler = build("sampler", name, **TIMED[name])

    def images(levels_T):
        return sampler.run(list(levels_T.unbind()), ideal, NOISE_NCHW, rng=RNG)

    levels_T = torch.tensor([3.0, 1.1, 0.6, 0.2], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(images(levels_T), sampler.run(levels_T.tolist(), ideal, NOISE_NCHW, rng=RNG))
    assert torch.autograd.gradcheck(images, (levels_T,))


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_arch):
    folder = tmp_path_factory.mktemp("times")
    torch.manual_seed(0)
    for step in (1, 2):
        save_network(build_network(tiny_arch), folder / f"checkpoint-{step}" / "unet")
    return CheckpointBank.open(folder)


def quality(sampler):
    parts = {
        "model": build("model", "edm"),
        "metric": build("metric", "fid_pixels"),
        "dataset": build("dataset", "digits"),
    }
    return build("objective", "sample_quality", sampler=sampler, device="cpu", batch_size=40, **parts)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_the_score_is_differentiable_by_the_offsets(bank, name):
    """Through network, recomputation, batches and metric, and beside the derivative by the weights."""
    sampler, candidate = build("sampler", name, num_steps=3), Linear().apply(bank, {"z": np.array([0.2])})
    where = {"seed": 0, "purpose": Purpose.FRESH, "images": range(60)}
    offsets = np.array([0.2, -0.3])
    moved = Retimed(sampler, offsets)
    slope = quality(moved).slope(candidate, **where)
    found = slope.own["times"]
    wanted, step = [], 1e-2
    for e in np.eye(2):
        sides = [quality(Retimed(sampler, offsets + side * step * e))(candidate, **where).value for side in (1, -1)]
        wanted.append((sides[0] - sides[1]) / (2 * step))
    np.testing.assert_allclose(found, wanted, rtol=3e-3, atol=3e-3 * np.abs(wanted).max())


def test_the_box_is_idle_at_zero_and_absent_where_nothing_can_move():
    box = times_box(build("sampler", "heun", num_steps=4, search_times=True), "times@7")
    assert (box.name, box.size, box.level) == ("times@7", 3, 1)
    assert times_box(build("sampler", "heun", num_steps=4)) is None
    assert times_box(build("sampler", "consistency", search_times=True)) is None
    assert times_box(build("sampler", "ddim")) is None


def test_what_cannot_be_retimed_says_why():
    with pytest.raises(ConfigError, match="sampler `ddim` works on its own noise levels only.* Choose euler"):
        warp_of(build("sampler", "ddim"))
    with pytest.raises(
        ConfigError, match=r"the last noise level is 0.002001, too close to 0.002 .*; raise it to 0.002008"
    ):
        warp_of(build("sampler", "consistency", sigmas=[80.0, 0.002001]))
    with pytest.raises(ConfigError, match=r"noise levels \[1.0, 1.0\] do not fall"):
        Warp(np.array([1.0, 1.0]))

"""Trainers: losses against formulas written out, banks against unbroken runs, refusals by what they say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch import Tensor, nn

from lcsc.core.errors import ConfigError, EvaluationError, OutputExistsError, RunError
from lcsc.core.registry import build
from lcsc.datasets.gaussian import Gaussian
from lcsc.models.consistency import Consistency
from lcsc.models.direct import Direct
from lcsc.models.edm import EDM
from lcsc.models.network import load_network
from lcsc.training.base import Speed
from lcsc.training.consistency import ConsistencyTraining, noise_grid
from lcsc.training.diffusion import Diffusion
from lcsc.training.gaussian_toy import GaussianToy
from lcsc.training.loop import checkpoint_steps, speed_of

UNET: dict[str, Any] = {
    "class": "UNet2DModel",
    "config": {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [4, 4],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 2,
        "add_attention": False,
        "dropout": 0.1,
    },
}
TOY: dict[str, Any] = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
IMAGES = Gaussian(shape=[1, 4, 4], num_images=64)
SMALL = Diffusion(num_steps=12, batch_size=4, save_every=4)


def train(trainer: Any, out: Path, **changes: Any) -> Path:
    given = {"arch": UNET, "model": EDM(), "dataset": IMAGES, "seed": 3, "progress": False} | changes
    return trainer.train(out=out, **given)


def checkpoints(bank: Path) -> dict[str, dict[str, Tensor]]:
    files = sorted(bank.glob("checkpoint-*/unet/diffusion_pytorch_model.safetensors"))
    return {file.parts[-3]: load_file(file) for file in files}


def assert_same_bits(left: Path, right: Path) -> None:
    a, b = checkpoints(left), checkpoints(right)
    assert list(a) == list(b)
    assert len(a) > 0
    for name in a:
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    assert (left / "train_log.jsonl").read_bytes() == (right / "train_log.jsonl").read_bytes()


def tree(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.rglob("*")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank of `SMALL`, made in one go."""
    return train(SMALL, tmp_path_factory.mktemp("unbroken") / "bank")


# --- losses -----------------------------------------------------------------------------------------------------


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


# --- the bank ---------------------------------------------------------------------------------------------------


def test_bank_holds_checkpoints_configuration_and_loss_curve(unbroken: Path) -> None:
    names = sorted(p.name for p in unbroken.iterdir())
    steps = ["checkpoint-000004", "checkpoint-000008", "checkpoint-000012"]
    assert names == [*steps, "train.json", "train_log.jsonl"]
    config = json.loads((unbroken / "train.json").read_text())["config"]
    assert config["trainer"]["name"] == "diffusion"
    assert config["trainer"]["learning_rate"] == 1e-3
    assert config["model"] == {"name": "edm", "sigma_data": 0.5}
    assert config["seed"] == 3
    lines = [json.loads(line) for line in (unbroken / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 12]
    net = load_network(unbroken / steps[-1] / "unet")
    weights = checkpoints(unbroken)
    assert all(torch.equal(tensor, weights[steps[-1]][name]) for name, tensor in net.state_dict().items())
    assert not torch.equal(weights[steps[0]]["conv_in.weight"], weights[steps[1]]["conv_in.weight"])


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    arch = {"class": "GaussianDenoiser", "config": {"shape": [1, 4, 4]}}
    trainer = Diffusion(num_steps=300, batch_size=64, save_every=300, learning_rate=0.02)
    net = load_network(train(trainer, tmp_path / "bank", arch=arch, model=Direct()) / "checkpoint-000300" / "unet")
    # The loss is least at the moments of the images themselves.
    mean, std = IMAGES.images().mean(0), IMAGES.images().std(0, correction=0)
    torch.testing.assert_close(net.mean_CHW.detach(), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(net.std_CHW.detach().abs(), std, atol=0.05, rtol=0)


def test_same_call_on_a_finished_bank_touches_nothing(unbroken: Path) -> None:
    before = tree(unbroken)
    assert train(SMALL, unbroken) == unbroken
    assert tree(unbroken) == before


def test_a_lost_checkpoint_comes_back_with_the_same_bits(unbroken: Path, tmp_path: Path) -> None:
    bank = train(SMALL, tmp_path / "bank")
    (bank / "checkpoint-000008").rename(tmp_path / "lost")
    assert_same_bits(train(SMALL, bank), unbroken)


def test_the_last_step_is_saved_too() -> None:
    assert checkpoint_steps(10, 4) == (4, 8, 10)
    assert checkpoint_steps(8, 4) == (4, 8)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(Diffusion(num_steps=1, batch_size=2), tmp_path / "bank")
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_trains_another_network(unbroken: Path, tmp_path: Path) -> None:
    other = train(SMALL, tmp_path / "bank", seed=4)
    name = "checkpoint-000004"
    assert not torch.equal(checkpoints(unbroken)[name]["conv_in.weight"], checkpoints(other)[name]["conv_in.weight"])


# --- interruptions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raising(EDM):
    """Calls `action` in the n-th call of the network."""

    def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: Any, labels_N: Tensor | None = None) -> Tensor:
        CALLS.append(1)
        if len(CALLS) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return super().denoise(net, x_NCHW, sigma, labels_N)


CALLS: list[int] = []


def test_ctrl_c_ends_the_step_and_the_same_call_continues(tmp_path: Path) -> None:
    CALLS.clear()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, tmp_path / "bank", model=Raising())
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(CALLS) == 6
    assert list(checkpoints(tmp_path / "bank")) == ["checkpoint-000004"]
    train(SMALL, tmp_path / "bank", model=Raising())
    assert len(CALLS) == 12  # steps 7 to 12: nothing is trained twice
    assert_same_bits(tmp_path / "bank", train(SMALL, tmp_path / "whole", model=Raising()))


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t
real = t.EDM.denoise
def slow(self, *args):
    print("step", flush=True)
    time.sleep(0.02)
    return real(self, *args)
t.EDM.denoise = slow
t.train(t.SMALL, Path({bank!r}))
"""


def test_kill_9_then_the_same_call_gives_the_same_bits(unbroken: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    code = CHILD.format(tests=str(Path(__file__).parent), bank=str(bank))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for _ in range(7):
        assert child.stdout.readline() == "step\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert "checkpoint-000004" in checkpoints(bank)
    assert "checkpoint-000012" not in checkpoints(bank)
    assert (bank / ".training" / "state.safetensors").exists()
    assert_same_bits(train(SMALL, bank), unbroken)
    assert not (bank / ".training").exists()


def test_a_kill_between_state_and_checkpoint_loses_nothing(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcsc.training import folder

    def die(*args: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_network", die)
        with pytest.raises(OSError, match="no space left"):
            train(SMALL, tmp_path / "bank")
    assert (tmp_path / "bank" / ".training" / "state.safetensors").exists()
    assert not checkpoints(tmp_path / "bank")
    assert_same_bits(train(SMALL, tmp_path / "bank"), unbroken)


# --- speed ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastDiffusion(Diffusion, Speed):
    """A trainer with the loop's settings of speed."""


@dataclass(frozen=True)
class FastConsistency(ConsistencyTraining, Speed):
    """Likewise; its loss calls the network without gradient first."""


PLAIN: dict[str, Any] = UNET | {"config": UNET["config"] | {"dropout": 0.0}}


def updates(trainer: type, out: Path, learning_rate: float = 1e-3, **speed: Any) -> Tensor:
    """Parameters after two steps, as one row."""
    model = EDM() if issubclass(trainer, Diffusion) else Consistency()
    given = {"num_steps": 2, "batch_size": 8, "save_every": 2, "learning_rate": learning_rate}
    weights = checkpoints(train(trainer(**given, **speed), out, arch=PLAIN, model=model))["checkpoint-000002"]
    return torch.cat([tensor.flatten() for tensor in weights.values()])


@pytest.mark.parametrize("trainer", [FastDiffusion, FastConsistency])
def test_bfloat16_and_channels_last_take_nearly_the_same_steps(trainer: type, tmp_path: Path) -> None:
    start = updates(trainer, tmp_path / "start", learning_rate=1e-12)
    exact = updates(trainer, tmp_path / "exact")
    for name, speed in (("a", {"mixed_precision": "bf16"}), ("b", {"channels_last": True})):
        row = updates(trainer, tmp_path / name, **speed)
        assert not torch.equal(row, exact)
        # Adam's first steps are signs of gradients: a layer without gradient would show as a right angle.
        assert float(torch.cosine_similarity(row - start, exact - start, dim=0)) > 0.9
    assert torch.equal(updates(trainer, tmp_path / "again"), exact)


@pytest.mark.slow
def test_compiling_without_optimising_gives_the_same_bits(tmp_path: Path) -> None:
    exact = updates(FastDiffusion, tmp_path / "exact")
    assert torch.equal(updates(FastDiffusion, tmp_path / "compiled", compile="eager"), exact)


def test_speed_is_in_the_configuration_unless_it_is_the_usual(tmp_path: Path) -> None:
    usual, fast = (Path(tmp_path / name) for name in ("usual", "fast"))
    updates(FastDiffusion, usual)
    updates(FastDiffusion, fast, mixed_precision="bf16")
    trainers = [json.loads((bank / "train.json").read_text())["config"]["trainer"] for bank in (usual, fast)]
    assert set(trainers[1]) - set(trainers[0]) == {"mixed_precision"}
    assert trainers[1]["mixed_precision"] == "bf16"
    assert speed_of(Diffusion()) == Speed()
    with pytest.raises(RunError, match="`trainer.mixed_precision`"):
        updates(FastDiffusion, fast)


def test_unknown_speeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`mixed_precision` is `fp8`; it is `no` or `bf16`"):
        FastDiffusion(mixed_precision="fp8")
    with pytest.raises(ConfigError, match="`compile` is `fast`; it is `no` or a backend of torch.compile: .*inductor"):
        updates(FastDiffusion, tmp_path / "bank", compile="fast")
    assert not (tmp_path / "bank").exists()


# --- refusals ---------------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_field_by_field(unbroken: Path) -> None:
    before = tree(unbroken)
    other = Diffusion(num_steps=24, batch_size=4, save_every=4, learning_rate=2e-3)
    with pytest.raises(RunError) as caught:
        train(other, unbroken, seed=9, dataset=Gaussian(shape=[1, 4, 4], num_images=65))
    text = str(caught.value)
    assert "`trainer.num_steps`: 12 -> 24" in text
    assert "`trainer.learning_rate`: 0.001 -> 0.002" in text
    assert "`seed`: 3 -> 9" in text
    assert "`dataset.num_images`: 64 -> 65" in text
    assert "`dataset.digest`" in text
    assert "arch" not in text
    assert "choose another output path" in text
    assert tree(unbroken) == before


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="no trainer made it"):
        train(SMALL, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, tmp_path / "bank", model=Raising())
    state = tmp_path / "bank" / ".training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"state\.safetensors` is damaged"):
        train(SMALL, tmp_path / "bank", model=Raising())


def test_two_trainers_do_not_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    bank = tmp_path / "bank"
    bank.mkdir()
    with open(bank / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training"):
            train(SMALL, bank)


def test_a_loss_that_is_not_finite_names_step_and_rate(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Breaking(EDM):
        def denoise(self, net: nn.Module, x_NCHW: Tensor, sigma: Any, labels_N: Tensor | None = None) -> Tensor:
            CALLS.append(1)
            return super().denoise(net, x_NCHW, sigma, labels_N) * (math.inf if len(CALLS) == 6 else 1.0)

    CALLS.clear()
    with pytest.raises(EvaluationError, match=r"at step 6 with `learning_rate` 0\.001"):
        train(SMALL, tmp_path / "bank", model=Breaking())
    assert list(checkpoints(tmp_path / "bank")) == ["checkpoint-000004"]


@pytest.mark.parametrize(
    ("trainer", "fields", "message"),
    [
        ("diffusion", {"num_steps": 0}, "`num_steps` is 0; it must be at least 1"),
        ("diffusion", {"learning_rate": -1.0}, "`learning_rate` is -1.0"),
        ("diffusion", {"p_std": 0.0}, "`p_mean`, `p_std`, `sigma_data` are -1.2, 0.0, 0.5"),
        ("consistency", {"max_intervals": 5}, "`min_intervals` 10 and `max_intervals` 5"),
        ("consistency", {"sigma_max": 0.001}, "`sigma_min` 0.002 and `sigma_max` 0.001"),
        ("gaussian_toy", {"reach": 1.0}, "`reach` 1.0 must lie in"),
    ],
)
def test_bad_settings_are_named(trainer: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        build("trainer", trainer, **fields)


@pytest.mark.parametrize(
    ("trainer", "changes", "message"),
    [
        (SMALL, {"model": EDM(sigma_data=0.6)}, "`sigma_data` 0.5, the model has 0.6"),
        (ConsistencyTraining(), {"model": EDM()}, "`EDM` has no `sigma_min`"),
        (ConsistencyTraining(), {"model": Consistency(sigma_min=0.01)}, "has `sigma_min` 0.01"),
        (SMALL, {"dataset": Gaussian(shape=[3, 4, 4], num_images=8)}, "takes 1 channels"),
        (GaussianToy(), {}, "not `UNet2DModel`"),
        (GaussianToy(), {"arch": TOY}, "shape"),
    ],
)
def test_contradictions_are_named_and_nothing_is_written(
    trainer: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(trainer, tmp_path / "bank", **changes)
    assert not (tmp_path / "bank").exists()


# --- the other trainers -----------------------------------------------------------------------------------------


def test_consistency_bank_is_trained_and_repeatable(tmp_path: Path) -> None:
    trainer = ConsistencyTraining(num_steps=4, batch_size=4, save_every=2, min_intervals=2, max_intervals=4)
    banks = [train(trainer, tmp_path / name, model=Consistency()) for name in ("a", "b")]
    assert list(checkpoints(banks[0])) == ["checkpoint-000002", "checkpoint-000004"]
    assert_same_bits(*banks)


def test_toy_bank_spans_the_truth_and_averages_miss_it(tmp_path: Path) -> None:
    data = Gaussian()
    began = time.perf_counter()
    bank = train(GaussianToy(), tmp_path / "bank", arch=TOY, model=Direct(), dataset=data)
    assert time.perf_counter() - began < 5
    rows = [torch.cat([w["mean_CHW"].flatten(), w["std_CHW"].flatten()]) for w in checkpoints(bank).values()]
    theta = torch.stack(rows).double().numpy()
    truth = torch.cat([data.mean_CHW.flatten(), data.std_CHW.flatten()]).double().numpy()
    assert theta.shape == (12, 8)
    _, coef = GaussianToy().checkpoints(torch.from_numpy(truth.reshape(2, 1, 2, 2)), seed=3)
    assert float(coef.sum()) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(coef.numpy() @ theta, truth, atol=1e-6)

    def frechet(row: np.ndarray) -> float:  # closed form for diagonal Gaussians
        return float(((row[:4] - truth[:4]) ** 2).sum() + ((np.abs(row[4:]) - truth[4:]) ** 2).sum())

    assert frechet(coef.numpy() @ theta) < 1e-10
    averages = [theta[-1], theta.mean(0), *(theta[-k:].mean(0) for k in (2, 3, 5)), *theta]
    assert min(frechet(row) for row in averages) > 1e-3


@pytest.mark.parametrize("num_checkpoints", [2, 4])
def test_toy_spans_the_truth_with_few_checkpoints_too(num_checkpoints: int) -> None:
    truth = torch.tensor([[[0.1, -0.2, 0.3]], [[0.5, 0.4, 0.3]]]).double()[:, None]
    theta, coef = GaussianToy(num_checkpoints=num_checkpoints).checkpoints(truth, seed=0)
    np.testing.assert_allclose(np.tensordot(coef.numpy(), theta.numpy(), 1), truth.numpy(), atol=1e-12)


def test_toy_bank_is_repeatable_and_mendable(tmp_path: Path) -> None:
    banks = [train(GaussianToy(), tmp_path / name, arch=TOY, model=Direct(), dataset=Gaussian()) for name in ("a", "b")]
    (banks[0] / "checkpoint-000050").rename(tmp_path / "lost")
    train(GaussianToy(), banks[0], arch=TOY, model=Direct(), dataset=Gaussian())
    a, b = checkpoints(banks[0]), checkpoints(banks[1])
    assert list(a) == list(b)
    assert all(torch.equal(a[k]["std_CHW"], b[k]["std_CHW"]) for k in a)


def test_progress_lines_tell_step_loss_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(SMALL, tmp_path / "loud", progress=None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert lines[-1].startswith("training: step 12/12, loss ")
    assert lines[-1].endswith("0 s left")
    train(SMALL, tmp_path / "silent", progress=False)
    assert capsys.readouterr().err == ""

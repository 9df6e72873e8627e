"""Banks of the trainers: against unbroken runs, whatever interrupts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_training import CALLS, IMAGES, SMALL, TOY, Raising, assert_same_bits, checkpoints, train, tree

from lcsc.datasets.gaussian import Gaussian
from lcsc.models.consistency import Consistency
from lcsc.models.direct import Direct
from lcsc.models.network import load_network
from lcsc.training.consistency import ConsistencyTraining
from lcsc.training.diffusion import Diffusion
from lcsc.training.gaussian_toy import GaussianToy
from lcsc.training.loop import checkpoint_steps


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


# --- interruptions -------------------------------------------------------------------------------------------------


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
import helpers_training as t
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
    code = CHILD.format(tests=str(Path(__file__).parents[1]), bank=str(bank))
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


# --- the other trainers ---------------------------------------------------------------------------------------------


def test_consistency_bank_is_trained_and_repeatable(tmp_path: Path) -> None:
    trainer = ConsistencyTraining(num_steps=4, batch_size=4, save_every=2, min_intervals=2, max_intervals=4)
    banks = [train(trainer, tmp_path / name, model=Consistency()) for name in ("a", "b")]
    assert list(checkpoints(banks[0])) == ["checkpoint-000002", "checkpoint-000004"]
    assert_same_bits(*banks)


def test_toy_bank_spans_the_truth_and_averages_miss_it(tmp_path: Path) -> None:
    data = Gaussian()
    bank = train(GaussianToy(), tmp_path / "bank", arch=TOY, model=Direct(), dataset=data)
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

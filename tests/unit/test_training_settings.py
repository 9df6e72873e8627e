"""Settings of the trainers: speed, and refusals by what they say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import CALLS, SMALL, TOY, UNET, Raising, checkpoints, train, tree
from torch import Tensor, nn

from lcsc.core.errors import ConfigError, EvaluationError, OutputExistsError, RunError
from lcsc.core.registry import build
from lcsc.datasets.gaussian import Gaussian
from lcsc.models.consistency import Consistency
from lcsc.models.edm import EDM
from lcsc.training.base import Speed
from lcsc.training.consistency import ConsistencyTraining
from lcsc.training.diffusion import Diffusion
from lcsc.training.gaussian_toy import GaussianToy
from lcsc.training.loop import speed_of


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


# --- refusals ------------------------------------------------------------------------------------------------------


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

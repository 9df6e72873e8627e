"""Training that saves coded checkpoints: the same bank, and the same training after a restore."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers_training import SMALL, train

from lcsc.bank import CheckpointBank
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import ConfigError, RunError
from lcsc.training.coded import CodedSaver, save_hook, saver_callback, training_tensors


def small(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 40, bias=False))
    net[2].weight = net[0].weight
    return net, torch.optim.AdamW(net.parameters(), lr=1e-3)


def run(net: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_trainer_writes_its_bank_coded(unbroken: Path, tmp_path: Path) -> None:
    coded = train(dataclasses.replace(SMALL, codec="lossless"), tmp_path / "coded")
    assert not list(coded.glob("checkpoint-*"))
    bank = CheckpointBank.open(coded)
    assert bank.digest == CheckpointBank.open(unbroken).digest
    assert bank.arch == CheckpointBank.open(unbroken).arch
    assert train(dataclasses.replace(SMALL, codec="lossless"), coded) == coded
    with pytest.raises(ConfigError, match="`codec` is `zip`; it is `no`, `lossless` or `lossy`"):
        train(dataclasses.replace(SMALL, codec="zip"), tmp_path / "x")


def test_a_lossless_restore_goes_on_bit_for_bit(tmp_path: Path) -> None:
    net, optimizer = small()
    saver = CodedSaver(tmp_path / "bank")
    for step in (5, 10, 15):
        run(net, optimizer, step - 5, step)
        saver.save(step, net, optimizer)
    unbroken = run(net, optimizer, 15, 25)

    again, other = small(seed=9)
    assert CodedSaver(tmp_path / "bank").restore(again, other) == 15
    assert again[2].weight is again[0].weight
    assert run(again, other, 15, 25) == unbroken
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))
    assert CodedSaver(tmp_path / "none").restore(again, other) == 0
    with pytest.raises(RunError, match="is of another network"):
        CodedSaver(tmp_path / "bank").restore(torch.nn.Linear(2, 2))


def test_a_lossy_restore_goes_on_nearly(tmp_path: Path) -> None:
    net, optimizer = small()
    saver = CodedSaver(tmp_path / "bank", CodecSettings("lossy", anchor_every=100))
    for step in range(5, 105, 5):
        run(net, optimizer, step - 5, step)
        saver.save(step, net, optimizer)
    unbroken = run(net, optimizer, 100, 110)
    again, other = small(seed=9)
    saver.restore(again, other)
    resumed = run(again, other, 100, 110)
    assert resumed != unbroken
    assert max(abs(a - b) for a, b in zip(resumed, unbroken, strict=True)) < 0.002
    small_files = [file.stat().st_size for file in sorted((tmp_path / "bank").iterdir())]
    assert max(small_files[1:]) < 0.5 * small_files[0]


def test_accelerate_saves_through_the_hook(tmp_path: Path) -> None:
    net, optimizer = small()
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(net, optimizer)
    accelerator.register_save_state_pre_hook(save_hook(CodedSaver(tmp_path / "bank"), optimizer))
    for step in (2, 4):
        run(model, prepared, step - 2, step)
        accelerator.save_state(str(tmp_path / "states" / f"checkpoint-{step}"))
    bank = CheckpointBank.open(tmp_path / "bank")
    assert bank.steps == (2, 4)
    assert not list((tmp_path / "states").rglob("model*"))
    assert torch.equal(bank.layout.views(bank.matrix()[1])["0.weight"], net[0].weight)
    with pytest.raises(RunError, match="has no step at the end of its name"):
        accelerator.save_state(str(tmp_path / "states" / "last"))


def test_transformers_saves_through_the_callback(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    net, optimizer = small()
    run(net, optimizer, 0, 2)
    called = saver_callback(CodedSaver(tmp_path / "bank", CodecSettings("lossy", coder="neural")))
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    called.on_save(arguments, TrainerState(global_step=7), TrainerControl(), model=net, optimizer=optimizer)
    bank = CheckpointBank.open(tmp_path / "bank")
    assert bank.steps == (7,)
    assert torch.equal(bank.layout.views(bank.matrix()[0])["0.weight"], net[0].weight)  # an anchor's


def test_half_precision_and_shared_tensors_are_taken_as_they_are() -> None:
    net = torch.nn.Linear(3, 2).to(torch.bfloat16)
    net.register_buffer("also", net.weight.data)
    found, ties = training_tensors(net)
    assert ties == {"also": "weight"}
    assert found["weight"].bits.tobytes() == net.weight.detach().view(torch.int16).numpy().tobytes()

"""Training that saves coded checkpoints: the same bank, and the same training after a restore."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers_training import SMALL, train

from lcsc.bank import CheckpointBank
from lcsc.codec.chain import Chain, file_name
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import ConfigError, OutputExistsError, RunError
from lcsc.training.coded import CodedSaver, load_hook, save_hook, saver_callback, training_tensors


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


def by_kind(net: torch.nn.Module) -> torch.optim.Optimizer:
    """Biases first: torch numbers parameters by group, and the network by its layers."""
    biases, others = ([p for p in net.parameters() if (p.ndim < 2) == first] for first in (True, False))
    return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": others}], lr=1e-2)


def only_the_last(net: torch.nn.Module) -> torch.optim.Optimizer:
    net[0].requires_grad_(False)
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def with_plain_numbers(net: torch.nn.Module) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(net.parameters())  # whose steps are no tensors


@pytest.mark.parametrize("make", [by_kind, only_the_last, with_plain_numbers])
def test_every_optimizer_goes_on_with_what_is_its_own(make, tmp_path: Path) -> None:
    def fresh(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
        return net, make(net)

    net, optimizer = fresh(0)
    run(net, optimizer, 0, 5)
    CodedSaver(tmp_path).save(5, net, optimizer)
    unbroken = run(net, optimizer, 5, 9)
    again, other = fresh(1)
    CodedSaver(tmp_path).restore(again, other)
    assert run(again, other, 5, 9) == unbroken


def test_an_optimizer_that_cannot_be_coded_or_restored_is_refused(tmp_path: Path) -> None:
    net, optimizer = small()
    run(net, optimizer, 0, 1)
    CodedSaver(tmp_path / "bank").save(1, net, optimizer)
    with pytest.raises(RunError, match=r"holds `exp_avg(_sq)?` of `0.bias`, which this optimizer does not train"):
        CodedSaver(tmp_path / "bank").restore(net, torch.optim.AdamW([net[0].weight]))
    both = torch.optim.AdamW([*net.parameters(), *torch.nn.Linear(2, 2).parameters()])
    with pytest.raises(RunError, match="trains 2 parameters that are not the network's"):
        CodedSaver(tmp_path / "none").save(1, net, both)
    optimizer.state[net[0].weight]["history"] = [1.0]
    with pytest.raises(RunError, match="keeps a list as `history` of `0.weight`"):
        CodedSaver(tmp_path / "none").save(1, net, optimizer)
    assert not (tmp_path / "none").exists()


def test_a_training_goes_on_from_an_earlier_step(tmp_path: Path) -> None:
    net, optimizer = small()
    saver = CodedSaver(tmp_path)
    for step in (2, 4, 6):
        run(net, optimizer, step - 2, step)
        saver.save(step, net, optimizer)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / f".{file_name(8)}.0123abcd.tmp").write_bytes(b"half")
    again, other = small(seed=9)
    saver = CodedSaver(tmp_path, replace=True)
    assert saver.restore(again, other, step=2) == 2
    with pytest.raises(OutputExistsError, match=r"has checkpoints up to step 6, and the training goes on from step 2"):
        CodedSaver(tmp_path).check(2)
    for step in (4, 6):
        run(again, other, step - 2, step)
        saver.save(step, again, other)
        assert Chain(tmp_path).steps == tuple(range(2, step + 1, 2))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_a_wrapped_network_has_its_own_names(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    CodedSaver(tmp_path).save(1, torch.nn.DataParallel(net))
    assert set(Chain(tmp_path).read(1)) == {"weight", "bias"}
    other = torch.nn.DataParallel(torch.nn.Linear(3, 2))
    CodedSaver(tmp_path).restore(other)
    assert torch.equal(other.module.weight, net.weight)


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
    saver = CodedSaver(tmp_path / "bank", replace=True)
    accelerator.register_save_state_pre_hook(save_hook(saver, optimizer))
    accelerator.register_load_state_pre_hook(load_hook(saver))
    for step in (2, 4):
        run(model, prepared, step - 2, step)
        accelerator.save_state(str(tmp_path / "states" / f"checkpoint-{step}"))
    unbroken = run(model, prepared, 4, 8)
    accelerator.load_state(str(tmp_path / "states" / "checkpoint-4"))
    assert run(model, prepared, 4, 8) == unbroken
    accelerator.load_state(str(tmp_path / "states" / "checkpoint-4"))
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
    called.on_train_begin(arguments, TrainerState(global_step=7), TrainerControl())
    with pytest.raises(OutputExistsError, match="goes on from step 0"):
        called.on_train_begin(arguments, TrainerState(), TrainerControl())
    other = TrainerState(global_step=8, is_world_process_zero=False)
    called.on_save(arguments, other, TrainerControl(), model=net, optimizer=optimizer)
    assert CheckpointBank.open(tmp_path / "bank").steps == (7,)


def test_a_network_tells_what_a_search_needs_to_know(tmp_path: Path) -> None:
    from diffusers import UNet2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    for net in (LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), unet):
        net.save_pretrained(tmp_path / type(net).__name__ / "checkpoint-1")
        CodedSaver(tmp_path / "coded" / type(net).__name__).save(1, net)
        plain, coded = (CheckpointBank.open(tmp_path / at / type(net).__name__) for at in ("", "coded"))
        assert coded.arch == plain.arch
        assert coded.digest == plain.digest


def test_half_precision_and_shared_tensors_are_taken_as_they_are() -> None:
    net = torch.nn.Linear(3, 2).to(torch.bfloat16)
    net.register_buffer("also", net.weight.data)
    found, ties = training_tensors(net)
    assert ties == {"also": "weight"}
    assert found["weight"].bits.tobytes() == net.weight.detach().view(torch.int16).numpy().tobytes()

"""Banks of language models by transformers' Trainer: the same bits, whatever interrupts it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers_text import CONFIG, LLAMA, MIXTURE, TIED
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError, EvaluationError, RunError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Windows
from lcsc.recycling.stages import NORMS
from lcsc.training.causal_lm import CausalLM

DROPPING = {
    "class": "GPT2LMHeadModel",
    "config": {
        **{"vocab_size": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
        **{"resid_pdrop": 0.2, "bos_token_id": None, "eos_token_id": None},
    },
}
SMALL = {"num_steps": 12, "batch_size": 4, "save_every": 4, "block_length": 32}
TEXT = build("dataset", "text", stretch=64)


def train(out, arch=TIED, seed=3, dataset=TEXT, **settings):
    return CausalLM(**{**SMALL, **settings}).train(
        arch=arch, model=None, dataset=dataset, out=out, seed=seed, progress=False
    )


def weights(bank):
    return {file.parent.name: load_file(file) for file in sorted(bank.glob("checkpoint-*/model.safetensors"))}


def assert_same_bits(left, right):
    a, b = weights(left), weights(right)
    assert list(a) == list(b) == ["checkpoint-000004", "checkpoint-000008", "checkpoint-000012"]
    for name in a:
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    assert (left / "train_log.jsonl").read_bytes() == (right / "train_log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken") / "bank")


def test_a_bank_is_opened_with_its_networks(unbroken):
    names = sorted(path.name for path in unbroken.iterdir())
    assert names == [*weights(unbroken), "train.json", "train_log.jsonl"]
    bank = CheckpointBank.open(unbroken)
    assert (bank.steps, bank.arch["class"]) == ((4, 8, 12), "LlamaForCausalLM")
    config = json.loads((unbroken / "train.json").read_text())["config"]
    assert config["trainer"]["name"] == "causal_lm"
    assert set(config) == {"trainer", "arch", "dataset", "seed"}
    lines = [json.loads(line) for line in (unbroken / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10, 12]
    assert lines[0]["loss"] == pytest.approx(np.log(256), abs=0.1)  # knows nothing yet
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_first_step_is_adams_on_transformers_loss(tmp_path):
    """One step against the same step in plain torch, from the same weights on the same windows."""
    bank = train(tmp_path / "bank", num_steps=1, save_every=1, learning_rate=0.01, max_grad_norm=0.5)
    seeds = SeedRange(3, Purpose.TRAIN)
    with torch.random.fork_rng():
        torch.manual_seed(int(seeds.generator(0).integers(2**63)))
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TIED["config"]))
    trainer = CausalLM(**{**SMALL, "num_steps": 1})
    windows = Windows(TEXT.tokens(TextPart.TRAIN), trainer, seeds)
    assert len(windows) == 4
    ids_NT = torch.stack([windows[i]["input_ids"] for i in range(4)])
    assert len({bytes(row.tolist()) for row in ids_NT}) == 4
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    net(input_ids=ids_NT, labels=ids_NT).loss.backward()
    assert float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)) > 0.5
    optimizer.step()
    for name, tensor in weights(bank)["checkpoint-000001"].items():
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_checkpoints_may_have_the_norms_of_their_gradients(tmp_path):
    """Of a step in plain torch, on the same windows from the checkpoint before; the weights' bits stay."""
    bank = train(tmp_path / "bank", num_steps=2, save_every=1, max_grad_norm=0.5, gradient_norms=True)
    told = [json.loads((bank / f"checkpoint-00000{step}" / NORMS).read_text()) for step in (1, 2)]
    assert [row["step"] for row in told] == [1, 2]
    plain = train(tmp_path / "plain", num_steps=2, save_every=1, max_grad_norm=0.5)
    assert not list(plain.rglob(NORMS))
    ours, theirs = weights(bank), weights(plain)
    assert all(torch.equal(ours[step][name], theirs[step][name]) for step in ours for name in ours[step])
    assert "gradient_norms" not in json.loads((plain / "train.json").read_text())["config"]["trainer"]

    net = transformers.LlamaForCausalLM.from_pretrained(bank / "checkpoint-000001")
    windows = Windows(TEXT.tokens(TextPart.TRAIN), CausalLM(**{**SMALL, "num_steps": 2}), SeedRange(3, Purpose.TRAIN))
    ids_NT = torch.stack([windows[i]["input_ids"] for i in range(4, 8)])
    net.train()(input_ids=ids_NT, labels=ids_NT).loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    wanted = [sum(float(p.grad.square().sum()) for p in layer.parameters()) ** 0.5 for layer in net.model.layers]
    assert told[1]["layers"] == pytest.approx(wanted, rel=1e-4)

    with pytest.raises(RunError, match="gradient_norms"):
        train(bank, num_steps=2, save_every=1, max_grad_norm=0.5)


def test_same_call_on_a_finished_bank_touches_nothing(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert train(unbroken) == unbroken
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before
    with pytest.raises(RunError, match=r"another configuration: .*learning_rate"):
        train(unbroken, learning_rate=1e-2)


def test_global_random_state_is_left_alone(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    train(tmp_path / "bank", num_steps=1, save_every=1)
    assert states() == before


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {unit!r}]
import test_training_language as t
from lcsc.training.folder import BankFolder
real = BankFolder.write_checkpoint
def write(self, net, step, *more):
    real(self, net, step, *more)
    if step == 8 and {where!r} == "before the state":
        os.kill(os.getpid(), signal.SIGKILL)
BankFolder.write_checkpoint = write
save = t.torch.save
def cut(thing, path, *more):
    save(thing, path, *more)
    if {where!r} == "within the state" and "checkpoint-8" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
t.torch.save = cut
t.train(Path({bank!r}), t.{arch})
"""


@pytest.mark.parametrize(
    ("where", "arch"),
    [
        pytest.param("within the state", "MIXTURE", marks=pytest.mark.faults),
        pytest.param("before the state", "DROPPING", marks=pytest.mark.faults),
        pytest.param("before the state", "MIXTURE", marks=pytest.mark.faults),
        pytest.param("within the state", "DROPPING", marks=pytest.mark.faults),
    ],
)
def test_kill_9_then_the_same_call_gives_the_same_bits(tmp_path, where, arch):
    """With dropout, and with experts that transformers' own states would lose."""
    bank, tests = tmp_path / "bank", Path(__file__).parents[1]
    code = CHILD.format(tests=str(tests), unit=str(tests / "unit"), where=where, bank=str(bank), arch=arch)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tests.parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(weights(bank)) == ["checkpoint-000004", "checkpoint-000008"]
    assert (bank / ".lock").exists()
    networks = {"DROPPING": DROPPING, "MIXTURE": MIXTURE}
    train(bank, networks[arch])
    assert not (bank / ".lock").exists()
    assert_same_bits(bank, train(tmp_path / "whole", networks[arch]))


def test_training_goes_on_from_another_network(unbroken, tmp_path):
    start = unbroken / "checkpoint-000012"
    bank = train(tmp_path / "more", start=str(start), num_steps=1, save_every=1, learning_rate=1e-9)
    for name, tensor in weights(bank)["checkpoint-000001"].items():
        torch.testing.assert_close(tensor, load_file(start / "model.safetensors")[name], rtol=0, atol=1e-7)
    other = unbroken / "checkpoint-000004"
    with pytest.raises(RunError, match=r"another configuration: .*start"):
        train(tmp_path / "more", start=str(other), num_steps=1, save_every=1, learning_rate=1e-9)
    with pytest.raises(RunError, match=r"cannot be where the training begins: .*size mismatch"):
        train(tmp_path / "none", arch={**TIED, "config": {**TIED["config"], "hidden_size": 32}}, start=str(start))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cubic"}, "`schedule` is `cubic`; it must be one of constant"),
        ({"block_length": 1}, "`block_length`, `warmup_steps`, `max_grad_norm` are 1, 0, 1.0"),
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"block_length": 65}, "`trainer.block_length` is 65, and the text is cut into stretches of 64 tokens"),
        ({"arch": {"class": "UNet2DModel"}}, "makes language models of transformers, not `UNet2DModel`"),
        ({"arch": {**LLAMA, "config": {**CONFIG, "hidden_sise": 1}}}, "has no argument `hidden_sise`. Did you mean"),
        ({"arch": {**LLAMA, "config": {**CONFIG, "vocab_size": 99}}}, "the network has 99 tokens, and the text 256"),
        ({"dataset": build("dataset", "digits")}, "trainer `causal_lm` reads text, and data set `Digits` holds images"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "bank", **settings)
    assert not (tmp_path / "bank").exists()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    with pytest.raises(EvaluationError, match=r"the loss is nan at step \d+ with `learning_rate` 1e\+30"):
        train(tmp_path / "bank", learning_rate=1e30)


def test_schedules_reach_transformers(tmp_path):
    rates = CausalLM(**SMALL, schedule="warmup_stable_decay", warmup_steps=3).fit.arguments(tmp_path, 0)
    assert (rates.warmup_steps, rates.lr_scheduler_kwargs, rates.n_gpu <= 1) == (3, {"num_decay_steps": 1}, True)
    paths = [train(tmp_path / name, schedule=name, num_steps=4, warmup_steps=1) for name in ("linear", "cosine")]
    first, second = (weights(path)["checkpoint-000004"]["model.norm.weight"] for path in paths)
    assert not torch.equal(first, second)

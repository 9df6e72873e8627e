"""The stages of a pipeline against the network that was not cut, step by step and bit by bit."""

from __future__ import annotations

import pytest
import torch
from helpers_pipeline import ARCH, STAGES, trainer, unsplit, windows

from lcsc.core.errors import ConfigError
from lcsc.recycling.failures import Failure
from lcsc.training.failing_stages import Recovery, rebuild
from lcsc.training.pipeline import run_pipeline
from lcsc.training.pipeline_stage import Stage
from lcsc.training.pipeline_worker import Plan

STEPS = 3


def piped(recovery, lost, at):
    """The final weights of the stages in one process, with one stage lost before a step."""
    how, data = trainer(STEPS), windows(STEPS)
    stages = [Stage(ARCH, s, recovery, how.learning_rate, 5) for s in range(STAGES)]
    size, norms = how.batch_size // recovery.micro_batches, None
    for t in range(STEPS):
        if t == at:
            with torch.no_grad():
                layers = [stage.parts["layers"] for stage in stages]
                named = {n: p for part in layers for n, p in zip(part.names, part.parameters, strict=True)}
                for name in layers[lost].names:
                    named[name].fill_(torch.nan)
                made = rebuild(named, stages[0].stages, lost, recovery, norms, stages[0].std, t)
            layers[lost].begin_anew(made, recovery.lr_factor)
        ids = torch.stack([data[t * how.batch_size + i]["input_ids"] for i in range(how.batch_size)])
        ways = []
        for m in range(recovery.micro_batches):
            hidden, way = None, []
            for s in recovery.order(m):
                last = s == recovery.order(m)[-1]
                passed = stages[s].forward(
                    ids[m * size : (m + 1) * size], hidden, last=last, num_items=how.batch_size * (how.block_length - 1)
                )
                way.append(passed)
                hidden = passed.out.detach().clone()
            ways.append(way)
        for way in ways:
            grad = None
            for passed in reversed(way):
                grad = Stage.backward(passed, grad)
        for name, first, second in (("embedding", 0, 1), ("head", STAGES - 2, STAGES - 1)):
            total = stages[first].parts[name].grads() + stages[second].parts[name].grads()
            for s in (first, second):
                stages[s].parts[name].set_grads(total)
        norms = [stage.clip() for stage in stages]
        for stage in stages:
            stage.update()
    return stages, norms


@pytest.mark.parametrize("swapped", [False, True])
def test_stages_train_as_the_whole_network_does(swapped):
    recovery = Recovery(STAGES, "checkfree_plus", swapped)
    stages, norms = piped(recovery, 1, 2)
    wanted, curve = unsplit(recovery, STEPS, [Failure(2, 1)])
    assert norms == curve.norms
    found = {}
    for stage in stages:
        for part in stage.parts.values():
            for name, p in zip(part.names, part.parameters, strict=True):
                assert torch.equal(p, wanted[name]), (stage.number, name)
                found[name] = p
    assert set(found) == set(wanted)
    assert recovery.order(1) == ((1, 0, 3, 2) if swapped else (0, 1, 2, 3))
    if swapped:  # without the failure it is another network
        other, _ = unsplit(recovery, STEPS, [])
        assert not torch.equal(other["model.layers.1.mlp.up_proj.weight"], found["model.layers.1.mlp.up_proj.weight"])


def test_a_stage_given_back_by_its_state_goes_on_the_same_way():
    stages, _ = piped(Recovery(STAGES), 2, 1)
    other = Stage(ARCH, 1, Recovery(STAGES), 1.0, 9)
    other.load_state(stages[1].state())
    for stage in (stages[1], other):
        for part in stage.parts.values():
            part.set_grads(torch.linspace(-1, 1, part.size))
        stage.update()
    assert torch.equal(stages[1].state(), other.state())
    assert len(other.state()) == other.state_size


def test_the_recovered_stage_alone_begins_anew_and_faster():
    stages, _ = piped(Recovery(STAGES, lr_factor=1.5), 2, 1)
    rates = [part.optimizer.param_groups[0]["lr"] for stage in stages for part in stage.parts.values()]
    assert sorted(set(rates)) == [0.01, 0.015]
    updates = [int(stage.parts["layers"].state()[-2]) for stage in stages]
    assert updates == [STEPS, STEPS, STEPS - 1, STEPS]
    assert [float(stage.parts["layers"].state()[-1]) for stage in stages] == [0.01, 0.01, 0.015, 0.01]


def test_plans_that_cannot_be_carried_out(tmp_path):
    plan = {"arch": ARCH, "windows": windows(STEPS), "trainer": trainer(STEPS), "folder": tmp_path / "no"}
    for recovery, more, text in (
        (Recovery(3), {"strategy": "neighbours"}, "`num_stages` is 3"),
        (Recovery(4), {"strategy": "checkpoints"}, "`strategy` is `checkpoints`"),
        (Recovery(4), {"strategy": "checkpoint"}, "`period` is 0"),
        (Recovery(4, swapped=True), {"strategy": "redundant"}, "swapped orders"),
        (Recovery(4, micro_batches=3), {"strategy": "neighbours"}, "for 3 equal micro-batches"),
    ):
        with pytest.raises(ConfigError, match=text):
            run_pipeline(Plan(recovery=recovery, **plan, **more))
    assert not (tmp_path / "no").exists()
    for settings, text in (
        ({"rule": "best"}, "`rule` is `best`"),
        ({"micro_batches": 3, "swapped": True}, "even number"),
    ):
        with pytest.raises(ConfigError, match=text):
            Recovery(4, **settings)
    tied = {**ARCH, "config": {**ARCH["config"], "tie_word_embeddings": True}}
    with pytest.raises(ConfigError, match="with a head of its own"):
        Stage(tied, 0, Recovery(4), 0.01, 0)

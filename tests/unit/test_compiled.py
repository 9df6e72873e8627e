"""Scores and derivatives of a network that torch.compile runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.compiled import Compiled
from lcsc.operators.linear import Linear
from lcsc.search.evaluate import Evaluator

IMAGES = range(12)
EAGER = "eager"  # torch's backend that traces and changes nothing


def evaluator(folder, name="sample_quality", **settings):
    bank = CheckpointBank.open(folder)
    parts = {"model": build("model", "edm"), "dataset": build("dataset", "digits")}
    parts |= {"sampler": build("sampler", "euler", num_steps=1), "metric": build("metric", "fid_pixels")}
    objective = build("objective", name, **parts, batch_size=12, device="cpu", **settings)
    return Evaluator(bank, Linear(), objective, Linear().space(bank), 0)


class Small(nn.Module):
    """What a diffusers network looks like from outside, quickly traced."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images, times):
        return SimpleNamespace(sample=self.conv(images) + times[:, None, None, None])


@pytest.mark.faults  # five traces of a UNet take ten seconds
def test_compiled_without_optimising_gives_the_same_bits(tiny_bank):
    plain, traced = evaluator(tiny_bank), evaluator(tiny_bank, compile=EAGER)
    values = []
    for point in (np.zeros(4), np.full(4, 0.3)):  # the second is written into the network that the first has compiled
        rows = [scorer.score(point, Purpose.SEARCH, IMAGES) for scorer in (plain, traced)]
        assert rows[0]["value"] == rows[1]["value"]
        values.append(rows[0]["value"])
    assert values[0] != values[1]
    slopes = [scorer.slope(point, Purpose.SEARCH, IMAGES) for scorer in (plain, traced)]
    assert slopes[0]["value"] == slopes[1]["value"]
    np.testing.assert_array_equal(slopes[1]["gradient"], slopes[0]["gradient"])
    assert np.abs(slopes[0]["gradient"]).max() > 0
    members = evaluator(tiny_bank, "fid_nfe", nfe=[1, 2], compile=EAGER).objective.members
    assert [member.compile for member in members] == [EAGER, EAGER]


def test_each_size_of_batch_is_compiled_once_whatever_the_weights():
    net, counter = Small().eval().requires_grad_(False), CompileCounter()
    fast = Compiled(net, counter)
    sizes, results = (4, 2, 4, 2), []
    for size in sizes:
        images = torch.ones(size, 1, 8, 8)
        results.append(fast(images, torch.zeros(size)).sample)
        assert torch.equal(results[-1], net(images, torch.zeros(size)).sample)
        net.conv.weight += 0.5
    assert counter.frame_count == len(set(sizes))
    assert not torch.equal(results[0], results[2])
    assert fast.dtype is torch.float32
    assert not list(fast.parameters())  # a second name would count the weights twice


def test_backends_that_do_not_exist_or_fail_are_told(tiny_bank):
    with pytest.raises(
        ConfigError, match=r"`compile` is `fast`; it is `no` or a backend of torch\.compile: .*inductor"
    ):
        evaluator(tiny_bank, compile="fast")

    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    fast = Compiled(Small(), broken)
    with pytest.raises(ConfigError, match=r"cannot compile `Small` here \(.*no compiler found.*set `compile=no`"):
        fast(torch.ones(2, 1, 8, 8), torch.zeros(2))

"""Live networks: their weights lie in one row, and tied weights lie there once."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_model

from lcsc.bank import CheckpointBank, Layout
from lcsc.core.errors import BankError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.flat import LiveModel
from lcsc.models.network import NETWORKS
from lcsc.operators.linear import Linear

NETS = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

WORDS = torch.arange(10).reshape(2, 5)


class TinyGPT2(GPT2LMHeadModel):
    def __init__(self, width=8):
        super().__init__(GPT2Config(vocab_size=11, n_positions=6, n_embd=width, n_layer=1, n_head=2))


class Twins(torch.nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.a, self.b = (torch.nn.Linear(3, 4, bias=False) for _ in "ab")
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x) + 2 * self.b(x)


def loss(net, *, seed, purpose, images):
    assert net.lm_head.weight is net.transformer.wte.weight
    with torch.no_grad():
        return float(net(input_ids=WORDS, labels=WORDS).loss)


def spoil(net, *, seed, purpose, images):
    value = loss(net, seed=seed, purpose=purpose, images=images)
    net.half()
    return value
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Networks of the tests' own, to be built by name like any other."""
    (tmp_path / "tied_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("TinyGPT2", "Twins"):
        monkeypatch.setitem(NETWORKS, name, "tied_nets")
    import tied_nets

    yield tied_nets
    del sys.modules["tied_nets"]


def save_both_names(net, folder):
    torch.save(net.state_dict(), folder / "model.bin")


def save_one_name(net, folder):
    save_model(net, str(folder / "model.safetensors"))
    assert len(load_file(folder / "model.safetensors")) == len(net.state_dict()) - 1


@pytest.mark.parametrize("save", [save_both_names, save_one_name])
def test_a_function_scores_a_network_with_tied_embeddings(tmp_path, nets, save):
    torch.manual_seed(0)
    states = []
    for step in (1, 2, 3):
        folder = tmp_path / "bank" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        net = nets.TinyGPT2()
        save(net, folder)
        (folder / "config.json").write_text(json.dumps({"_class_name": "TinyGPT2", "width": 8}))
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    bank, linear = CheckpointBank.open(tmp_path / "bank"), Linear()
    assert bank.layout.num_parameters == sum(p.numel() for p in net.parameters())  # the tie has no place of its own
    objective = build("objective", "function", function="tied_nets:loss", device="cpu")
    spoiling = build("objective", "function", function="tied_nets:spoil", device="cpu")
    for coef in ([0.2, 0.3, 0.5], [1.5, -1.25, 0.75]):
        net.load_state_dict({n: sum(c * s[n] for c, s in zip(coef, states, strict=True)) for n in states[0]})
        wanted = nets.loss(net.eval(), seed=0, purpose=None, images=None)
        candidate = linear.apply(bank, linear.point(bank, np.array(coef)))
        for scorer in (objective, spoiling, spoiling):
            found = scorer(candidate, seed=0, purpose=Purpose.SEARCH, images=range(1))
            assert found.value == pytest.approx(wanted, rel=1e-5)
    live = objective.__dict__["_kept"].filled(candidate, torch.device("cpu"))
    assert live.intact  # one network served both candidates
    live.theta_P.zero_()
    assert not live.net.lm_head.weight.any()
    assert not live.net.transformer.wte.weight.any()


@pytest.mark.parametrize("tied", [True, False], ids=["tied network", "free network"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout.of({"a.weight": (4, 3)}, {"b.weight": "a.weight"}),
        Layout.of({"b.weight": (4, 3)}, {"a.weight": "b.weight"}),
        Layout.of({"a.weight": (4, 3)}),
        Layout.of({"b.weight": (4, 3)}),
    ],
    ids=["both, first", "both, second", "first only", "second only"],
)
def test_tied_weights_are_one_place_and_collect_one_gradient(nets, layout, tied):
    arch = {"class": "Twins", "config": {"tied": tied}}
    if not tied and not layout.ties:
        with pytest.raises(BankError, match=r"does not fit `Twins`: missing \['[ab].weight'\], unknown \[\]"):
            LiveModel(arch, layout, {}, torch.device("cpu"))
        return
    live = LiveModel(arch, layout, {}, torch.device("cpu"))
    live.theta_P.copy_(torch.arange(12.0))
    net, x = live.net, torch.tensor([[1.0, 2.0, 3.0]])
    assert live.intact
    assert net.a.weight.data_ptr() == net.b.weight.data_ptr() == live.theta_P.data_ptr()
    assert torch.equal(net(x), 3 * x @ live.theta_P.view(4, 3).T)
    with live.collecting() as grad_P:
        net(x).sum().backward()
    assert torch.equal(grad_P.view(4, 3), 3 * x.expand(4, 3))
    net.b.weight = torch.nn.Parameter(net.b.weight.clone())
    assert not live.intact


def test_a_tie_does_not_hide_what_is_wrong(nets):
    for layout, said in [
        (Layout.of({"a.weight": (4, 2)}, {"b.weight": "a.weight"}), r"other shape \['a.weight', 'b.weight'\]"),
        (Layout.of({"a.weight": (4, 3), "c.weight": (1,)}), r"missing \[\], unknown \['c.weight'\]"),
        (Layout.of({"c.weight": (4, 3)}), r"missing \['a.weight', 'b.weight'\], unknown \['c.weight'\]"),
    ]:
        with pytest.raises(BankError, match=said):
            LiveModel({"class": "Twins", "config": {}}, layout, {}, torch.device("cpu"))

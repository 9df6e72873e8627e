"""Mixtures whose experts lie one by one in files are live networks, held to what transformers makes of the files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers_text import CONFIG, MIXTURE
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError
from lcsc.export.model import _load_back as load_back
from lcsc.export.weights import write_weights
from lcsc.models.flat import LiveModel
from lcsc.models.network import build_network, save_network
from lcsc.models.shards import LocalShards, _Box, _within
from lcsc.operators.base import Candidate
from lcsc.operators.linear import Linear
from lcsc.recycling.experts import MIXTURES, as_in_files, expert_names, parts_of, router_name

IDS = torch.arange(40).reshape(2, 20) * 5 % 256
SMALL = {
    "MixtralForCausalLM": {**CONFIG, "num_local_experts": 3},
    "OlmoeForCausalLM": {**CONFIG, "num_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0},
    "Qwen2MoeForCausalLM": {
        **{**CONFIG, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 3},
        **{"num_experts_per_tok": 2, "mlp_only_layers": [1]},
    },
    "Qwen3MoeForCausalLM": {**MIXTURE["config"], "num_experts": 11},  # in files expert 10 stands before expert 2
}
CPU = torch.device("cpu")


def mixture(kind):
    torch.manual_seed(0)
    return build_network({"class": kind, "config": SMALL[kind]}).eval()


def saved(kind, folder, *, fused=False):
    """Two checkpoints as transformers itself writes them."""
    net = mixture(kind)
    for step in (1, 2):
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        net.save_pretrained(folder / f"checkpoint-{step}", save_original_format=not fused)
    return CheckpointBank.open(folder)


def loss(net):
    return net(input_ids=IDS, labels=IDS, use_cache=False).loss


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_folder_of_transformers_is_a_live_network_with_its_derivatives(tmp_path, kind):
    bank = saved(kind, tmp_path)
    assert expert_names(kind, "model.layers.0", 2)["up"] in bank.layout.shapes
    assert router_name(kind, "model.layers.0") in bank.layout.shapes
    live = LiveModel(bank.arch, bank.layout, bank.constants, CPU)
    for step, row in zip(bank.steps, bank.matrix(), strict=True):
        live.fill(lambda out, row=row: out.copy_(row))
        theirs = getattr(transformers, kind).from_pretrained(tmp_path / f"checkpoint-{step}").eval()
        with live.collecting() as grad_P:
            for _ in range(2):
                loss(live.net).backward()
        (2 * loss(theirs)).backward()
        assert torch.equal(live.net(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
        wanted = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
        wanted_P = bank.layout.flatten(as_in_files(kind, wanted, bank.layout.shapes))
        assert float(wanted_P.abs().max()) > 0.01
        torch.testing.assert_close(grad_P, wanted_P)
        assert live.intact
        assert not any(p.requires_grad or p.grad is not None for p in live.net.parameters())
    live.net.half()
    assert not live.intact


@pytest.mark.parametrize("kind", MIXTURES)
def test_files_are_those_of_transformers_and_a_candidate_comes_back_from_its_own(tmp_path, kind):
    bank = saved(kind, tmp_path / "bank")
    net = mixture(kind)
    save_network(net, tmp_path / "net")
    files = load_file(tmp_path / "net" / "model.safetensors")
    assert set(files) == set(bank.layout.shapes)
    ours = as_in_files(kind, net.state_dict(), files)
    assert set(ours) == set(files)
    assert all(torch.equal(files[name], tensor) for name, tensor in ours.items())
    linear = Linear()
    candidate = linear.apply(bank, linear.point(bank, [0.25, 0.75]))
    weights = candidate.weights()
    (tmp_path / "out").mkdir()
    write_weights(weights, candidate.arch, {"operator": "linear"}, tmp_path / "out")
    loaded = load_back(tmp_path / "out", tmp_path, candidate, weights, "diffusers")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    live = LiveModel(candidate.arch, candidate.layout, {}, CPU)
    live.fill(candidate.write)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(live.net(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_fused_files_stay_fused(tmp_path):
    bank = saved("MixtralForCausalLM", tmp_path, fused=True)
    assert "model.layers.0.mlp.experts.gate_up_proj" in bank.layout.shapes
    live = LiveModel(bank.arch, bank.layout, {}, CPU)
    live.fill(lambda out: out.copy_(bank.matrix()[0]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").eval()
    with torch.no_grad():
        assert torch.equal(live.net(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_an_expert_that_is_not_there_is_named(tmp_path):
    bank = saved("Qwen3MoeForCausalLM", tmp_path)
    shapes = dict(bank.layout.shapes)
    del shapes["model.layers.1.mlp.experts.10.up_proj.weight"]
    shapes["model.layers.1.mlp.experts.3.up_proj.weight"] = (8, 15)
    candidate = Candidate(bank.arch, type(bank.layout).of(shapes), lambda out: None, {})
    said = r"missing \['model.layers.1.mlp.experts.10.up_proj.weight'\], unknown \[\], other shape \[.*experts.3.up"
    with pytest.raises(BankError, match=said):
        LiveModel(candidate.arch, candidate.layout, {}, CPU)


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_network_that_is_spread_over_processes_gets_its_experts_too(tmp_path, kind):
    bank, net = saved(kind, tmp_path), mixture(kind)
    LocalShards(bank, net).write(torch.tensor([0.25, 0.75]))
    live = LiveModel(bank.arch, bank.layout, bank.constants, CPU)
    linear = Linear()
    live.fill(linear.apply(bank, linear.point(bank, [0.25, 0.75])).write)
    for name, tensor in live.net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_any_rectangle_of_all_experts_is_put_together_from_their_tensors():
    """What processes hold along any axes, pasted from the files' tensors, is the slice of the whole."""
    whole, rng = torch.arange(5 * 8 * 6).view(5, 8, 6), np.random.default_rng(0)
    for tail in ("gate_up_proj", "down_proj"):
        parts = parts_of("Qwen2MoeForCausalLM", f"layers.0.mlp.experts.{tail}", (5, 8, 6))
        files = {part.name: part.of(whole) for part in parts}
        for _ in range(50):
            low = [int(rng.integers(n)) for n in (5, 8, 6)]
            box = _Box(tuple(low), tuple(int(rng.integers(1, n - a + 1)) for a, n in zip(low, (5, 8, 6), strict=True)))
            local = torch.full(box.shape, -1)
            for part in parts:
                if (place := _within("fused", part, box)) is not None:
                    rows = files[place.own][place.box.at[0] : place.box.at[0] + place.box.shape[0]]
                    local[place.into] = place.box.of(rows)
            cut = [slice(a, a + n) for a, n in zip(box.at, box.shape, strict=True)]
            assert torch.equal(local, whole[tuple(cut)])

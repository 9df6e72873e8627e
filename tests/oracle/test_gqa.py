"""The operator `gqa` against transformers' own forward passes and caches, for every family that it knows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.transform import transform_model
from lcsc.models.flat import LiveModel
from lcsc.operators.gqa import METHODS, Gqa, fill
from lcsc.recycling.attention import FAMILIES

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
}
TOKENS = torch.arange(24).reshape(2, 12) % 37 + 3


def build(kind, seed=0, **more):
    torch.manual_seed(seed)
    sizes = {**SMALL, **MORE.get(kind, {}), **more}
    if kind in ("phi", "qwen2", "qwen2_moe"):  # their heads have hidden_size / heads numbers
        sizes = {**sizes, "hidden_size": 64}
        del sizes["head_dim"]
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for name, p in net.named_parameters():
        if "self_attn" in name:  # far from uniform attention, and biases and gains that are not all alike
            p.data += 0.3 * torch.randn(p.shape)
    return net


def saved(net, folder):
    net.save_pretrained(folder)
    return CheckpointBank.open(folder)


def opened(candidate, folder):
    """The candidate as transformers loads it from its own configuration and tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(candidate.arch["config"]))
    save_file(candidate.weights(), folder / "model.safetensors", metadata={"format": "pt"})
    net, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return net.eval()


@torch.no_grad()
def logits(net):
    return net(TOKENS).logits


def make_turns(net, seed=3):
    """Make each odd key/value head a turn of its neighbour, by angles and orthogonal matrices of numpy."""
    rng, config = np.random.default_rng(seed), net.config
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dims = 4 if config.model_type == "phi" else d
    with torch.no_grad():
        for layer in net.model.layers:
            a = layer.self_attn
            if hasattr(a, "k_norm"):  # gains that are equal in the first plane alone
                for norm in (a.q_norm, a.k_norm):
                    norm.weight[d // 2] = norm.weight[0]
            for h in range(1, config.num_key_value_heads, 2):
                R = np.eye(d)
                for i in range(dims // 2):
                    free = not hasattr(a, "k_norm") or i == 0
                    angle = rng.uniform(-3, 3) if free else np.pi * rng.integers(2)
                    j = i + dims // 2
                    R[[i, j], [i, j]], R[j, i], R[i, j] = np.cos(angle), np.sin(angle), -np.sin(angle)
                R[dims:, dims:] = np.linalg.qr(rng.normal(size=(d - dims, d - dims)))[0]
                S = np.linalg.qr(rng.normal(size=(d, d)))[0]
                for proj, turn in ((a.k_proj, R), (a.v_proj, S)):
                    turn = torch.from_numpy(turn).float()
                    here, there = slice(h * d, (h + 1) * d), slice((h - 1) * d, h * d)
                    proj.weight[here] = turn @ proj.weight[there]
                    if proj.bias is not None:
                        proj.bias[here] = turn @ proj.bias[there]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_turned_heads_are_merged_exactly_in_every_family(kind, tmp_path):
    net = build(kind)
    make_turns(net)
    bank = saved(net, tmp_path / "net")
    wanted, operator = logits(net), Gqa(num_kv_heads=2)
    made = operator.apply(bank, operator.space(bank).to_point(np.zeros(2)))
    assert made.arch["config"]["num_key_value_heads"] == 2
    assert made.recipe["pieces"] == [{"groups": [[0, 1], [2, 3]]}] * 2
    found = logits(opened(made, tmp_path / "made"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    paper = Gqa(num_kv_heads=2, pooling="mean", grouping="order")
    other = logits(opened(paper.apply(bank, {}), tmp_path / "paper"))
    assert (other - wanted).abs().max() > 20 * (found - wanted).abs().max()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_layers_with_heads_of_their_own_compute_what_repeated_ones_do(kind, tmp_path):
    bank = saved(build(kind), tmp_path / "net")
    settings = {"num_kv_heads": [1, 4], "pooling": "aligned", "grouping": "order"}
    wanted = logits(opened(Gqa(**settings).apply(bank, {}), tmp_path / "repeated"))
    own = Gqa(**settings, repeat_heads=False)
    if kind == "gemma3_text":  # a class that lcsc does not run
        streamed = CheckpointBank.open(tmp_path / "net", storage="streamed")
        with pytest.raises(ConfigError, match="layers of different heads cannot be written for a `Gemma3ForCausalLM`"):
            transform_model(streamed, own, tmp_path / "own")
        return
    made = own.apply(bank, {})
    net = LiveModel(made.arch, made.layout, made.constants, "cpu")
    net.fill(made.write)
    d = made.recipe["stored_cache_bytes_per_token"] // (2 * 5 * 4)
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in net.net.model.layers] == [d, 4 * d]
    torch.testing.assert_close(logits(net.net), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_all_heads_are_the_same_bits(method, tmp_path):
    net = build("qwen2")
    made = Gqa(num_kv_heads=4, pooling=method, grouping="similarity").apply(saved(net, tmp_path / "net"), {})
    weights, state = made.weights(), net.state_dict()
    assert made.recipe["num_kv_heads"] == [4, 4]
    assert all(torch.equal(weights[name], state[name]) for name in weights)
    assert len(weights) >= len(state) - 1


def test_the_cache_has_the_bytes_of_the_formula(tmp_path):
    bank = saved(build("llama"), tmp_path / "net")
    for counts, common in (((1, 1), 1), ((2, 1), 2), ((4, 2), 4)):
        made = Gqa(num_kv_heads=list(counts), pooling="aligned", grouping="order").apply(bank, {})
        net = opened(made, tmp_path / f"{counts}")
        cache = net(TOKENS, use_cache=True).past_key_values
        tokens = TOKENS.numel()
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == tokens * made.recipe["stored_cache_bytes_per_token"] == tokens * 2 * 2 * common * 8 * 4
        # what a cache of distinct heads would hold: those of one layer that differ
        distinct = 0
        for layer in cache.layers:
            for x in (layer.keys, layer.values):
                heads = x.transpose(0, 1).flatten(1)
                distinct += len(torch.unique(heads, dim=0)) * heads.shape[1] * 4
        assert distinct == tokens * made.recipe["cache_bytes_per_token"] == tokens * 2 * sum(counts) * 8 * 4


def test_layers_with_different_numbers_compute_what_each_alone_would(tmp_path):
    net = build("llama")
    bank = saved(net, tmp_path / "net")
    made = Gqa(num_kv_heads=[1, 2], pooling="mean", grouping="order").apply(bank, {}).weights()
    one, two = (Gqa(num_kv_heads=n, pooling="mean", grouping="order").apply(bank, {}).weights() for n in (1, 2))
    first, second = (f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1))
    assert torch.equal(made[first], torch.cat([one[first]] * 2))
    assert torch.equal(made[second], two[second])


def test_pooling_first_mean_and_random_by_hand(tmp_path):
    net = build("llama")
    bank = saved(net, tmp_path / "net")
    name = "model.layers.1.self_attn.v_proj.weight"
    heads = net.state_dict()[name].view(2, 2, 8, 32)
    space = Gqa(num_kv_heads=2).space(bank)
    found = {}
    for baseline in Gqa(num_kv_heads=2).baselines(bank):
        found[baseline.family] = Gqa(num_kv_heads=2).apply(bank, baseline.point).weights()[name].view(2, 8, 32)
        assert space.to_vector(baseline.point).shape == (2,)
    assert set(found) == set(METHODS)
    torch.testing.assert_close(found["mean"], heads.mean(1), rtol=1e-6, atol=1e-8)
    assert torch.equal(found["first"], heads[:, 0])
    assert float(found["random"].std()) == pytest.approx(0.02, rel=0.2)
    lengths = found["aligned"].flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, heads.flatten(2).norm(dim=2).mean(1), rtol=1e-6, atol=0)
    again = Gqa(num_kv_heads=2, pooling="random").apply(bank, {"grouping": np.zeros(1)})
    assert torch.equal(again.weights()[name].view(2, 8, 32), found["random"])
    other = Gqa(num_kv_heads=2, pooling="random", grouping="order", seed=1).apply(bank, {})
    assert not torch.equal(other.weights()[name].view(2, 8, 32), found["random"])


def test_head_weights_are_shares_of_their_group(tmp_path):
    net = build("llama")
    bank = saved(net, tmp_path / "net")
    operator = Gqa(num_kv_heads=2, pooling="mean", grouping="order", head_weights=True)
    space = operator.space(bank)
    assert [(box.name, box.size, box.level) for box in space.boxes] == [("key_weights", 8, 1), ("value_weights", 8, 1)]
    point = space.to_point(np.zeros(16))
    point["value_weights"][4] = np.log(3)  # first head of the second layer: three quarters of its group
    made, state = operator.apply(bank, point).weights(), net.state_dict()
    name = "model.layers.1.self_attn.v_proj.weight"
    a, b = state[name][:8], state[name][8:16]
    torch.testing.assert_close(made[name][:8], 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-7)
    key = name.replace("v_proj", "k_proj")
    torch.testing.assert_close(made[key][:8], (state[key][:8] + state[key][8:16]) / 2, rtol=1e-5, atol=1e-7)


def test_the_space_reaches_every_number_of_every_layer(tmp_path):
    bank = saved(build("llama"), tmp_path / "net")
    operator = Gqa()
    assert [(box.name, box.size) for box in operator.space(bank).boxes] == [
        ("groups", 2),
        ("pooling", 1),
        ("grouping", 1),
    ]
    seen = set()
    for a in (0.0, 0.4, 1.0):
        for b in (0.2, 0.5, 0.9):
            point = {"groups": np.array([a, b]), "pooling": np.array([1.2]), "grouping": np.array([2.0])}
            made = operator.plan(bank, point)
            seen.add(tuple(made.recipe["num_kv_heads"]))
            assert (made.recipe["pooling"], made.recipe["grouping"]) == ("mean", "similarity")
    assert seen == {(a, b) for a in (1, 2, 4) for b in (1, 2, 4)}
    labels = [baseline.label for baseline in operator.baselines(bank)]
    assert labels == [f"{method}, {n} key/value heads" for method in METHODS for n in (1, 2)]
    one = Gqa(per_layer=False).space(bank).boxes[0]
    assert (one.name, one.size) == ("groups", 1)


def test_a_sum_of_heads_is_filled():
    choices = (1, 2, 4, 8)
    assert fill(np.full(4, 0.5), choices, 16) == (4, 4, 4, 4)
    assert fill(np.array([1.0, 0.0, 0.0, 0.0]), choices, 11) == (8, 1, 1, 1)
    assert fill(np.array([0.0, 0.0, 1.0, 0.9]), choices, 14) == (1, 1, 8, 4)
    for x in np.random.default_rng(0).random((50, 4)):
        counts = fill(x, choices, 17)
        assert sum(counts) <= 17
        assert all(sum(counts) + n > 17 for n in counts if n < 8)  # nothing more fits
    assert fill(np.zeros(2), (1, 3), 3) == (1, 1)


def test_a_sum_of_heads_is_searched(tmp_path):
    bank = saved(build("llama"), tmp_path / "net")
    operator = Gqa(max_kv_heads=4)
    assert [b.label for b in operator.baselines(bank)] == [f"{method}, 2 key/value heads" for method in METHODS]
    with pytest.raises(ConfigError, match="`operator.max_kv_heads` is 1 for 2 layers"):
        Gqa(max_kv_heads=1).space(bank)


def test_a_named_checkpoint_of_several(tmp_path):
    nets = {step: build("llama", seed=step) for step in (10, 20)}
    for step, net in nets.items():
        net.save_pretrained(tmp_path / "bank" / f"checkpoint-{step}")
    bank = CheckpointBank.open(tmp_path / "bank")
    name = "model.layers.0.mlp.up_proj.weight"
    for step, wanted in ((None, 20), (10, 10), (20, 20)):
        made = Gqa(num_kv_heads=1, pooling="aligned", grouping="order", step=step).apply(bank, {})
        assert made.recipe["steps"] == [wanted]
        assert torch.equal(made.weights()[name], nets[wanted].state_dict()[name])
    with pytest.raises(ConfigError, match=r"`operator.step` is 11; the bank .* of which 10 is nearest"):
        Gqa(num_kv_heads=1, step=11).plan(bank)


def test_every_storage_gives_the_checkpoints_own_numbers(tmp_path):
    for step in (10, 20, 30):
        build("llama", seed=step).save_pretrained(tmp_path / "bank" / f"checkpoint-{step}")
    operator = Gqa(num_kv_heads=[2, 1], pooling="aligned", grouping="order")
    banks = [CheckpointBank.open(tmp_path / "bank", storage=s) for s in ("resident", "delta", "streamed")]
    first, *others = (operator.apply(bank, {}).weights() for bank in banks)
    for weights in others:
        assert all(torch.equal(weights[name], first[name]) for name in first)
    assert hash(operator) == hash(Gqa(num_kv_heads=(2, 1), pooling="aligned", grouping="order"))


def test_what_cannot_be_grouped_is_said(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    phi3 = Phi3ForCausalLM(Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}))
    normed = build("phi", qk_layernorm=True)
    for net, text in (
        (gpt2, "is a `GPT2LMHeadModel`, and `gpt2` has no key/value heads of its own"),
        (phi3, "is a `Phi3ForCausalLM`, and `phi3` keeps queries, keys and values in one tensor"),
        (normed, "`model.layers.0.self_attn.k_layernorm.bias`, which the turns of heads do not know"),
    ):
        bank = saved(net, tmp_path / type(net).__name__)
        with pytest.raises(BankError, match=text):
            Gqa(num_kv_heads=1).space(bank)
    bank = saved(build("llama"), tmp_path / "net")
    for settings, text in (
        (
            {"num_kv_heads": 3},
            r"`operator.num_kv_heads` is 3, and 4 key/value heads cannot .* Choose one of \(1, 2, 4\)",
        ),
        ({"num_kv_heads": [2]}, "`operator.num_kv_heads` has 1 numbers for 2 layers"),
        ({}, r"`operator.num_kv_heads` is not set, and nothing is searched here. Choose one of \(1, 2, 4\)"),
    ):
        with pytest.raises(ConfigError, match=text):
            Gqa(**settings).plan(bank)
    for settings, text in (
        ({"num_kv_heads": 0}, "`operator.num_kv_heads` is `0`"),
        ({"num_kv_heads": "2"}, "`operator.num_kv_heads` is `2`; give a number"),
        ({"pooling": "meen"}, "`operator.pooling` is `meen`. Did you mean `mean`"),
        ({"grouping": "x"}, "`operator.grouping` is `x`"),
        ({"num_kv_heads": 2, "max_kv_heads": 4}, "Leave one out"),
        ({"seed": -1}, "`seed` is -1"),
        ({"num_kv_heads": 2, "per_layer": False}, "`operator.per_layer` is false"),
        ({"max_kv_heads": 4, "per_layer": False}, "`operator.per_layer` is false"),
        ({"pooling": "random", "restore_norm": True}, "`operator.pooling` is `random`, which has neither"),
        ({"pooling": "first", "head_weights": True}, "`operator.pooling` is `first`, which has neither"),
    ):
        with pytest.raises(ConfigError, match=text):
            Gqa(**settings)


def test_a_configuration_that_contradicts_its_weights(tmp_path):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, text in (
        ({"num_key_value_heads": 8}, "holds 4 key/value heads for 8 query heads, its configuration says 8"),
        ({"num_attention_heads": 5}, "do not fit together"),
        ({"num_hidden_layers": 3}, r"attention in layers \[0, 1\], its configuration has 3"),
        ({"quantization_config": {"bits": 4}}, "holds quantized weights"),
        ({"model_type": "llama9"}, "`llama9` is not among the models .* Did you mean `llama`"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(BankError, match=text):
            Gqa(num_kv_heads=1).space(CheckpointBank.open(tmp_path))

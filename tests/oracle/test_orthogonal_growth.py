"""The operator `orthogonal_growth` against transformers' own forward passes, for every family that it knows."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.transform import transform_model
from lcsc.operators.orthogonal_growth import OrthogonalGrowth
from lcsc.recycling.growth import FAMILIES, feed_forward_norm, layer_order

SMALL = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
MORE = {
    "gemma2": {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [1]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
TOKENS = torch.arange(24).reshape(2, 12) % 37 + 3


def build(kind, **more):
    torch.manual_seed(0)
    sizes = {**SMALL, **MORE.get(kind, {}), **more}
    if kind in ("phi", "phi3", "opt", "gpt2", "qwen2", "qwen2_moe"):
        del sizes["head_dim"]
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)  # biases and gains that are not all alike
    return net


def saved(net, folder, **how):
    net.save_pretrained(folder, **how)
    return CheckpointBank.open(folder)


def grown(bank, folder, point=None, **settings):
    """What transformers makes of the candidate's own configuration and tensors."""
    operator = OrthogonalGrowth(**settings)
    space = operator.space(bank)
    made = operator.apply(bank, point or space.to_point(np.zeros(space.size)))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(made.arch["config"]))
    save_file(made.weights(), folder / "model.safetensors", metadata={"format": "pt"})
    net, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return net.eval()


@torch.no_grad()
def logits(net):
    return net(TOKENS).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_copies_that_write_nothing_change_nothing(tmp_path, kind):
    net = build(kind)
    bank = saved(net, tmp_path / "bank")
    method = "stack" if FAMILIES.index(kind) % 2 else "interposition"
    deeper = grown(bank, tmp_path / "deeper", copies=[2, 3, 1], method=method, copy_scale=0.0)
    assert deeper.config.num_hidden_layers == 6
    if kind in MIXTURES:  # which sum in another order of tokens
        torch.testing.assert_close(logits(deeper), logits(net), rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits(deeper), logits(net))


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "qwen3_moe", "smollm3"])
@pytest.mark.parametrize("method", ["interposition", "stack"])
def test_layers_stand_where_the_method_puts_them(tmp_path, kind, method):
    """Against transformers' own layers, put in that order by hand; what the configuration says of layers follows."""
    net = build(kind)
    bank = saved(net, tmp_path / "bank")
    deeper = grown(bank, tmp_path / "deeper", copies=[1, 2, 2], method=method)
    order = (0, 1, 1, 2, 2) if method == "interposition" else (0, 1, 2, 1, 2)
    base = net.transformer if kind == "gpt2" else net.model
    layers = torch.nn.ModuleList([copy.deepcopy((base.h if kind == "gpt2" else base.layers)[i]) for i in order])
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    setattr(base, "h" if kind == "gpt2" else "layers", layers)
    if hasattr(net.config, "layer_types"):
        net.config.layer_types = [net.config.layer_types[i] for i in order]
        assert deeper.config.layer_types == net.config.layer_types
    net.config.num_hidden_layers = 5
    torch.testing.assert_close(logits(deeper), logits(net), rtol=0, atol=1e-5)
    if kind == "qwen3_moe":
        assert deeper.config.mlp_only_layers == [place for place, i in enumerate(order) if i == 1]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "llama", "olmo2"])
def test_copies_write_as_much_as_is_said(tmp_path, kind):
    """Against transformers' own layers with halved outputs; norms behind a projection would undo its halving."""
    net = build(kind)
    deeper = grown(saved(net, tmp_path / "bank"), tmp_path / "deeper", copies=[1, 1, 2], copy_scale=0.5)
    last = copy.deepcopy(net.model.layers[2])
    last.self_attn.layer_idx = 3
    ends = (last.self_attn.o_proj, last.mlp.down_proj)
    if kind != "llama":
        ends = (last.post_attention_layernorm, last.post_feedforward_layernorm)
    for module in ends:
        module.register_forward_hook(lambda module, args, out: out / 2)
    net.model.layers.append(last)
    net.config.num_hidden_layers = 4
    if hasattr(net.config, "layer_types"):
        net.config.layer_types = [*net.config.layer_types, net.config.layer_types[2]]
    torch.testing.assert_close(logits(deeper), logits(net), rtol=0, atol=1e-5)


def test_a_mixture_with_another_head_keeps_its_dense_layers(tmp_path):
    sizes = {**SMALL, **MORE["qwen3_moe"], "num_labels": 3}
    net = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("qwen3_moe", **sizes))
    bank = saved(net, tmp_path / "bank")
    operator = OrthogonalGrowth(axis="both", method="interposition", noise=0.0, scale_top_k=True, copies=2)
    config = operator.plan(bank, {}).arch["config"]
    assert (config["mlp_only_layers"], config["num_local_experts"]) == ([2, 3], 6)
    file = tmp_path / "bank/config.json"  # as transformers 4 writes it, and what reads its files
    file.write_text(file.read_text().replace("num_local_experts", "num_experts"))
    config = operator.plan(CheckpointBank.open(tmp_path / "bank"), {}).arch["config"]
    assert (config["num_experts"], config.get("num_local_experts")) == (6, None)


def test_orders_of_the_paper():
    once = [1, 1, *[2] * 16, 1, 1]  # 20 layers, two at each edge once
    assert layer_order(once, "stack", keep_last=2) == (*range(18), *range(2, 20))
    assert layer_order(once, "interposition")[:6] == (0, 1, 2, 2, 3, 3)
    assert sorted(layer_order(once, "stack", 2)) == sorted(layer_order(once, "interposition"))
    assert layer_order([3, 3], "stack") == (0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_twins_without_noise_keep_the_function_and_its_loss(tmp_path, kind, fused):
    net = build(kind, output_router_logits=True, router_aux_loss_coef=0.3)
    bank = saved(net, tmp_path / "bank", save_original_format=not fused)
    wider = grown(bank, tmp_path / "wider", axis="width", noise=0.0)
    torch.testing.assert_close(logits(wider), logits(net), rtol=0, atol=1e-5)
    assert wider.config.num_experts_per_tok == 4
    assert wider.config.router_aux_loss_coef == 0.15
    with torch.no_grad():
        before, after = (m(TOKENS, labels=TOKENS) for m in (net, wider))
    torch.testing.assert_close(after.aux_loss, 2 * before.aux_loss)
    torch.testing.assert_close(after.loss, before.loss)


def test_unnormalised_weights_keep_their_sum_with_twice_the_experts(tmp_path):
    net = build("olmoe", norm_topk_prob=False)
    bank = saved(net, tmp_path / "bank")
    wider = grown(bank, tmp_path / "wider", axis="width", noise=0.0, expert_copies=3)
    torch.testing.assert_close(logits(wider), logits(net), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="not normalised"):
        OrthogonalGrowth(axis="width", scale_top_k=False).plan(bank)
    assert {box.name for box in OrthogonalGrowth(axis="width").space(bank).boxes} == {"noise"}


def test_one_expert_a_token_is_kept_exactly(tmp_path):
    net = build("mixtral", num_experts_per_tok=1)
    bank = saved(net, tmp_path / "bank")
    wider = grown(bank, tmp_path / "wider", axis="width", noise=0.0, scale_top_k=False)
    torch.testing.assert_close(logits(wider), logits(net), rtol=0, atol=1e-5)
    assert (wider.config.num_experts_per_tok, wider.config.router_aux_loss_coef) == (1, 0.001)


def test_noise_is_that_of_each_matrix_and_originals_have_none(tmp_path):
    net = build("mixtral", hidden_size=64, intermediate_size=128)
    single = None
    for fused in (False, True):
        bank = saved(net, tmp_path / f"bank-{fused}", save_original_format=not fused)
        operator = OrthogonalGrowth(axis="width", noise=0.1, scale_top_k=True)
        old, new = bank.layout.views(bank.matrix()[-1]), operator.apply(bank, {}).weights()
        if single is not None:
            stem = "model.layers.2.mlp.experts.gate_up_proj"
            assert torch.equal(new[stem][:3], old[stem])
            split = {f"w{1 + 2 * i}.{e}": half for e in range(6) for i, half in enumerate(new[stem][e].chunk(2))}
            assert all(torch.equal(split[name], single[name]) for name in single)
        else:
            stem = "model.layers.2.block_sparse_moe"
            single = {f"{r}.{e}": new[f"{stem}.experts.{e}.{r}.weight"] for r in ("w1", "w3") for e in range(6)}
            for expert in range(3):
                before = old[f"{stem}.experts.{expert}.w2.weight"]
                assert torch.equal(new[f"{stem}.experts.{expert}.w2.weight"], before)
                noise = new[f"{stem}.experts.{expert + 3}.w2.weight"] - before
                assert float(noise.std() / before.std()) == pytest.approx(0.1, rel=0.05)
            router = new[f"{stem}.gate.weight"]
            assert torch.equal(router[:3], old[f"{stem}.gate.weight"])
            assert not torch.equal(router[3:], router[:3])
    quiet = OrthogonalGrowth(axis="width", noise=0.1, scale_top_k=True, noise_router=False).apply(bank, {}).weights()
    router = quiet["model.layers.0.mlp.gate.weight"]
    assert torch.equal(router[3:], router[:3])


def test_both_orders(tmp_path):
    bank = saved(build("mixtral"), tmp_path / "bank")
    fixed = {"axis": "both", "method": "interposition", "copies": 2, "noise": 0.1, "scale_top_k": True}
    deep, wide = (
        OrthogonalGrowth(order=f"{first}_first", **fixed).apply(bank, {}).weights() for first in ("depth", "width")
    )
    name = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    for tensors in (deep, wide):
        assert torch.equal(tensors[name.format(2, 1)], tensors[name.format(3, 1)])  # originals
    assert torch.equal(wide[name.format(2, 4)], wide[name.format(3, 4)])
    assert not torch.equal(deep[name.format(2, 4)], deep[name.format(3, 4)])
    exact = {**fixed, "noise": 0.0, "copy_scale": 0.0}
    both = grown(bank, tmp_path / "both", **exact)
    torch.testing.assert_close(logits(both), logits(build("mixtral")), rtol=0, atol=1e-5)


def test_files_keep_their_dtypes_and_hold_what_a_search_makes(tmp_path):
    net = build("mixtral").to(torch.bfloat16)
    net.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    routers = {name: t.float() for name, t in tensors.items() if name.endswith("gate.weight")}
    save_file(tensors | routers, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    operator = OrthogonalGrowth(axis="both", noise=0.05, scale_top_k=True, copies=[1, 2, 1])
    bank = CheckpointBank.open(tmp_path / "model", storage="streamed")
    done = transform_model(bank, operator, tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    wanted = operator.apply(CheckpointBank.open(tmp_path / "model"), {"method": np.zeros(1)})
    for name, tensor in wanted.weights().items():
        assert made[name].dtype == (torch.float32 if name.endswith("gate.weight") else torch.bfloat16), name
        assert torch.equal(made[name], tensor.to(made[name].dtype)), name
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 6
    assert done.recipe["layers"] == [0, 1, 1, 2]
    assert done.recipe["parameters"] == sum(t.numel() for t in made.values())
    own = {name.removeprefix("model.layers.1."): t for name, t in tensors.items() if ".layers.1." in name}
    assert done.recipe["pieces"][1] == {"places": [1, 2], "norm": pytest.approx(feed_forward_norm(own), rel=1e-4)}
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "orthogonal_growth" in file.metadata()["lcsc_recipe"]
    assert "orthogonal_growth" in (tmp_path / "out/README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_norms_are_means_over_matrices():
    tensors = {
        "mlp.gate.weight": torch.full((2, 4), 9.0),
        "mlp.experts.gate_up_proj": torch.cat([torch.full((2, 3, 4), 1.0), torch.full((2, 3, 4), 2.0)], 1),
        "mlp.experts.down_proj": torch.full((2, 4, 3), 6.0),
        "self_attn.o_proj.weight": torch.full((4, 4), 9.0),
    }
    assert feed_forward_norm(tensors) == 3.0


def test_space_and_baselines(tmp_path):
    bank = saved(build("mixtral"), tmp_path / "bank")
    operator = OrthogonalGrowth(axis="both", num_layers=4, copy_scale=None)
    space = operator.space(bank)
    assert {box.name: box.size for box in space.boxes} == {
        **{"method": 1, "copies": 3, "damping": 3},
        **{"noise": 1, "top_k": 1},
    }
    rows = {row.label: operator.plan(bank, row.point).recipe for row in operator.baselines(bank)}
    assert {label: recipe["layers"] for label, recipe in rows.items()} == {
        "interposition spread, 4 layers": [0, 0, 1, 2],
        "interposition first, 4 layers": [0, 0, 1, 2],
        "interposition last, 4 layers": [0, 1, 2, 2],
        "stack spread, 4 layers": [0, 1, 2, 0],
        "stack first, 4 layers": [0, 1, 2, 0],
        "stack last, 4 layers": [0, 1, 2, 2],
        "zeroed spread, 4 layers": [0, 0, 1, 2],
        "zeroed first, 4 layers": [0, 0, 1, 2],
        "zeroed last, 4 layers": [0, 1, 2, 2],
        "top-k kept, 4 layers": [0, 0, 1, 2],
    }
    assert rows["zeroed last, 4 layers"]["copy_scale"] == [0.0, 0.0, 0.0]
    assert rows["top-k kept, 4 layers"]["num_experts_per_tok"] == 2
    point = space.to_point(np.zeros(space.size))
    point["noise"][:], point["damping"][1], point["copies"][:] = -1.0, 0.25, (-0.5, 0.5, 0.0)
    recipe = operator.plan(bank, point).recipe
    assert recipe["noise"] == pytest.approx(0.001)
    assert (recipe["layers"], recipe["copy_scale"]) == ([0, 1, 1, 2], [1.0, 0.75, 1.0])
    free = OrthogonalGrowth(max_copies=3, method="interposition")
    assert free.plan(bank, {"copies": np.array([-1.0, 0.0, 1.0])}).recipe["layers"] == [0, 1, 1, 2, 2, 2]
    assert OrthogonalGrowth(copies=2, keep_first=1, keep_last=1).plan(bank).recipe["layers"] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis": "length"}, "`operator.axis` is `length`"),
        ({"method": "shuffle"}, "`operator.method` is `shuffle`"),
        ({"copies": [1, 2]}, "`operator.copies` has 2 numbers for 3 layers"),
        ({"copies": [1, 0, 1]}, "`operator.copies` is"),
        ({"copies": [2, 1, 1], "keep_first": 1}, "copies layer 0, and `keep_first`"),
        ({"copies": 2, "num_layers": 4}, "`operator.num_layers` is 4, but `copies`"),
        ({"num_layers": 9}, "`operator.num_layers` is 9; 3 layers, 3 of them up to 2 times, can be 3 to 6"),
        ({"keep_first": 2, "keep_last": 1}, "leave none of the 3 layers"),
        ({"axis": "width"}, "it is dense and grows in depth only"),
        ({"noise": -0.1}, "`operator.noise` is -0.1"),
    ],
)
def test_settings_that_are_refused(llama, settings, message):
    with pytest.raises((ConfigError, BankError), match=message):
        OrthogonalGrowth(**settings).plan(llama)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v3"}, "a router .sigmoid, groups or a bias of its own."),
        ({"model_type": "t5"}, "has an encoder and a decoder"),
        ({"num_hidden_layers": 7}, "weights and config.json must be one save|has layers"),
        ({"per_layer_config": {"0": {}}}, "`per_layer_config` in its configuration"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_models_that_are_refused(llama, change, message):
    bank = copy.copy(llama)
    arch = {**bank.arch, "config": {**bank.arch["config"], **change}}
    object.__setattr__(bank, "arch", arch)
    with pytest.raises(BankError, match=message):
        OrthogonalGrowth().plan(bank)

"""The operator `sparse_upcycling` against transformers' own forward passes, for every family that it knows."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import build
from lcsc.export.transform import transform_model
from lcsc.models.network import build_network, load_network
from lcsc.operators.moments import carry_moments
from lcsc.operators.sparse_upcycling import MAX_NOISE, SparseUpcycling
from lcsc.recycling.dense import VIT, find_dense, names_of
from lcsc.searchers.base import Start, Task

SMALL = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1},
    "eos_token_id": 2,
}
MORE = {"qwen3": {"head_dim": 16}, "llama": {"head_dim": 16, "rope_theta": 5000.0}, "mistral": {"sliding_window": 5}}
TOKENS = torch.arange(24).reshape(2, 12) % 37 + 3


def language_model(kind, **more):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **MORE.get(kind, {}), **more}))
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return net.eval()


def saved(net, folder):
    net.save_pretrained(folder)
    return CheckpointBank.open(folder)


def opened(candidate, folder):
    """The candidate as transformers loads it from its own configuration and tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(candidate.arch["config"]))
    save_file(candidate.weights(), folder / "model.safetensors", metadata={"format": "pt"})
    cls = getattr(transformers, candidate.arch["class"])
    net, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert candidate.recipe["parameters"] == sum(p.numel() for p in net.parameters())
    return net.eval()


@torch.no_grad()
def logits(net):
    return net(TOKENS).logits


def plain(operator, bank):
    """What the operator makes without a search."""
    space = operator.space(bank)
    return operator.apply(bank, space.to_point(np.zeros(space.size)))


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("llama", {"layers": "all"}, "MixtralForCausalLM"),
        ("llama", {"layers": "alternate"}, "Qwen2MoeForCausalLM"),
        ("mistral", {"layers": "all", "top_k": 1}, "MixtralForCausalLM"),
        ("qwen2", {"layers": [0, 3]}, "Qwen2MoeForCausalLM"),
        ("qwen3", {"layers": "last_half", "num_experts": 4, "top_k": 3}, "Qwen3MoeForCausalLM"),
        ("qwen3", {"layers": "all", "groups": 2, "top_k": 4}, "Qwen3MoeForCausalLM"),
        ("llama", {"layers": "all", "groups": 3, "num_experts": 6}, "MixtralForCausalLM"),
    ],
)
def test_a_mixture_of_copies_is_the_dense_model(kind, settings, name, tmp_path):
    net = language_model(kind)
    bank = saved(net, tmp_path / "net")
    made = plain(SparseUpcycling(**{"num_experts": 8, "noise": 0, "drop": 0, **settings}), bank)
    assert made.arch["class"] == name
    again, wanted = opened(made, tmp_path / "made"), logits(net)
    sparse = [i for i, layer in enumerate(again.model.layers) if hasattr(layer.mlp, "experts")]
    assert sparse == made.recipe["layers"]
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-5)
    assert (logits(again) - logits(again.train())).abs().max() == 0  # nothing is drawn
    routers = torch.cat([again.model.layers[i].mlp.gate.weight.flatten() for i in sparse])
    assert float(routers.detach().std()) == pytest.approx(0.02, rel=0.15)
    inactive = (made.recipe["num_experts"] - made.recipe["top_k"]) * 3 * 32 * 24 // settings.get("groups", 1)
    assert made.recipe["active_parameters"] == made.recipe["parameters"] - len(sparse) * inactive


def test_weights_that_are_not_normalized_break_it_and_rescaling_helps(tmp_path):
    net = language_model("qwen3")
    bank, wanted = saved(net, tmp_path / "net"), logits(net)
    fixed = {"layers": "all", "num_experts": 8, "noise": 0, "drop": 0, "normalize": False}
    far, near, exact = (
        float((logits(opened(plain(SparseUpcycling(**fixed, **more), bank), tmp_path / name)) - wanted).abs().max())
        for name, more in (
            ("far", {}),
            ("near", {"rescale": True}),
            ("exact", {"rescale": True, "router_std": 0.0}),  # all probabilities are 1 / E
        )
    )
    assert far > 3 * near > 3000 * exact
    assert exact < 1e-5
    made = opened(plain(SparseUpcycling(**fixed), bank), tmp_path / "again")
    assert made.config.norm_topk_prob is False
    # each token's 2 of 8 weights are near 1/8, so a mixture gives about a quarter of the block
    x = torch.randn(6, 32)
    with torch.no_grad():
        quarter, found = net.model.layers[1].mlp(x) / 4, made.model.layers[1].mlp(x[None])[0]
    torch.testing.assert_close(found, quarter, rtol=0.2, atol=0.2 * float(quarter.std()))


def test_noise_and_dropped_units_have_the_statistics_they_should(tmp_path):
    net = language_model("qwen3", intermediate_size=200, hidden_size=100)
    bank = saved(net, tmp_path / "net")
    dense, names = net.state_dict(), ("gate_proj", "up_proj", "down_proj")
    noisy = plain(SparseUpcycling(layers=[2], num_experts=2, noise=0.3, drop=0), bank).weights()
    dropped = plain(SparseUpcycling(layers=[2], num_experts=2, noise=0, drop=0.25), bank).weights()
    changed = []
    for name in names:
        old = dense[f"model.layers.2.mlp.{name}.weight"]
        first, second = (noisy[f"model.layers.2.mlp.experts.{e}.{name}.weight"] - old for e in (0, 1))
        assert float(first.std()) == pytest.approx(0.3 * float(old.std()), rel=0.03)
        assert abs(float((first * second).mean())) < 0.03 * float(first.var())
        new = dropped[f"model.layers.2.mlp.experts.1.{name}.weight"]
        rows, other = (new.T, old.T) if name == "down_proj" else (new, old)
        units = (rows != other).any(1)
        changed.append(units)
        assert int(units.sum()) == 50
        assert torch.equal(rows[~units], other[~units])
        assert float(rows[units].std()) == pytest.approx(float(other[units].std()), rel=0.03)
        assert float(rows[units].mean()) == pytest.approx(float(other[units].mean()), abs=0.03 * float(other.std()))
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    other = dropped["model.layers.2.mlp.experts.0.up_proj.weight"] != dense["model.layers.2.mlp.up_proj.weight"]
    assert not torch.equal(other.any(1), changed[1])
    again = plain(SparseUpcycling(layers=[2], num_experts=2, noise=0, drop=0.25), bank).weights()
    assert all(torch.equal(again[name], dropped[name]) for name in again)


@pytest.mark.parametrize("layers", ["all", "alternate"])
def test_t5_becomes_a_switch_transformer(layers, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 4, "num_decoder_layers": 2}
    net = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4)).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    bank = saved(net, tmp_path / "net")
    fixed = {"num_experts": 4, "noise": 0, "drop": 0, "layers": layers}
    with torch.no_grad():
        wanted = net(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        off = []
        for std in (0.0, 0.02):
            made = opened(plain(SparseUpcycling(**fixed, router_std=std), bank), tmp_path / f"made-{std}")
            off.append(float((made(input_ids=TOKENS, decoder_input_ids=TOKENS).logits - wanted).abs().max()))
    assert off[0] < 1e-5 < off[1] < 0.2 * float(wanted.abs().max())
    sparse = [block.layer[-1].is_sparse for stack in (made.encoder, made.decoder) for block in stack.block]
    assert sparse == ([True] * 6 if layers == "all" else [False, True] * 3)
    with pytest.raises(ConfigError, match=r"\[2, 3\] of the 4 encoder layers, and SwitchTransformers can only say all"):
        SparseUpcycling(layers="last_half").plan(bank)
    with pytest.raises(ConfigError, match="`operator.normalize` is true, and `SwitchTransformersFor"):
        SparseUpcycling(normalize=True).plan(bank)
    with pytest.raises(ConfigError, match="gives a token 1 expert"):
        SparseUpcycling(top_k=2).plan(bank)
    free = SparseUpcycling(num_experts=2, noise=0, drop=0)
    assert [b.family for b in free.baselines(bank)] == ["all", "alternate"]
    assert [free.plan(bank, b.point).recipe["layers"] for b in free.baselines(bank)] == [[0, 1, 2, 3, 4, 5], [1, 3, 5]]


def vit(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5, **more)
    net = transformers.ViTForImageClassification(config).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return net


@torch.no_grad()
def test_experts_of_a_vision_transformer_choose_their_tokens(tmp_path):
    net = vit()
    net.save_pretrained(tmp_path / "net")
    bank, images = CheckpointBank.open(tmp_path / "net", storage="streamed"), torch.randn(3, 3, 16, 16)
    wanted = net(images).logits
    transform_model(bank, SparseUpcycling(layers="last_half", num_experts=4, top_k=4), tmp_path / "every")
    every = load_network(tmp_path / "every")
    torch.testing.assert_close(every(images).logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(every(images[:1]).logits, wanted[:1], rtol=0, atol=1e-5)
    assert [layer.mixture is not None for layer in every.vit["encoder"]["layer"]] == [False, False, True, True]
    transform_model(bank, SparseUpcycling(layers=[3], num_experts=4, top_k=1), tmp_path / "few")
    few = load_network(tmp_path / "few")
    layer, x_NTD = few.vit["encoder"]["layer"][3], torch.randn(2, 17, 16)
    dense = every.vit["encoder"]["layer"][3].mixture.experts[0]
    out = layer.mixture(x_NTD)
    probs = torch.softmax(x_NTD @ layer.mixture.router.weight.T, -1)
    taken = torch.zeros(2, 17, dtype=bool)
    for n in range(2):
        for e in range(4):
            best = sorted(range(17), key=lambda t, n=n, e=e: -float(probs[n, t, e]))[:4]  # round(1 * 17 / 4)
            taken[n, best] = True
    assert 0 < int((~taken).sum()) < 30
    assert not out[~taken].any()
    torch.testing.assert_close(out[taken], dense(x_NTD)[taken])
    again = CheckpointBank.open(tmp_path / "few")
    assert again.arch["class"] == "MixtureViT"
    assert sum(p.numel() for p in build_network(again.arch).parameters()) == again.layout.num_parameters


def test_what_cannot_become_a_mixture_is_refused_by_name(tmp_path):
    def other(kind, **sizes):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))

    t5 = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    gated = transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, feed_forward_proj="gated-gelu"))
    for kind, net, text in (
        ("mixtral", other("mixtral", **SMALL, num_local_experts=2), "is a mixture already"),
        ("gpt2", other("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=8), "has no mixture class of its form"),
        ("bias", language_model("llama", attention_bias=True), "Mixtral has no biases"),
        ("mlp", language_model("llama", mlp_bias=True), "which no expert of its mixture has"),
        ("window", language_model("qwen3", use_sliding_window=True), "which its mixture class reads otherwise"),
        ("t5", gated, "those of the first T5"),
        ("vit", vit(hidden_act="gelu_new"), "with one of the activations"),
    ):
        with pytest.raises(BankError, match=re.escape(text)):
            SparseUpcycling().plan(saved(net, tmp_path / kind))
    mistral = saved(language_model("mistral"), tmp_path / "mistral")
    with pytest.raises(ConfigError, match="`sliding_window` 5: Mixtral makes every layer a mixture"):
        SparseUpcycling(layers=[1]).plan(mistral)
    qwen = saved(language_model("qwen3"), tmp_path / "qwen3")
    for settings, text in (
        ({"layers": [4]}, "the model has layers 0 to 3"),
        ({"top_k": 9}, "`operator.top_k` is 9 of 8 experts"),
        ({"groups": 5, "num_experts": 10, "top_k": 5}, "must divide the 24 units of a block"),
        ({"groups": 2, "top_k": 3}, "and `top_k` 3"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            SparseUpcycling(**settings).plan(qwen)
    for settings, text in (
        ({"layers": "first"}, "`operator.layers` is `first`"),
        ({"layers": [1, 1]}, "give one of"),
        ({"layers": "all", "num_sparse": 2}, "`layers` fixes them"),
        ({"drop": 1.5}, "`operator.drop` is 1.5"),
        ({"rescale": True}, "which is for `normalize=false`"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            SparseUpcycling(**settings)
    with pytest.raises(ConfigError, match="Mixtral always divides by the sum"):
        SparseUpcycling(normalize=False).plan(mistral)


def test_heads_that_the_mixture_lacks_and_choices_of_no_layer_are_refused(tmp_path):
    sizes = AutoConfig.for_model("qwen3", **SMALL, head_dim=16)
    for make, name in (
        (AutoModel, "Qwen3Model"),
        (transformers.AutoModelForSequenceClassification, "Qwen3ForSequenceClassification"),
    ):
        bank = saved(make.from_config(sizes), tmp_path / name)
        with pytest.raises(BankError, match=f"is a `{name}`, whose head its mixture does not have. Give a model of"):
            SparseUpcycling().plan(bank)
    one = saved(language_model("llama", num_hidden_layers=1), tmp_path / "one")
    with pytest.raises(ConfigError, match="`operator.layers` is `alternate`, which is none of the model's 1"):
        SparseUpcycling(layers="alternate").plan(one)
    recipe = SparseUpcycling(layers=[0], num_experts=1).plan(one).recipe  # a token's two experts are one here
    assert (recipe["top_k"], recipe["num_experts"]) == (1, 1)


def test_every_tensor_keeps_the_dtype_of_what_it_is_a_copy_of(tmp_path):
    language_model("llama").save_pretrained(tmp_path / "net")
    tensors = load_file(tmp_path / "net/model.safetensors")
    half = {name: t.to(torch.bfloat16) for name, t in tensors.items() if "down_proj" in name}
    save_file(tensors | half, tmp_path / "net/model.safetensors", metadata={"format": "pt"})
    bank = CheckpointBank.open(tmp_path / "net", storage="streamed")
    transform_model(bank, SparseUpcycling(layers=[1, 3], num_experts=2), tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    assert {name for name, t in made.items() if t.dtype == torch.bfloat16} == {n for n in made if "down_proj" in n}
    assert sum("experts.1.down_proj" in name for name in made) == 2


def test_a_search_varies_layers_experts_noise_and_drop(tmp_path):
    bank = saved(language_model("qwen3"), tmp_path / "net")
    free = SparseUpcycling()
    space = free.space(bank)
    assert [(box.name, box.size) for box in space.boxes] == [("layers", 4), ("experts", 1), ("noise", 1), ("drop", 1)]
    point = space.to_point(np.zeros(7))
    recipe = free.plan(bank, point).recipe
    assert [recipe[key] for key in ("layers", "num_experts", "noise", "drop")] == [[0, 1, 2, 3], 8, 0.0, 0.0]
    point["layers"][:] = [0.1, -0.2, 0.0, -0.9]
    point["experts"][:], point["noise"][:], point["drop"][:] = -1.0, MAX_NOISE, 0.5
    recipe = free.plan(bank, point).recipe
    assert [recipe[key] for key in ("layers", "num_experts", "noise", "drop")] == [[0, 2], 2, MAX_NOISE, 0.5]
    point["layers"][:] = -0.5
    assert free.plan(bank, point).recipe["layers"] == [0]  # one at least
    half = SparseUpcycling(num_sparse=2, num_experts=4, noise=0, drop=0)
    assert [b.family for b in half.baselines(bank)] == ["alternate", "last_half"]
    assert [half.plan(bank, b.point).recipe["layers"] for b in half.baselines(bank)] == [[1, 3], [2, 3]]
    assert half.plan(bank, {"layers": np.array([0.3, -0.1, 0.2, 0.25])}).recipe["layers"] == [0, 3]
    begin = half.space(bank).to_vector(half.baselines(bank)[0].point)
    session = build("searcher", "cma").start(Task(half.space(bank), 12, 0, (Start(begin, 1.0, "alternate"),)))
    tried = []
    for _ in range(12):
        proposal = session.ask()
        tried.append(tuple(half.plan(bank, half.space(bank).to_point(proposal.vector)).recipe["layers"]))
        session.tell(proposal.uid, 1.0)
    assert len(set(tried)) >= 4  # of 6: it does not stay where it began
    # a search over a Llama stays in one class, whichever layers it tries
    llama = saved(language_model("llama"), tmp_path / "llama")
    classes = {free.apply(llama, {**point, "layers": np.full(4, x)}).arch["class"] for x in (-0.5, 0.5)}
    assert classes == {"Qwen2MoeForCausalLM"}


def test_the_folder_has_the_operators_bits_in_the_models_dtype(tmp_path):
    net = language_model("qwen3").to(torch.bfloat16)
    net.save_pretrained(tmp_path / "net", max_shard_size="8KB")
    operator = SparseUpcycling(layers="alternate", num_experts=4, noise=0.1, drop=0.5)
    bank = CheckpointBank.open(tmp_path / "net", storage="streamed")
    done = transform_model(bank, operator, tmp_path / "out", max_shard_size="16KB")
    assert done.recipe["class"] == "Qwen3MoeForCausalLM"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (again.dtype, again.config.norm_topk_prob, again.config.mlp_only_layers) == (torch.bfloat16, True, [0, 2])
    assert not hasattr(again.config, "max_window_layers")  # the dense class's alone
    written = CheckpointBank.open(tmp_path / "out")
    dense = CheckpointBank.open(tmp_path / "net")
    views, made = written.layout.views(written.matrix()[-1].float()), operator.apply(dense, {}).weights()
    kept = {name for name in made if "experts" not in name and ".gate." not in name}
    assert set(views) == set(made)
    old = dense.layout.views(dense.matrix()[-1].float())
    assert all(torch.equal(views[name], old[name]) for name in kept)
    for name in set(made) - kept:  # drawn in bfloat16 here, in float32 there
        torch.testing.assert_close(views[name], made[name], rtol=0.02, atol=0.02 * float(made[name].std()))
    assert "Nothing was trained or scored" in (tmp_path / "out" / "README.md").read_text()
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "Qwen3MoeModel"


def test_moments_of_an_optimizer_go_with_the_copies(tmp_path):
    """Adam's next step of an expert that gets its block's gradient is the step of the block."""
    net = vit()
    bank = saved(net, tmp_path / "net")
    dense = bank.layout.views(bank.matrix()[-1].clone())
    before = {name: torch.nn.Parameter(tensor) for name, tensor in dense.items()}
    adam = torch.optim.Adam(before.values(), lr=0.1)
    for _ in range(3):
        for p in before.values():
            p.grad = torch.randn_like(p)
        adam.step()
    plan = SparseUpcycling(layers=[1], num_experts=2, top_k=2).plan(bank)
    states = carry_moments(plan, {name: adam.state[p] for name, p in before.items()})
    names = {e: names_of(VIT, "vit.encoder.layer.1", e) for e in (0, 1)}
    block = find_dense(bank.arch, bank.layout.shapes, "").blocks[1]
    assert set(plan.shapes(bank.layout.shapes)) - set(states) == {"vit.encoder.layer.1.mixture.router.weight"}
    for role, old in block.items():
        twin = torch.nn.Parameter(before[old].detach().clone())
        other = torch.optim.Adam([twin], lr=0.1)
        other.state[twin] = states[names[1][role]]
        before[old].grad = twin.grad = torch.randn_like(twin)
        for p in before.values():
            p.grad = p.grad if p is before[old] else None
        adam.step()
        other.step()
        assert torch.equal(twin, before[old])
    with pytest.raises(ConfigError, match="this plan has {'noise': 0.1}"):
        carry_moments(SparseUpcycling(layers=[1], noise=0.1).plan(bank), {})
    with pytest.raises(ConfigError, match="the optimizer has no state of `vit.encoder.layer.1"):
        carry_moments(plan, {})

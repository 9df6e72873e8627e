"""The operator `neighbor_recovery` against the paper's formula written out in numpy, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.transform import transform_model
from lcsc.operators.neighbor_recovery import NeighborRecovery
from lcsc.operators.surgery import told
from lcsc.recycling.rebuild import RULES
from lcsc.recycling.stages import FAMILIES, NORMS, blended, neighbours, norm_weights, route

SMALL = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
MORE = {
    **{
        "gpt2": {"n_embd": 8, "n_layer": 4, "n_head": 2, "n_positions": 16},
        "opt": {"ffn_dim": 8, "word_embed_proj_dim": 8},
    },
    **{"mixtral": {"num_local_experts": 2}, "olmoe": {"num_experts": 2, "num_experts_per_tok": 1}},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
}
TOKENS = torch.arange(12).reshape(2, 6) + 3


def build(kind="llama", seed=0, **more):
    torch.manual_seed(seed)
    heads = {"num_key_value_heads": 2} | ({"head_dim": 4} if "gemma" in kind or "qwen3" in kind else {})
    sizes = {**SMALL, **heads, "max_position_embeddings": 16, "pad_token_id": 0, **MORE.get(kind, {}), **more}
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for p in net.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 4 layers."""
    to = tmp_path_factory.mktemp("llama") / "net"
    build().save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def bank(folder):
    return CheckpointBank.open(folder)


def layer(weights, i):
    head = f"model.layers.{i}."
    return {name[len(head) :]: t for name, t in weights.items() if name.startswith(head)}


def test_the_weights_follow_the_paper_and_not_its_misprint(bank):
    old = bank.layout.views(bank.matrix()[-1])
    # Algorithm 1 prints the weight of the previous stage before both terms; the text's equation is the right one
    for first, second, power in ((9, 3, 1), (9, 3, 2), (0, 3, 1), (1, 3, 0)):
        norms = [7, first, 8, second]
        made = NeighborRecovery(lost=2, rule="checkfree", grad_norms=norms, norm_power=power).apply(bank, {}).weights()
        for role, x in layer(made, 2).items():
            a, b = (layer(old, i)[role].double().numpy() for i in (1, 3))
            wanted = (first**power * a + second**power * b) / (first**power + second**power)
            np.testing.assert_allclose(x.numpy(), wanted.astype(np.float32), rtol=0, atol=1e-7)
    assert norm_weights([3, 1]) == (0.75, 0.25)
    assert norm_weights([3, 1], 2) == pytest.approx((0.9, 0.1))
    assert norm_weights([0, 1]) == (0, 1)
    assert norm_weights([0, 0]) == norm_weights([5, 1], 0) == (0.5, 0.5)


def test_every_rule_and_what_stays(bank):
    old = bank.layout.views(bank.matrix()[-1])
    for rule, source in (("copy_previous", 0), ("copy_next", 2)):
        made = NeighborRecovery(lost=1, rule=rule).apply(bank, {})
        assert all(torch.equal(x, layer(old, source)[role]) for role, x in layer(made.weights(), 1).items())
    ends = NeighborRecovery(lost=[0, 3], rule="checkfree_plus", grad_norms=[1, 2, 3, 4]).apply(bank, {})
    for lost, source in ((0, 1), (3, 2)):
        assert all(torch.equal(x, layer(old, source)[role]) for role, x in layer(ends.weights(), lost).items())
    assert ends.recipe["train_on"] == {"fresh_optimizer_for_layers": [0, 3], "lr_factor": 1.1}
    assert (ends.recipe["weights"], ends.recipe["rule"]) == ([[1.0], [1.0]], "checkfree_plus")
    fresh = NeighborRecovery(lost=1, rule="random", seed=3)
    one, two = (layer(fresh.apply(bank, {}).weights(), 1) for _ in range(2))
    assert all(torch.equal(one[role], two[role]) for role in one)
    assert torch.equal(one["input_layernorm.weight"], torch.ones(8))
    assert float(one["mlp.down_proj.weight"].std()) == pytest.approx(0.02, rel=0.3)
    for made in (ends.weights(), fresh.apply(bank, {}).weights()):
        kept = [name for name in old if not any(f"layers.{i}." in name for i in (0, 1, 3))]
        assert kept
        assert all(torch.equal(made[name], old[name]) for name in kept)


def test_two_lost_stages_share_a_neighbour_and_stages_have_layers(bank):
    old = bank.layout.views(bank.matrix()[-1])
    made = NeighborRecovery(lost=[0, 2]).apply(bank, {}).weights()
    for role, x in layer(made, 2).items():
        torch.testing.assert_close(x, (layer(old, 1)[role] + layer(old, 3)[role]) / 2, rtol=0, atol=1e-7)
    assert all(torch.equal(x, layer(old, 1)[role]) for role, x in layer(made, 0).items())
    made = NeighborRecovery(lost=1, num_stages=2, rule="copy_previous").apply(bank, {}).weights()
    for i in (2, 3):
        assert all(torch.equal(x, layer(old, i - 2)[role]) for role, x in layer(made, i).items())


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_skipped_stage_does_nothing_in_every_family(kind, tmp_path):
    net = build(kind)
    net.save_pretrained(tmp_path / "net")
    made = NeighborRecovery(lost=1, rule="skip")
    transform_model(CheckpointBank.open(tmp_path / "net", storage="streamed"), made, tmp_path / "out")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    blocks = (
        getattr(net, "transformer", None) or getattr(net, "gpt_neox", None) or getattr(net.model, "decoder", net.model)
    )
    blocks = blocks.h if kind == "gpt2" else blocks.layers
    blocks[1].forward = lambda hidden, *_, **__: hidden  # the stage left out
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(TOKENS).logits, net(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_lost_stage_may_be_full_of_nan_or_missing(folder, tmp_path):
    wanted = NeighborRecovery(lost=1).apply(CheckpointBank.open(folder), {}).weights()
    for how in ("nan", "missing"):
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if "layers.1." in name]:
            tensors[name] = torch.full_like(tensors[name], torch.nan)
            if how == "missing":
                del tensors[name]
        (tmp_path / how).mkdir()
        (tmp_path / how / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / how / "model.safetensors")
        done = transform_model(
            CheckpointBank.open(tmp_path / how, storage="streamed"), NeighborRecovery(lost=1), tmp_path / f"{how}-out"
        )
        assert done.recipe["lost"] == [1]
        found = load_file(tmp_path / f"{how}-out" / "model.safetensors")
        assert set(found) == set(wanted)
        assert all(t.dtype == torch.bfloat16 for t in found.values())
        for name, t in found.items():
            torch.testing.assert_close(t.float(), wanted[name], rtol=0.01, atol=0.01)


def test_the_space_holds_the_rules_and_its_derivative_is_exact(bank):
    operator = NeighborRecovery(lost=[1, 3], grad_norms=[1, 2, 3, 4])
    space = operator.space(bank)
    assert [(box.name, box.size) for box in space.boxes] == [("weights", 3), ("scale", 2), ("random", 2)]
    rows = {row.label: row.point for row in operator.baselines(bank)}
    assert set(rows) == set(RULES) - {"checkfree", "copy_next"}  # stage 3 has no next one
    for rule, point in rows.items():
        told = {} if "checkfree" not in rule else {"grad_norms": [1, 2, 3, 4]}
        wanted = NeighborRecovery(lost=[1, 3], rule=rule, **told).apply(bank, {}).weights()
        made = operator.apply(bank, point).weights()
        assert all(torch.equal(made[name], wanted[name]) for name in wanted), rule
    rng = np.random.default_rng(0)
    at = rng.uniform(0.2, 0.8, space.size)
    grad_P = torch.from_numpy(rng.standard_normal(bank.layout.num_parameters)).float()
    made = space.to_vector(operator.pull_back(bank, space.to_point(at), grad_P))

    def value(vector):
        out_P = torch.empty(bank.layout.num_parameters)
        operator.apply(bank, space.to_point(vector)).write(out_P)
        return float(out_P.double() @ grad_P.double())

    for i, unit in enumerate(0.05 * np.eye(space.size)):  # linear in each number alone, so the difference is exact
        assert (value(at + unit) - value(at - unit)) / 0.1 == pytest.approx(made[i], rel=1e-4, abs=1e-4)


def test_orders_of_stages():
    assert route(4) == (0, 1, 2, 3)
    assert route(4, swapped=True) == (1, 0, 3, 2)
    assert route(6, swapped=True) == (1, 0, 2, 3, 5, 4)
    assert route(12, swapped=True) == (1, 0, *range(2, 10), 11, 10)
    assert [neighbours(s, 3) for s in range(3)] == [(1,), (0, 2), (1,)]
    with pytest.raises(ConfigError, match="there are 3"):
        route(3, swapped=True)
    x, y = torch.tensor([1.0, torch.inf]), torch.tensor([3.0, 5.0])
    assert torch.equal(blended([x, y], (0.0, 1.0)), y)  # what weighs nothing is not read


def test_norms_that_lie_beside_the_checkpoint_are_found(bank, tmp_path):
    place = bank.rows[-1].files[0].parent / NORMS
    assert NeighborRecovery(lost=1).plan(bank).recipe["rule"] == "average"
    assert NeighborRecovery(lost=1).other_checkpoints(bank) == {}
    place.write_text(json.dumps({"step": 7, "layers": [3, 4, 12, 5]}))
    try:
        found = NeighborRecovery(lost=1)
        plan = found.plan(bank)
        assert (plan.recipe["rule"], plan.recipe["grad_norms"]) == ("checkfree_plus", [3, 4, 12, 5])
        assert plan.recipe["weights"] == [[3 / 15, 12 / 15]]
        assert told(found, None, plan)["settings"]["grad_norms"] == [3, 4, 12, 5]  # what verifies it needs no file
        assert {"checkfree", "checkfree_plus"} <= {row.label for row in found.baselines(bank)}
        halves = NeighborRecovery(lost=1, num_stages=2).plan(bank).recipe
        assert halves["grad_norms"] == [5, 13]  # roots of sums of squares
        (digest,) = found.other_checkpoints(bank).values()
        place.write_text(json.dumps({"layers": [3, 4, 12, 6]}))
        assert list(found.other_checkpoints(bank).values()) != [digest]
        assert NeighborRecovery(lost=1, grad_norms=[1, 1, 1, 1]).other_checkpoints(bank) == {}
        for layers in ([1, 2], [1, 2, 3, "x"], [1, 2, 3, -1]):
            place.write_text(json.dumps({"layers": layers}))
            with pytest.raises(ConfigError, match=r"list of 4 numbers under `layers`|a gradient's norm is"):
                found.plan(bank)
    finally:
        place.unlink()


def test_refusals_are_one_sentence(bank, tmp_path):
    (tmp_path / "norms.json").write_text(json.dumps({"grad_norms": [1, 2]}))
    for settings, text in (
        ({"lost": -1}, "`operator.lost` is `-1`"),
        ({"lost": [1, 1]}, "`operator.lost` is `[1, 1]`"),
        ({"lost": 4}, "the model has stages 0 to 3"),
        ({"lost": [1, 2]}, "has the neighbours 1 and 2"),
        ({"lost": 1, "num_stages": 3}, "4 layers cannot be divided into 3 equal stages. Choose one of [2, 4]"),
        ({"lost": 1, "rule": "copy"}, "`operator.rule` is `copy`"),
        ({"lost": 1, "rule": "checkfree"}, "`operator.grad_norms` is not set"),
        ({"lost": 0, "rule": "checkfree", "grad_norms": [1, 2, 3, 4]}, "stage 0 is at an end"),
        ({"lost": 0, "rule": "copy_previous"}, "stage 0 has no such neighbour"),
        ({"lost": 1, "grad_norms": [1, 2]}, "must be a list of 4 numbers"),
        ({"lost": 1, "grad_norms": [1, -2, 3, 4]}, "a gradient's norm is"),
        ({"lost": 0, "grad_norms": str(tmp_path / "norms.json")}, "norms.json` must be a list of 4 numbers"),
        ({"lost": 0, "grad_norms": str(tmp_path / "none.json")}, "cannot be read as JSON"),
        ({"lost": 0, "weights": [1, 0]}, "weighs stage -1"),
        ({"lost": 1, "weights": [1]}, "give [previous, next]"),
        ({"lost": 1, "weights": [1, 0], "rule": "skip"}, "which has weights of its own"),
        ({"lost": 1, "lr_factor": 0.0}, "the factor above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            NeighborRecovery(**settings).plan(bank)
        assert text in str(caught.value), settings
    build(num_hidden_layers=1).save_pretrained(tmp_path / "one")
    with pytest.raises(BankError, match="has one layer, and a lost stage is rebuilt from others"):
        NeighborRecovery(lost=0).plan(CheckpointBank.open(tmp_path / "one"))
    build(num_hidden_layers=2).save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "two" / "config.json").read_text()), "num_hidden_layers": 4})
    )
    with pytest.raises(BankError, match="lacks layer 2, whose stage is not in `operator.lost`"):
        NeighborRecovery(lost=3).plan(CheckpointBank.open(tmp_path / "two"))

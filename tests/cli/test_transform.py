"""`lcsc transform`: one model in, another architecture out that transformers opens."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lcsc.bank import CheckpointBank
from lcsc.models.network import load_network
from lcsc.operators.gqa import Gqa

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more}))


@pytest.fixture
def model(here):
    llama().to(torch.bfloat16).save_pretrained(here / "model", max_shard_size="8KB")
    (here / "model" / "tokenizer.json").write_text("{}")
    return here / "model"


def ok(lcsc, *words):
    code, out, err = lcsc("transform", "operator=gqa", *words)
    assert code == 0, err
    return out


def bits(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_opens_and_holds_the_operators_numbers(here, lcsc, model, tied):
    llama(tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(here / "one")
    before = {path.name: path.read_bytes() for path in (here / "one").iterdir()}
    ok(lcsc, "model=one", "to=out", "operator.num_kv_heads=2", "operator.grouping=similarity")
    assert {path.name: path.read_bytes() for path in (here / "one").iterdir()} == before
    net, info = AutoModelForCausalLM.from_pretrained(here / "out", output_loading_info=True)
    assert not any(info.values())
    assert (net.config.num_key_value_heads, net.dtype) == (2, torch.bfloat16)
    operator = Gqa(num_kv_heads=2, pooling="aligned", grouping="similarity")
    wanted = operator.apply(CheckpointBank.open(here / "one"), {})
    found, old = bits(here / "out"), bits(here / "one")
    assert set(found) == set(old)
    for name, tensor in wanted.weights().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
        if not any(part in name for part in HEADS):
            assert torch.equal(found[name], old[name])
    changed = json.loads((here / "out" / "config.json").read_text())
    config = json.loads((here / "one" / "config.json").read_text())
    assert changed == {**config, "num_key_value_heads": 2}
    assert net.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_shards_recipe_card_and_tokenizer(here, lcsc, model):
    out = ok(lcsc, f"model={model}", "to=out", "operator.num_kv_heads=[1,2]", "max_shard_size=4KB")
    files = sorted((here / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert (here / "out" / "tokenizer.json").read_text() == "{}"
    assert "copied: generation_config.json, tokenizer.json" in out
    # 2 layers: 1 + 2 heads of 8 numbers, keys and values, 2 bytes; stored with 2 heads each
    assert "cache: 96 bytes a token with [1, 2] key/value heads by layer" in out
    assert "heads are repeated to 2 and its cache takes 128 bytes a token" in out
    with safe_open(files[0], framework="pt") as handle:
        recipe = json.loads(handle.metadata()["lcsc_recipe"])
    assert (recipe["operator"], recipe["num_kv_heads"], recipe["stored_kv_heads"]) == ("gqa", [1, 2], 2)
    assert (recipe["cache_bytes_per_token"], recipe["stored_cache_bytes_per_token"]) == (96, 128)
    assert recipe["pieces"] == [{"groups": [[0, 1, 2, 3]]}, {"groups": [[0, 1], [2, 3]]}]
    assert recipe["parents"] == [dict(CheckpointBank.open(model).parent(0))]
    card = ModelCard.load(here / "out" / "README.md")
    assert card.data.tags == ["lcsc", "gqa"]
    assert "lcsc transform operator=gqa" in card.text
    assert "| num_kv_heads | [1, 2] |" in card.text
    assert AutoModelForCausalLM.from_pretrained(here / "out").config.num_key_value_heads == 2


def test_all_heads_change_no_bit(here, lcsc, model):
    ok(lcsc, f"model={model}", "to=out", "operator.num_kv_heads=4")
    old, new = bits(model), bits(here / "out")
    assert set(old) == set(new)
    assert all(torch.equal(new[name].view(torch.int16), old[name].view(torch.int16)) for name in old)
    assert (here / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("pooling", ["aligned", "random"])
def test_the_recipe_makes_the_same_bits_again(here, lcsc, model, pooling):
    for to in ("out", "again"):
        ok(lcsc, f"model={model}", f"to={to}", "operator.num_kv_heads=[1,2]", f"operator.pooling={pooling}")
    assert (here / "out" / "model.safetensors").read_bytes() == (here / "again" / "model.safetensors").read_bytes()
    with safe_open(here / "out" / "model.safetensors", framework="pt") as handle:
        recipe = json.loads(handle.metadata()["lcsc_recipe"])
    same = {key: recipe[key] for key in ("num_kv_heads", "pooling", "grouping", "seed")}
    weights = Gqa(**same).apply(CheckpointBank.open(recipe["bank"]["path"]), {}).weights()
    found = bits(here / "out")
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in weights.items())


def test_a_step_of_several(here, lcsc):
    for step in (10, 20):
        llama(step).save_pretrained(here / "bank" / f"checkpoint-{step}")
    ok(lcsc, "model=bank", "to=out", "operator.num_kv_heads=2", "operator.step=10")
    name = "model.embed_tokens.weight"
    assert torch.equal(bits(here / "out")[name], llama(10).state_dict()[name])


def edited(config, **changes):
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def test_mistakes_are_one_sentence_and_leave_nothing(here, lcsc, model, capsys):
    broken = llama()
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(here / "broken")
    other = llama()
    other.model.norm.weight.data[0] = torch.inf
    other.save_pretrained(here / "other")
    (here / "taken").mkdir()
    llama().save_pretrained(here / "unnamed")
    edited(here / "unnamed" / "config.json", architectures=None)
    llama().save_pretrained(here / "short")
    edited(here / "short" / "config.json", layer_types=["full_attention"])
    before = sorted(path.name for path in here.iterdir())
    capsys.readouterr()  # transformers' bars
    gqa, two = ("operator=gqa", f"model={model}"), "operator.num_kv_heads=2"
    for words, text in (
        ((*gqa, "to=taken", two), "output `taken` exists already"),
        ((*gqa, f"to={model}/out", two), "inside the bank"),
        ((*gqa, "to=out"), "`operator.num_kv_heads` is not set"),
        ((*gqa, "to=out", "operator.num_kv_heads=3"), "cannot be divided into 3 equal groups. Choose one of (1, 2, 4)"),
        ((*gqa, "to=out", "operator.heads=3"), "no setting named `operator.heads`"),
        ((*gqa, "to=out", two, "operator.step=x"), "`operator.step` is `x`; it must be a whole number."),
        ((*gqa, "to=out", two, "operator.repeat_heads=2.5"), "`operator.repeat_heads` is `2.5`; it must be true"),
        ((*gqa, two), "`to` is not set"),
        ((f"model={model}", "to=out"), "`operator` is not set"),
        (
            ("operator=linear", f"model={model}", "to=out"),
            "`linear` combines checkpoints; `lcsc transform` takes one of",
        ),
        (("operator=gqq", f"model={model}", "to=out"), "no operator named `gqq`. Did you mean `gqa`"),
        (("operator=gqa", "model=broken", "to=out", two), "`model.layers.1.self_attn.k_proj.weight` holds NaN or Inf"),
        (("operator=gqa", "model=other", "to=out", two), "`model.norm.weight`"),
        (("operator=gqa", "model=unnamed", "to=out", two), "config.json` names no class (`architectures`"),
        (
            ("operator=orthogonal_growth", "model=short", "to=out"),
            "transformers refuses the configuration of a `llama`",
        ),
    ):
        code, _, err = lcsc("transform", *words)
        assert code == 2, words
        assert text in err
        assert err.count("\n") == 1
        assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize("settings", [(), ("operator.repeat_heads=false", "operator.grouping=similarity")])
def test_verify_makes_it_again_and_finds_what_was_changed(here, lcsc, model, settings):
    ok(lcsc, f"model={model}", "to=out", "operator.num_kv_heads=[1,2]", "max_shard_size=4KB", *settings)
    code, out, err = lcsc("verify", "out")
    assert code == 0, err
    assert "bit for bit from 1 checkpoints of" in out
    file = next(f for f in sorted((here / "out").glob("*.safetensors")) if any("o_proj" in n for n in load_file(f)))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    whole = file.read_bytes()
    file.write_bytes(data)
    code, _, err = lcsc("verify", "out")
    assert code == 2
    assert "is not what the recipe gives, and the checkpoints are unchanged" in err
    file.write_bytes(whole)
    config = here / "out" / "config.json"
    config.write_text(config.read_text() + " ")
    code, _, err = lcsc("verify", "out")
    assert code == 2
    assert "config.json` is not the one that was written" in err
    llama(1).to(torch.bfloat16).save_pretrained(model, max_shard_size="8KB")
    config.write_text(config.read_text()[:-1])
    code, _, err = lcsc("verify", "out")
    assert code == 2
    assert "changed since `out` was made of it" in err


def test_layers_keep_their_own_heads_where_asked(here, lcsc, model):
    out = ok(lcsc, f"model={model}", "to=out", "operator.num_kv_heads=[1,4]", "operator.repeat_heads=false")
    # 2 layers: 1 + 4 heads of 8 numbers, keys and values, 2 bytes
    assert "cache: 160 bytes a token with [1, 4] key/value heads by layer" in out
    assert "only lcsc opens" in out
    ok(lcsc, f"model={model}", "to=repeated", "operator.num_kv_heads=[1,4]")
    own, repeated = load_network(here / "out"), load_network(here / "repeated")
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in own.model.layers] == [8, 32]
    ids = torch.arange(12)[None]
    torch.testing.assert_close(own(ids).logits, repeated(ids).logits, rtol=0, atol=1e-6)
    assert "from lcsc.models.network import load_network" in (here / "out" / "README.md").read_text()


def test_what_was_made_is_trained_on_without_being_described_again(here, lcsc):
    llama(vocab_size=256).save_pretrained(here / "model")
    ok(lcsc, "model=model", "to=out", "operator.num_kv_heads=[1,4]", "operator.repeat_heads=false")
    small = ["trainer.num_steps=1", "trainer.save_every=1", "trainer.batch_size=1", "trainer.block_length=8"]
    words = ["trainer=causal_lm", "trainer.start=out", "dataset=text", "name=more", "bank.path=bank", "quiet=true"]
    code, _, err = lcsc("train", *words, *small)
    assert code == 0, err
    before, after = load_network(here / "out"), load_network(here / "bank" / "checkpoint-000001")
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in after.model.layers] == [8, 32]
    moved = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(moved) <= 1.1e-3  # one step of AdamW at a rate of 1e-3

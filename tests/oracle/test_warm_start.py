"""The operator `warm_start` against transformers' own models and forward passes, and the paper's numbers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers_warm import GPT, SIZES, live, model, saved
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank, Selection
from lcsc.core.errors import BankError, ConfigError
from lcsc.models.flat import distinct_tensors
from lcsc.models.network import load_network, save_network
from lcsc.operators.surgery import candidate
from lcsc.operators.warm_start import WarmStart
from lcsc.recycling.composite import COMBINATIONS

SOURCE = torch.tensor([[5, 6, 7, 8, 9]])
TARGET = torch.tensor([[1, 11, 12, 13]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, kind in enumerate(("bert", "gpt2", "roberta")):
        saved(model(kind, seed), folder / kind)
    return folder


def started(folders, name, **settings):
    """A combination by its name, from the models that it needs."""
    encoder, decoder, _ = COMBINATIONS[name]
    first = next((kind for kind in (encoder, decoder) if kind not in ("random", "none")), "bert")
    if decoder not in ("random", first):
        settings["decoder"] = str(folders / decoder)
    return WarmStart(combination=name, **settings), CheckpointBank.open(folders / first)


def made(folders, name, **settings):
    operator, bank = started(folders, name, **settings)
    return operator.apply(bank, {})


@torch.no_grad()
def logits(net, source=SOURCE, target=TARGET):
    return net(input_ids=source, decoder_input_ids=target).logits


@pytest.mark.parametrize("name", COMBINATIONS)
def test_tensors_are_the_sources_bit_for_bit_and_come_back(folders, tmp_path, name):
    candidate = made(folders, name)
    net, weights, told = live(candidate), candidate.weights(), candidate.recipe["tensors"]
    encoder, decoder, share = COMBINATIONS[name]
    files = {kind: load_file(folders / kind / "model.safetensors") for kind in ("bert", "gpt2", "roberta")}
    first = next((kind for kind in (encoder, decoder) if kind in files), "bert")
    for tensor, (how, *reads) in told.items():
        if how == "copied":
            tag, _, key = reads[0].rpartition(":")
            assert torch.equal(weights[tensor], files[decoder if tag else first][key]), tensor
        elif how == "random" and tensor.endswith("bias"):
            assert not weights[tensor].any()
    if decoder in files:  # the whole of the decoder's source is there, but for an encoder's pooler
        names = {reads[0].rpartition(":")[2] for how, *reads in told.values() if how == "copied"}
        assert {key for key in files[decoder] if "pooler" not in key} <= names
    counts = candidate.recipe["counts"]
    assert counts["parameters"] == sum(p.numel() for p in net.parameters()) == candidate.layout.num_parameters
    assert counts["parameters"] == sum(counts[how] for how in ("copied", "random"))
    save_network(net, tmp_path / "net")
    again = load_network(tmp_path / "net")
    assert type(again).__name__ == candidate.arch["class"]
    assert [names for _, names in distinct_tensors(again)] == [names for _, names in distinct_tensors(net)]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
    assert set(load_file(tmp_path / "net" / "model.safetensors")) == set(weights)  # each once
    ids = SOURCE if name != "gpt" else TARGET
    wanted = net.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=3, do_sample=False), wanted)
    assert share in ("none", candidate.arch["config"].get("share"))


def test_the_encoder_is_the_standalone_model_and_the_decoder_is_causal(folders):
    from transformers import BertModel

    for name in ("bert2bert", "bertshare", "bert2gpt", "bert2rnd"):
        net, alone = live(made(folders, name)), BertModel.from_pretrained(folders / "bert").eval()
        with torch.no_grad():
            assert torch.equal(net.encoder(SOURCE).last_hidden_state, alone(SOURCE).last_hidden_state)
        changed = TARGET.clone()
        changed[0, -1] = 20
        assert torch.equal(logits(net, target=changed)[:, :-1], logits(net)[:, :-1])
        assert not torch.equal(logits(net, target=changed)[:, -1], logits(net)[:, -1])
        assert not torch.equal(logits(net, source=SOURCE + 1), logits(net))  # it reads the source


@torch.no_grad()
def test_a_gpt2_that_hears_nothing_is_the_language_model_bit_for_bit(folders):
    from transformers import GPT2LMHeadModel

    alone = GPT2LMHeadModel.from_pretrained(folders / "gpt2").eval()
    for name in ("bert2gpt", "rnd2gpt", "roberta2gpt"):
        net = live(made(folders, name, cross_attention="zero"))
        assert torch.equal(logits(net), alone(TARGET).logits)
        net = live(made(folders, name, cross_attention="random"))
        assert not torch.equal(logits(net), alone(TARGET).logits)
    assert torch.equal(live(made(folders, "gpt"))(TARGET).logits, alone(TARGET).logits)


def test_attention_to_the_encoder_begins_as_self_attention(folders):
    net = live(made(folders, "bert2bert", cross_attention="copy"))
    for layer in net.decoder.bert.encoder.layer:
        for (name, a), b in zip(layer.crossattention.named_parameters(), layer.attention.parameters(), strict=True):
            assert torch.equal(a, b), name
    net = live(made(folders, "bert2gpt", cross_attention="copy"))
    for layer in net.decoder.transformer.h:
        for kind in ("weight", "bias"):
            q, kv = (getattr(getattr(layer.crossattention, part), kind) for part in ("q_attn", "c_attn"))
            assert torch.equal(torch.cat([q, kv], -1), getattr(layer.attn.c_attn, kind))
            assert torch.equal(getattr(layer.crossattention.c_proj, kind), getattr(layer.attn.c_proj, kind))
            assert torch.equal(getattr(layer.ln_cross_attn, kind), getattr(layer.ln_1, kind))


@torch.no_grad()
def test_layer_maps_permute_and_take_subsets(folders):
    from transformers import BertModel

    alone = BertModel.from_pretrained(folders / "bert").eval()
    net = live(made(folders, "bert2bert", encoder_layers=[2, 0], decoder_layers=[1]))
    assert (net.config.encoder.num_hidden_layers, net.config.decoder.num_hidden_layers) == (2, 1)
    for layer, source in ((net.encoder.encoder.layer[0], 2), (net.encoder.encoder.layer[1], 0)):
        for (name, a), b in zip(layer.named_parameters(), alone.encoder.layer[source].parameters(), strict=True):
            assert torch.equal(a, b), name
    alone.encoder.layer = torch.nn.ModuleList([alone.encoder.layer[2], alone.encoder.layer[0]])
    assert torch.equal(net.encoder(SOURCE).last_hidden_state, alone(SOURCE).last_hidden_state)
    mine = dict(net.decoder.bert.encoder.layer[0].named_parameters())
    fresh = BertModel.from_pretrained(folders / "bert").encoder.layer[1]
    assert all(torch.equal(mine[name], b) for name, b in fresh.named_parameters())


def test_gradients_of_shared_tensors_add_up(folders):
    net = live(made(folders, "bertshare")).requires_grad_(True)
    own = net.encoder.encoder.layer[0].attention.self.query.weight
    assert own is net.decoder.bert.encoder.layer[0].attention.self.query.weight
    assert net.encoder.embeddings.word_embeddings.weight is net.decoder.get_output_embeddings().weight
    logits_of = net(input_ids=SOURCE, decoder_input_ids=TARGET).logits
    logits_of.square().mean().backward()
    whole = own.grad.clone()
    apart = copy.deepcopy(net)
    apart.zero_grad()
    twin = torch.nn.Parameter(own.detach().clone())
    apart.decoder.bert.encoder.layer[0].attention.self.query.weight = twin
    apart(input_ids=SOURCE, decoder_input_ids=TARGET).logits.square().mean().backward()
    parts = apart.encoder.encoder.layer[0].attention.self.query.weight.grad + twin.grad
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize(("name", "start", "pad"), [("bert2gpt", 3, 39), ("bert2bert", 1, 0), ("robertashare", 0, 1)])
def test_the_labels_path_gives_the_loss_of_the_decoders_own_inputs(folders, name, start, pad):
    """transformers hides padding tokens from the decoder, so its first token must be another one."""
    net = live(made(folders, name))
    assert (net.config.decoder_start_token_id, net.config.pad_token_id) == (start, pad)
    labels = torch.tensor([[11, 12, 13]])
    loss = net(input_ids=SOURCE, labels=labels).loss
    inputs = torch.tensor([[start, 11, 12]])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits(net, target=inputs)[0], labels[0]))


def test_a_side_lies_between_two_checkpoints(tmp_path):
    for step in (10, 20, 30):
        model("bert", step).save_pretrained(tmp_path / f"checkpoint-{step}")
    bank = CheckpointBank.open(tmp_path)
    files = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in bank.steps}
    operator = WarmStart(encoder_step=10, encoder_other=20, encoder_mix=[0.0, 0.25, 1.0, 0.5], share="none")
    weights = operator.apply(bank, {}).weights()
    name = "encoder.layer.{}.output.dense.weight"
    a, b = ([files[step]["bert." + name.format(i)] for i in range(3)] for step in (10, 20))
    assert torch.equal(weights["encoder." + name.format(0)], a[0])
    assert torch.equal(weights["encoder." + name.format(2)], b[2])
    assert torch.equal(weights["encoder." + name.format(1)], (0.75 * a[1].double() + 0.25 * b[1].double()).float())
    words = "embeddings.word_embeddings.weight"
    middle = (files[10]["bert." + words].double() + files[20]["bert." + words].double()) / 2
    assert torch.equal(weights["encoder." + words], middle.float())
    # the decoder is the last checkpoint
    assert torch.equal(weights["decoder.bert." + name.format(1)], files[30]["bert." + name.format(1)])
    space = WarmStart(encoder_step=10, encoder_other=20).space(bank)
    assert {box.name: box.size for box in space.boxes} == {
        **{"encoder_mix": 4, "decoder_step": 1, "share": 1, "cross_attention": 1}
    }


def test_a_search_names_steps_layers_sharing_and_attention(tmp_path):
    for step in (10, 20, 30):
        model("bert", step).save_pretrained(tmp_path / f"checkpoint-{step}")
    bank = CheckpointBank.open(tmp_path)
    operator = WarmStart(num_encoder_layers=2)
    space = operator.space(bank)
    point = space.to_point(np.zeros(space.size))
    recipe = operator.apply(bank, point).recipe
    assert (recipe["encoder_step"], recipe["decoder_step"], recipe["share"]) == (30, 30, "embeddings")
    assert (recipe["encoder_layers"], recipe["decoder_layers"]) == ([0, 1], [0, 1, 2])
    point["encoder_step"][:], point["decoder_step"][:] = 2.5, 1.5
    point["encoder_layers"][:] = [0.5, -0.5, 0.7]
    point["share"][:], point["cross_attention"][:] = 2.5, 1.5
    recipe = operator.apply(bank, point).recipe
    assert (recipe["encoder_step"], recipe["decoder_step"]) == (10, 10)  # all shared, so the decoder's is not its own
    assert (recipe["encoder_layers"], recipe["decoder_layers"]) == ([0, 2], [0, 2])
    assert (recipe["share"], recipe["cross_attention"]) == ("all", "copy")
    point["share"][:] = 1.5
    recipe = operator.apply(bank, point).recipe
    assert (recipe["encoder_step"], recipe["decoder_step"], recipe["share"]) == (10, 20, "none")
    labels = {row.label for row in operator.baselines(bank)}
    assert {"first layers, share embeddings, random", "spread layers, share all, zero"} <= labels
    assert len(labels) == 27
    by_label = {row.label: row.point for row in operator.baselines(bank)}
    told = operator.apply(bank, by_label["last layers, share none, zero"]).recipe
    assert (told["encoder_layers"], told["share"], told["cross_attention"]) == ([1, 2], "none", "zero")


def test_other_widths_get_a_projection(tmp_path, folders):
    bank = saved(model("bert", hidden_size=24, intermediate_size=32), tmp_path / "wide")
    candidate = WarmStart(decoder=str(folders / "gpt2")).apply(bank, {})
    net = live(candidate)
    assert net.enc_to_dec_proj.weight.shape == (16, 24)
    assert candidate.recipe["tensors"]["enc_to_dec_proj.weight"] == ["random"]
    assert logits(net).shape == (1, 4, 40)


def test_overlapping_tokens_keep_their_rows(tmp_path):
    net = model("bert")
    bank = saved(net, tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "##s", "cat", *(f"w{i}" for i in range(33))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "new").mkdir()
    new = {"<s>": 0, "<pad>": 1, "</s>": 2, "s": 3, "Ġcat": 4, "cat": 5, "Ġnew": 6, "Ġdog": 7}
    (tmp_path / "new" / "vocab.json").write_text(json.dumps(new))
    how = {"vocabulary": str(tmp_path / "new"), "decoder_embeddings": "overlap"}
    candidate = WarmStart(**how).apply(bank, {})
    weights, old = candidate.weights(), load_file(tmp_path / "bert" / "model.safetensors")
    table, before = (
        weights["decoder.bert.embeddings.word_embeddings.weight"],
        old["bert.embeddings.word_embeddings.weight"],
    )
    assert table.shape == (8, 16)
    for row, source in {0: 2, 1: 0, 2: 3, 3: 5, 4: 6, 7: 4}.items():
        assert torch.equal(table[row], before[source])
        assert weights["decoder.cls.predictions.bias"][row] == old["cls.predictions.bias"][source]
    assert table[5:7].abs().max() < 0.1  # drawn: sources have numbers of about 0.2
    assert candidate.recipe["share"] == "none"
    net = live(candidate)
    assert (net.config.decoder_start_token_id, net.config.eos_token_id, net.config.pad_token_id) == (0, 2, 1)
    # ` news` is in no vocabulary of the source, and ` dogs` is spelled by ` dog` and `s`
    (tmp_path / "new" / "vocab.json").write_text(json.dumps({**new, "Ġdogs": 8, "Ġdogss": 9, "Ġnews": 10}))
    spelled = WarmStart(**{**how, "decoder_embeddings": "pieces"}).apply(bank, {}).weights()
    pieces = spelled["decoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(pieces[:5], table[:5])
    torch.testing.assert_close(pieces[8], before[[4, 5]].mean(0))
    torch.testing.assert_close(pieces[9], before[[4, 5, 5]].mean(0))
    assert pieces[[5, 6, 10]].abs().max() < 0.1
    bias = spelled["decoder.cls.predictions.bias"]
    torch.testing.assert_close(bias[8], old["cls.predictions.bias"][[4, 5]].mean())
    (tmp_path / "new" / "vocab.json").write_text(json.dumps(new))
    both = WarmStart(**how, encoder_embeddings="overlap").apply(bank, {})
    assert both.recipe["share"] == "embeddings"
    drawn = WarmStart(encoder_embeddings="random", decoder_embeddings="random").apply(bank, {})
    assert drawn.recipe["tensors"]["encoder.embeddings.word_embeddings.weight"] == ["random"]
    assert drawn.recipe["tensors"]["encoder.embeddings.position_embeddings.weight"][0] == "copied"


def test_files_as_published_are_read(tmp_path):
    """bert-base-uncased has TensorFlow's names of norms and a next-sentence head, gpt2 no prefix and its masks."""
    net = model("bert")
    tensors = {
        **{
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t.contiguous()
            for n, t in net.state_dict().items()
            if "decoder" not in n and "pooler" not in n
        },
        **{"cls.seq_relationship.weight": torch.zeros(2, 16), "cls.seq_relationship.bias": torch.zeros(2)},
        **{"bert.pooler.dense.weight": torch.ones(16, 16), "bert.pooler.dense.bias": torch.ones(16)},
        "bert.embeddings.position_ids": torch.arange(24)[None],
    }
    (tmp_path / "bert").mkdir()
    save_file(tensors, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    config = {**SIZES, "model_type": "bert", "architectures": ["BertForMaskedLM"], "pad_token_id": 0}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    gpt = model("gpt2")
    tensors = {
        n.removeprefix("transformer."): t.contiguous() for n, t in gpt.state_dict().items() if "lm_head" not in n
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(3)}
    (tmp_path / "gpt2").mkdir()
    save_file(tensors, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    config = {**GPT, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 3, "eos_token_id": 3}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    bank = CheckpointBank.open(tmp_path / "bert")
    with pytest.raises(ConfigError, match="which token begins a text. Give `operator.start_token=NUMBER`"):
        WarmStart(combination="bert2bert").apply(bank, {})
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n")
    built = live(WarmStart(combination="bert2bert", share="none").apply(bank, {}))
    assert (built.config.decoder_start_token_id, built.config.eos_token_id) == (1, 2)
    for part in (built.encoder, built.decoder.bert):
        mine = dict(part.named_parameters())
        for name, tensor in net.bert.named_parameters():
            assert torch.equal(mine[name], tensor), name
    assert bool((built.encoder.pooler.dense.weight == 1).all())
    with torch.no_grad():
        apart = WarmStart(decoder=str(tmp_path / "gpt2")).apply(bank, {})
        assert apart.recipe["share"] == "none"  # as many tokens, but trained apart
        heard = live(WarmStart(decoder=str(tmp_path / "gpt2"), cross_attention="zero").apply(bank, {}))
        assert torch.equal(logits(heard), gpt(TARGET).logits)
        alone = live(WarmStart(combination="gpt").apply(CheckpointBank.open(tmp_path / "gpt2"), {}))
        assert torch.equal(alone(TARGET).logits, gpt(TARGET).logits)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gpt2", {}, "attends to earlier tokens only, also as an encoder"),
        ("bert", {"combination": "gpt"}, "it is a gpt2. Give such a model"),
        ("bert", {"combination": "robertashare"}, "it is a roberta. Give such a model"),
        ("bert", {"encoder_layers": [0, 3]}, "`operator.encoder_layers` has 3; .* has layers 0 to 2"),
        ("bert", {"num_decoder_layers": 4}, "`operator.num_decoder_layers` is 4; .* has 3"),
        ("bert", {"share": "all", "decoder_layers": [0]}, "`all` cannot be shared"),
        ("bert", {"encoder_step": 7}, "`operator.encoder_step` is 7; the bank .* has steps"),
        ("bert", {"start_token": 40}, "`operator.start_token` is 40; the decoder has tokens 0 to 39"),
        ("bert", {"pad_token": 1}, "`operator.pad_token` is 1, which is the first token too"),
        ("bert", {"encoder_other": 0, "encoder_mix": [1.0]}, "has 1 numbers for 3 layers"),
    ],
)
def test_what_does_not_fit_is_refused(folders, kind, settings, message):
    with pytest.raises((BankError, ConfigError), match=message):
        WarmStart(**settings).apply(CheckpointBank.open(folders / kind), {})


def test_decoders_that_cannot_attend_are_refused_by_name(tmp_path, folders):
    from helpers_text import language_bank

    llama = CheckpointBank.open(language_bank(tmp_path / "llama"))
    with pytest.raises(BankError, match=r"`LlamaForCausalLM`, and `llama` has no attention to an encoder"):
        WarmStart(encoder="random").space(llama)
    with pytest.raises(BankError, match="`llama` has no attention to an encoder"):
        WarmStart(decoder=str(tmp_path / "llama")).space(CheckpointBank.open(folders / "bert"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combination": "bert2bart"}, "Did you mean `bert2bert`"),
        ({"decoder": "none"}, "a decoder is needed"),
        ({"encoder_layers": 3}, "give a list of layers"),
        ({"num_encoder_layers": 0}, "it must be at least 1"),
        ({"encoder_mix": 0.5}, "without `encoder_other`"),
        ({"encoder_other": 1, "encoder_mix": 2.0}, r"give a number in \[0, 1\]"),
        ({"vocabulary": "x"}, "a vocabulary goes with `overlap`"),
        ({"combination": "bert2gpt", "encoder": "random"}, "in `bert2gpt` it is bert"),
        ({"share": "some"}, "`operator.share` is `some`"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WarmStart(**settings)


def test_another_second_model_is_another_search(tmp_path, folders):
    bank = CheckpointBank.open(folders / "bert")
    digests = []
    for seed in (1, 2):
        saved(model("gpt2", seed), tmp_path / str(seed))
        operator = WarmStart(decoder=str(tmp_path / str(seed)))
        digests.append(operator.other_checkpoints(bank))
    assert digests[0] == {"decoder": CheckpointBank.open(tmp_path / "1").digest}
    assert digests[0] != digests[1]
    assert WarmStart().other_checkpoints(bank) == {}


def test_every_point_is_planned_again_from_its_own_step_alone(tmp_path):
    for step in (10, 20, 30):
        model("bert", step).save_pretrained(tmp_path / f"checkpoint-{step}")
    bank, rng = CheckpointBank.open(tmp_path), np.random.default_rng(0)
    for settings in (
        {"num_encoder_layers": 2},
        {"num_decoder_layers": 1, "decoder_other": 10},
        {"combination": "bert2bert", "encoder_other": 20, "try_random": True},
    ):
        operator = WarmStart(**settings)
        space, seen = operator.space(bank), set()
        for _ in range(8):
            point = space.to_point(rng.uniform(space.lower, space.upper))
            plan = operator.plan(bank, point)
            (step,) = plan.recipe["steps"]
            alone = CheckpointBank.open(tmp_path, select=Selection(step, step))
            again = plan.settled.plan(alone, point)
            assert (again.recipe, again.arch, again.files) == (plan.recipe, plan.arch, plan.files)
            weights = candidate(again, alone).weights()
            assert all(torch.equal(weights[n], t) for n, t in operator.apply(bank, point).weights().items())
            seen.add((plan.recipe["encoder_step"], plan.recipe["decoder_step"], plan.recipe["share"]))
        assert len(seen) > 3
        drawn = any(None in steps for steps in seen)
        assert drawn == ("try_random" in settings)

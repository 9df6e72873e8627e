"""`lcsc transform operator=warm_start`: two models in, one out that generates at once; verified from its recipe."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from helpers_warm import live, model
from safetensors import safe_open
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank
from lcsc.models.network import load_network
from lcsc.operators.warm_start import WarmStart

SOURCE = torch.tensor([[5, 6, 7]])


@pytest.fixture
def folders(here, capsys):
    for kind in ("bert", "gpt2"):
        net = model(kind).to(torch.bfloat16)
        net.save_pretrained(here / kind)
        (here / kind / "tokenizer_config.json").write_text(json.dumps({"of": kind}))
    capsys.readouterr()  # transformers' bars
    return here


def ok(lcsc, *words):
    code, out, err = lcsc("transform", "operator=warm_start", *words)
    assert code == 0, err
    return out


def table(folder):
    return list(csv.DictReader((folder / "out" / "provenance.csv").read_text().splitlines()))


def test_two_models_become_one_that_transformers_opens(folders, lcsc):
    from transformers import EncoderDecoderModel

    out = ok(lcsc, "model=bert", "to=out", "operator.combination=bert2gpt", "operator.decoder=gpt2")
    net, info = EncoderDecoderModel.from_pretrained(folders / "out", output_loading_info=True)
    assert not any(info.values())
    assert net.dtype == torch.bfloat16
    wanted = live(WarmStart(combination="bert2gpt", decoder="gpt2").apply(CheckpointBank.open("bert"), {}))
    for name, tensor in wanted.named_parameters():
        assert torch.equal(net.get_parameter(name), tensor.to(torch.bfloat16)), name
    assert net.generate(SOURCE, max_new_tokens=4, num_beams=2).shape[0] == 1
    generation = json.loads((folders / "out" / "generation_config.json").read_text())
    assert generation == {"decoder_start_token_id": 3, "bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 39}
    assert json.loads((folders / "out" / "tokenizer_config.json").read_text()) == {"of": "bert"}
    assert json.loads((folders / "out" / "decoder" / "tokenizer_config.json").read_text()) == {"of": "gpt2"}
    # attention to the encoder, 4 (d^2 + d) + 2 d a layer, and the pooler that no masked language model has
    drawn = 3 * (4 * (16**2 + 16) + 2 * 16) + 16**2 + 16
    total = sum(t.numel() for t in net.parameters())
    assert f"parameters: {total:,} ({total - drawn:,} copied, {drawn:,} random)" in out
    rows = table(folders)
    assert {row["tensor"] for row in rows} == set(load_file(folders / "out" / "model.safetensors"))
    row = next(row for row in rows if row["tensor"] == "decoder.transformer.h.1.mlp.c_fc.weight")
    assert (row["how"], row["source"], row["file"], row["key"]) == (
        *("copied", "decoder", "model.safetensors"),
        "transformer.h.1.mlp.c_fc.weight",
    )
    assert sum(int(row["parameters"]) for row in rows) == total
    card = (folders / "out" / "README.md").read_text()
    assert "The decoder is of `" in card


def test_shared_tensors_lie_in_files_once(folders, lcsc):
    from transformers import AutoModelForSeq2SeqLM

    ok(lcsc, "model=bert", "to=out", "operator.combination=bertshare", "max_shard_size=8KB")
    stored = [name for file in (folders / "out").glob("*.safetensors") for name in load_file(file)]
    assert len(stored) == len(set(stored))
    net = load_network(folders / "out")
    assert sum(p.numel() for p in net.parameters()) == sum(
        t.numel() for file in (folders / "out").glob("*.safetensors") for t in load_file(file).values()
    )
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folders / "out").float().eval()
    assert type(theirs).__name__ == "SharedEncoderDecoderModel"
    with torch.no_grad():
        ids = {"input_ids": SOURCE, "decoder_input_ids": SOURCE}
        assert torch.equal(theirs(**ids).logits, net(**ids).logits)
    assert "from lcsc.models.encoder_decoder import" in (folders / "out" / "README.md").read_text()
    rows = table(folders)
    shared = {row["tensor"]: row["key"] for row in rows if row["how"] == "shared"}
    assert shared["decoder.bert.encoder.layer.2.output.dense.bias"] == "encoder.encoder.layer.2.output.dense.bias"


def test_verify_makes_it_again_and_names_what_changed(folders, lcsc, capsys, monkeypatch):
    words = ("model=bert", "to=out", "operator.decoder=gpt2", "operator.cross_attention=copy")
    ok(lcsc, *words, "operator.encoder_layers=[2,0]")
    (folders / "elsewhere").mkdir()
    monkeypatch.chdir(folders / "elsewhere")  # what it was made of is found from anywhere
    code, out, err = lcsc("verify", "../out")
    assert code == 0, err
    assert "bit for bit from 1 checkpoints of" in out
    model("gpt2", 5).to(torch.bfloat16).save_pretrained(folders / "gpt2")
    capsys.readouterr()
    code, _, err = lcsc("verify", "../out")
    assert code == 2
    assert "gpt2/model.safetensors`, changed since `../out` was made of it. Restore it" in err


def test_sides_from_two_steps_of_one_run(here, lcsc, capsys):
    for step in (10, 20, 30):
        model("bert", step).save_pretrained(here / "bank" / f"checkpoint-{step}")
    capsys.readouterr()
    ok(
        lcsc,
        "model=bank",
        "to=out",
        "operator.encoder_step=10",
        "operator.share=none",
        "operator.decoder_other=20",
        "operator.decoder_mix=0.5",
    )
    files = {k: load_file(here / "bank" / f"checkpoint-{k}" / "model.safetensors") for k in (10, 20, 30)}
    made, name = load_file(here / "out" / "model.safetensors"), "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(made[name.replace("bert.", "encoder.")], files[10][name])
    assert torch.equal(made["decoder." + name], ((files[30][name].double() + files[20][name].double()) / 2).float())
    with safe_open(here / "out" / "model.safetensors", framework="pt") as handle:
        recipe = json.loads(handle.metadata()["lcsc_recipe"])
    assert (recipe["steps"], recipe["encoder_step"], recipe["decoder_step"]) == ([10], 10, 30)
    assert {tag: row["step"] for tag, row in recipe["sources"].items()} == {"decoder": 30, "decoder_other": 20}
    code, _, err = lcsc("verify", "out")
    assert code == 0, err


def test_mistakes_are_one_sentence_and_leave_nothing(folders, lcsc, capsys):
    model("gpt2").save_pretrained(folders / "single")
    capsys.readouterr()
    before = sorted(path.name for path in folders.iterdir())
    for words, text in (
        (("operator.combination=bert2gpt",), "the decoder comes from `bert`, a `bert`"),
        (("operator.decoder=nowhere",), "nowhere"),
        (("operator.decoder=single",), "the checkpoints are in bfloat16, float32; save them in one dtype first"),
        (("operator.combination=bert2bart",), "Did you mean `bert2bert`"),
        (("operator.encoder_layers=[9]",), "has layers 0 to 2"),
    ):
        code, _, err = lcsc("transform", "operator=warm_start", "model=bert", "to=out", *words)
        assert code == 2, words
        assert text in err
        assert err.count("\n") == 1
        assert sorted(path.name for path in folders.iterdir()) == before

"""Folders of transformers: Trainer's checkpoints, shards, torch files, tied embeddings."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from helpers_layouts import STEPS, assert_same, said
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lcsc.bank.find import choose, find_groups
from lcsc.bank.keys import agree
from lcsc.core.errors import BankError


def llama(seed, tied=False):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=tied, **sizes))


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def test_shards(folder):
    path = folder("llama")
    for step in STEPS:
        llama(step).save_pretrained(path / f"checkpoint-{step}", max_shard_size="1KB")
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("raw", "transformers", STEPS)
    assert len(group.checkpoints[0].files) > 2
    for item in group.checkpoints:
        assert_same(item, LlamaForCausalLM.from_pretrained(path / f"checkpoint-{item.step}").state_dict())
        assert item.arch["class"] == "LlamaForCausalLM"
        assert item.arch["config"]["model_type"] == "llama"
    assert len({id(item.table) for item in group.checkpoints}) == 1


def test_the_index_must_fit_its_shards(folder):
    path = folder("index")
    llama(1).save_pretrained(path / "checkpoint-1", max_shard_size="2KB")
    file = path / "checkpoint-1" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    crowded = max(shards, key=list(index["weight_map"].values()).count)
    first, second, *_ = (name for name, file in index["weight_map"].items() if file == crowded)
    for change, text in (
        ({first: None}, f"`{first}` is in a shard but not in the index"),
        ({"more": shards[0]}, "`more` is only in the index"),
        ({first: next(s for s in shards if s != index["weight_map"][first])}, f"puts `{first}` into"),
        ({second: "../model.safetensors"}, "only plain names of files in the same folder"),
    ):
        weights = {name: at for name, at in {**index["weight_map"], **change}.items() if at}
        file.write_text(json.dumps({**index, "weight_map": weights}))
        with pytest.raises(BankError, match=text.replace(".", r"\.")):
            find_groups(path)


@pytest.fixture(scope="session")
def trainer_run(folder):
    """What `transformers.Trainer` leaves, rotated: two of three checkpoints, and the last model beside them."""
    path = folder("trainer")
    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}] * 8
    settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2, "per_device_train_batch_size": 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        arguments = TrainingArguments(
            str(path), **settings, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no"
        )
        trainer = Trainer(gpt2(0), arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(str(path))
    return path


def test_trainer(trainer_run):
    group = choose(find_groups(trainer_run))
    assert (group.label, group.layout, group.steps) == ("raw", "transformers", (4, 6))
    assert said(group, "passed over (training state): checkpoint-4/optimizer.pt and ")
    assert said(group, "passed over (training state)")
    assert said(group, "passed over (no step in the name, beside folders that have one): model.safetensors")
    for item in group.checkpoints:
        assert_same(item, load_file(trainer_run / f"checkpoint-{item.step}" / "model.safetensors"))
        assert set(item.table) <= set(GPT2LMHeadModel.from_pretrained(item.path.parent).state_dict())


def test_torch_files_and_tied_embeddings(folder):
    """`torch.save` writes a tied tensor under both names, safetensors under one: such steps do not agree."""
    path = folder("tied")
    for step in (1, 2):
        model = gpt2(step)
        model.config.save_pretrained(path / f"checkpoint-{step}")
        torch.save(model.state_dict(), path / f"checkpoint-{step}" / "pytorch_model.bin")
    group = choose(find_groups(path))
    assert (group.layout, group.steps) == ("transformers", (1, 2))
    for item in group.checkpoints:
        assert_same(item, gpt2(item.step).state_dict())
        assert item.table["lm_head.weight"] == item.table["transformer.wte.weight"]
    assert agree(group.checkpoints) == [item.table for item in group.checkpoints]
    gpt2(3).save_pretrained(path / "checkpoint-3")
    group = choose(find_groups(path))
    with pytest.raises(
        BankError,
        match=r"checkpoint-1/pytorch_model.bin` and .*checkpoint-3/model.safetensors` differ: `lm_head.weight` is only "
        r"in step 1 \(there tied to `transformer.wte.weight`; save all steps with one writer\)",
    ):
        agree(group.checkpoints)


def test_torch_shards(folder):
    """Shards of `torch.save`, with the index that transformers wrote before it stopped writing them."""
    path = folder("bins") / "checkpoint-7"
    tensors = llama(7).state_dict()
    names = sorted(tensors)
    parts = {f"pytorch_model-0000{k + 1}-of-00002.bin": names[k::2] for k in range(2)}
    path.mkdir()
    for file, own in parts.items():
        torch.save({name: tensors[name] for name in own}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    llama(7).config.save_pretrained(path)
    group = choose(find_groups(path.parent))
    assert (group.layout, group.steps, group.checkpoints[0].format) == ("transformers", (7,), "torch")
    assert_same(group.checkpoints[0], LlamaForCausalLM.from_pretrained(path).state_dict())

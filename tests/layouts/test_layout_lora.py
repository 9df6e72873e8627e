"""LoRA as PEFT, diffusers and kohya save it; kohya's whole networks."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from helpers_layouts import STEPS, assert_same, net, said
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lcsc.bank.find import choose, find_groups
from lcsc.core.errors import BankError


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 6), nn.Linear(6, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()


def adapted(seed, rank=2):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"down_blocks": nn.ModuleList([Block()])})
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4, target_modules=["to_q", "to_k"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def factors(seed):
    """The adapter's tensors under diffusers' names."""
    found = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted(seed)))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


def test_peft(folder):
    path = folder("peft")
    for step in STEPS:
        adapted(step).save_pretrained(path / f"checkpoint-{step}")
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("lora", "PEFT", STEPS)
    for item in group.checkpoints:
        assert_same(item, load_file(path / f"checkpoint-{item.step}" / "adapter_model.safetensors"))
        fresh = get_peft_model_state_dict(adapted(item.step))
        assert_same(item, fresh)
        config = json.loads(item.metadata["adapter_config"])
        assert (config["r"], config["lora_alpha"]) == (2, 4)
        assert item.arch is None
    assert said(group, "passed over (no weights): checkpoint-100/README.md and 2 others")


def test_diffusers(folder):
    path = folder("diffusers_lora")
    for step in STEPS:
        StableDiffusionPipeline.save_lora_weights(path / f"checkpoint-{step}", unet_lora_layers=factors(step))
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("lora", "diffusers LoRA", STEPS)
    for item in group.checkpoints:
        state, _ = StableDiffusionPipeline.lora_state_dict(str(path / f"checkpoint-{item.step}"))
        assert_same(item, state)


def kohya(seed, **metadata):
    """Names of kohya's networks/lora.py, by diffusers' converter; alpha stands beside the factors."""
    peft = get_peft_model_state_dict(adapted(seed), adapter_name="default")
    peft = {name.replace("base_model.model.", "base_model.model.unet."): tensor for name, tensor in peft.items()}
    named = convert_state_dict_to_kohya({k.replace("base_model.model.", ""): v for k, v in peft.items()})
    assert any("lora_down" in name for name in named)
    named = {name.replace("unet_", "lora_unet_", 1): tensor.contiguous() for name, tensor in named.items()}
    return named, {"ss_network_module": "networks.lora", "ss_tag_frequency": "{}", **metadata}


def test_kohya_steps(folder):
    """sd-scripts: `name-step<8 digits>`, `name-<6 digits>` = epoch, `name` = last; `ss_steps` says the step."""
    path = folder("kohya")
    files = {}
    for stem, steps in (("cat-step00006000", 6000), ("cat-000004", 4800), ("cat-000010", 12000), ("cat", 13000)):
        tensors, metadata = kohya(steps, ss_steps=str(steps), ss_epoch="4")
        save_file(tensors, path / f"{stem}.safetensors", metadata)
        files[steps] = f"{stem}.safetensors"
    (path / "cat-step00006000-state").mkdir()
    save_file(net(1).state_dict(), path / "cat-step00006000-state" / "model.safetensors")
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("lora", "kohya LoRA", (4800, 6000, 12000, 13000))
    for item in group.checkpoints:
        assert item.path.name == files[item.step]
        assert_same(item, load_file(path / files[item.step]))
        assert item.metadata["ss_steps"] == str(item.step)
    assert said(group, "passed over (no weights or no step): cat-step00006000-state/")
    first, *others = group.checkpoints
    assert all(other.metadata["ss_tag_frequency"] is first.metadata["ss_tag_frequency"] for other in others)


def test_kohya_last_is_a_step_that_is_there(folder):
    path = folder("kohya_last")
    for stem, steps in (("dog-step00000100", 100), ("dog", 100)):
        tensors, metadata = kohya(steps, ss_steps=str(steps))
        save_file(tensors, path / f"{stem}.safetensors", metadata)
    group = choose(find_groups(path))
    assert [item.path.name for item in group.checkpoints] == ["dog-step00000100.safetensors"]
    assert said(group, "passed over (a step that is there already): dog.safetensors (step 100)")
    alone = choose(find_groups(path / "dog.safetensors"))
    assert alone.steps == (100,)


def test_kohya_epochs_without_steps(folder):
    path = folder("kohya_epochs")
    for epoch in (2, 4, 10):
        tensors, metadata = kohya(epoch)
        save_file(tensors, path / f"fox-{epoch:06d}.safetensors", metadata)
    group = choose(find_groups(path))
    assert group.steps == (2, 4, 10)
    assert said(group, "the numbers are epochs")


def test_kohya_whole_network(folder):
    path = folder("kohya_full")
    for step in STEPS:
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in net(step).half().state_dict().items()}
        save_file(tensors, path / f"sd-v1-5-step{step:08d}.safetensors", {"ss_steps": str(step)})
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("raw", "kohya", STEPS)
    assert_same(group.checkpoints[0], load_file(path / "sd-v1-5-step00000050.safetensors"))


def test_factors_and_whole_networks_are_not_mixed(tmp_path):
    for step in (1, 2):
        StableDiffusionPipeline.save_lora_weights(tmp_path / f"checkpoint-{step}", unet_lora_layers=factors(step))
        save_file(net(step).state_dict(), tmp_path / f"checkpoint-{step}" / "model.safetensors")
    groups = find_groups(tmp_path)
    assert [group.label for group in groups] == ["raw", "lora"]
    with pytest.raises(BankError, match="`bank.weights=raw` or `bank.weights=lora`"):
        choose(groups)
    assert choose(groups, weights="lora").layout == "diffusers LoRA"


def test_a_whole_network_with_factors_inside_is_no_lora(tmp_path):
    state = {name: tensor.contiguous() for name, tensor in adapted(1).state_dict().items()}
    save_file(state, tmp_path / "net-1.safetensors")
    group = choose(find_groups(tmp_path))
    assert group.kind == "raw"
    assert_same(group.checkpoints[0], state)

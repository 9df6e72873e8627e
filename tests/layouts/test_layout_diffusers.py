"""Folders of diffusers: pipelines, components, shards, variants, EMAModel, and its training scripts on accelerate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDIMScheduler, DDPMPipeline, LDMPipeline, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel
from helpers_layouts import STEPS, assert_same, by_label, net, said

from lcsc.bank.find import choose, find_groups
from lcsc.core.errors import BankError

UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


def unet(seed):
    torch.manual_seed(seed)
    return UNet2DModel(**UNET)


def loaded(path, **settings):
    return UNet2DModel.from_pretrained(path, **settings).state_dict()


@pytest.fixture(scope="session")
def pipelines(folder):
    """Steps of a latent diffusion pipeline whose VQ model stays the same."""
    path = folder("pipelines")
    torch.manual_seed(7)
    vq = VQModel(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=3)
    for step in STEPS:
        LDMPipeline(vq, unet(step), DDIMScheduler()).save_pretrained(path / f"step_{step}")
    (path / "runs").mkdir()
    return path


def test_pipelines(pipelines):
    groups = find_groups(pipelines)
    assert [group.label for group in groups] == ["unet raw", "vqvae raw"]
    group = choose(groups)
    assert (group.component, group.steps, group.layout) == ("unet", STEPS, "diffusers pipelines")
    assert said(group, "`unet` is combined; left as they are: `vqvae`")
    assert said(group, "passed over (no weights or no step): runs/")
    assert said(group, "passed over (no weights): step_100/scheduler/ and 2 others")
    for item in group.checkpoints:
        assert_same(item, loaded(pipelines / f"step_{item.step}" / "unet"))
        assert item.arch["class"] == "UNet2DModel"
        assert item.arch["config"]["block_out_channels"] == [8]
    assert choose(groups, component="vqvae").steps == STEPS
    with pytest.raises(BankError, match="no component named `unte` .* Did you mean `unet`"):
        choose(groups, component="unte")


def test_equal_tables_are_one_object(pipelines):
    first, *others = choose(find_groups(pipelines)).checkpoints
    assert all(other.table is first.table and other.arch is first.arch for other in others)


def test_one_pipeline_and_one_component_given_directly(pipelines):
    group = choose(find_groups(pipelines / "step_100"))
    assert (group.component, group.steps) == ("unet", (100,))
    inner = choose(find_groups(pipelines / "step_100" / "unet"))
    assert inner.steps == (0,)
    assert said(inner, "names no step; it counts as step 0")
    file = choose(find_groups(pipelines / "step_100" / "unet" / "diffusion_pytorch_model.safetensors"))
    for item in (group, inner, file):
        assert_same(item.checkpoints[0], loaded(pipelines / "step_100" / "unet"))


def test_two_denoisers_must_be_chosen_unless_one_is_constant(pipelines, tmp_path):
    path = shutil.copytree(pipelines, tmp_path / "two")
    for step in STEPS:
        unet(1).save_pretrained(path / f"step_{step}" / "prior")
    assert choose(find_groups(path)).component == "unet"
    unet(2).save_pretrained(path / "step_100" / "prior")
    with pytest.raises(BankError, match="several networks. Choose one: `bank.component=prior`, `bank.component=unet`"):
        choose(find_groups(path))


def test_a_damaged_vae_is_a_note_and_a_damaged_unet_an_error(pipelines, tmp_path, monkeypatch):
    shutil.copytree(pipelines, tmp_path / "damaged")
    monkeypatch.chdir(tmp_path)
    path = Path("damaged")
    vae = path / "step_100" / "vqvae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-9])
    group = choose(find_groups(path))
    assert group.component == "unet"
    assert said(group, "`vqvae` is left out: ")
    assert said(group, "step_100/vqvae/diffusion_pytorch_model.safetensors")
    weights = path / "step_50" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(BankError, match="step_50/unet/diffusion_pytorch_model.safetensors"):
        find_groups(path)
    problems = []
    assert by_label(find_groups(path, problems=problems))["unet raw"].steps == (100, 1000)
    assert len(problems) == 2


def test_shards_and_their_index(folder):
    path = folder("sharded")
    for step in STEPS:
        unet(step).save_pretrained(path / f"checkpoint-{step}" / "unet", max_shard_size="10KB")
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("unet raw", "diffusers components", STEPS)
    assert len(group.checkpoints[0].files) > 2
    for item in group.checkpoints:
        assert_same(item, loaded(path / f"checkpoint-{item.step}" / "unet"))
    inside = path / "checkpoint-50" / "unet"
    stale = sorted(inside.glob("*.safetensors"))[0]
    shutil.copy(stale, stale.with_name("diffusion_pytorch_model-00001-of-00099.safetensors"))
    with pytest.raises(BankError, match="00099.safetensors` is a shard that `.*index.json` does not list"):
        find_groups(path)


def test_a_missing_shard_and_a_whole_file_beside_shards(folder):
    path = folder("holes")
    unet(1).save_pretrained(path / "checkpoint-1" / "unet", max_shard_size="10KB")
    inside = path / "checkpoint-1" / "unet"
    (inside / "diffusion_pytorch_model.safetensors.index.json").rename(path / "index")
    third = sorted(inside.glob("*.safetensors"))[2]
    third.rename(path / "third")
    with pytest.raises(BankError, match="number 3 of .* is missing"):
        find_groups(path)
    (path / "third").rename(third)
    assert_same(choose(find_groups(path)).checkpoints[0], unet(1).state_dict())
    (path / "index").rename(inside / "diffusion_pytorch_model.safetensors.index.json")
    unet(2).save_pretrained(path / "whole")
    shutil.copy(path / "whole" / "diffusion_pytorch_model.safetensors", inside)
    with pytest.raises(BankError, match="the same weights in parts"):
        find_groups(path / "checkpoint-1")


def test_variants(folder):
    path = folder("variants")
    for step in STEPS:
        whole = path / "both" / f"checkpoint-{step}" / "unet"
        unet(step).save_pretrained(whole)
        unet(step).half().save_pretrained(whole, variant="fp16")
        unet(step).half().save_pretrained(path / "half" / f"checkpoint-{step}" / "unet", variant="fp16")
        parts = path / "parts" / f"checkpoint-{step}" / "unet"
        unet(step).half().save_pretrained(parts, variant="fp16", max_shard_size="10KB")
    both, half, parts = (choose(find_groups(path / name)) for name in ("both", "half", "parts"))
    assert said(both, "variants passed over: fp16")
    assert_same(both.checkpoints[1], loaded(path / "both" / "checkpoint-100" / "unet"))
    assert said(half, "the variant `fp16` is read (there is no full precision)")
    for name, group in (("half", half), ("parts", parts)):
        read = loaded(path / name / "checkpoint-100" / "unet", variant="fp16", torch_dtype=torch.float16)
        assert_same(group.checkpoints[1], read)
    unet(1).bfloat16().save_pretrained(path / "half" / "checkpoint-50" / "unet", variant="bf16")
    with pytest.raises(BankError, match="in the variants bf16, fp16 and not in full precision"):
        find_groups(path / "half")


def test_safetensors_comes_before_bin(folder):
    path = folder("formats")
    unet(1).save_pretrained(path / "checkpoint-1" / "unet")
    unet(2).save_pretrained(path / "checkpoint-1" / "unet", safe_serialization=False)
    unet(2).save_pretrained(path / "checkpoint-2" / "unet", safe_serialization=False)
    group = choose(find_groups(path))
    assert [item.format for item in group.checkpoints] == ["safetensors", "torch"]
    assert_same(group.checkpoints[0], unet(1).state_dict())
    assert_same(group.checkpoints[1], loaded(path / "checkpoint-2" / "unet", use_safetensors=False))
    assert said(group, ".safetensors is read, the same in .bin passed over")
    assert said(group, "several formats: safetensors, torch")


# ----------------------------------------------------------------------------- training scripts on accelerate


@pytest.fixture(scope="session")
def trained(folder):
    """What diffusers' train_unconditional.py leaves: `unet` and `unet_ema` in each step, the pipeline beside them."""
    path = folder("trained")
    accelerator = Accelerator(cpu=True)
    model = unet(0)
    ema = EMAModel(model.parameters(), decay=0.9999, model_cls=UNet2DModel, model_config=model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def save(models, weights, output_dir):
        ema.save_pretrained(f"{output_dir}/unet_ema")
        for one in models:
            one.save_pretrained(f"{output_dir}/unet")
            weights.pop()

    accelerator.register_save_state_pre_hook(save)
    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        scheduler.step()
        ema.step(model.parameters())
        accelerator.save_state(path / f"checkpoint-{step * 500}")
    DDPMPipeline(unet(9), DDIMScheduler()).save_pretrained(path)
    return path


def test_trainer_with_ema(trained):
    groups = find_groups(trained)
    assert [(g.label, g.layout, g.steps) for g in groups] == [
        ("unet raw", "accelerate trainer", (500, 1000, 1500)),
        ("unet ema 0.9999", "accelerate trainer", (500, 1000, 1500)),
    ]
    chosen = choose(groups)
    assert chosen.kind == "raw"
    assert said(chosen, "raw weights are taken; the EMA beside them is a combination of them")
    assert said(chosen, "passed over (training state): checkpoint-1000/optimizer.bin and 8 others")
    assert said(chosen, "passed over (no weights or no step): scheduler/ and 1 other")
    for weights, part in (("raw", "unet"), ("ema", "unet_ema"), ("ema:0.9999", "unet_ema")):
        for item in choose(groups, weights=weights).checkpoints:
            assert_same(item, loaded(trained / f"checkpoint-{item.step}" / part))
    assert choose(groups, component="unet_ema").kind == "ema"
    first, *others = [item for group in groups for item in group.checkpoints]
    assert all(item.arch == first.arch for item in others), "the EMA's counters are no part of the network"
    with pytest.raises(BankError, match=r"no `ema:0.5` weights .* `bank.weights=raw`, `bank.weights=ema:0.9999`"):
        choose(groups, weights="ema:0.5")


def test_a_step_without_ema_is_said(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "trained")
    shutil.rmtree(path / "checkpoint-1000" / "unet_ema")
    raw, ema = find_groups(path)
    assert (raw.steps, ema.steps) == ((500, 1000, 1500), (500, 1500))
    assert said(ema, "steps that only other weights have: 1000")
    assert not said(raw, "only other weights")


def test_accelerate_alone_rotated_and_with_two_models(folder):
    path = folder("accelerate")
    config = ProjectConfiguration(project_dir=str(path), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=config)
    first, second = accelerator.prepare(net(1), unet(1))
    expected = {}
    for step in range(4):
        torch.nn.init.constant_(first.head.bias, float(step))
        expected[step] = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        accelerator.save_state()
    groups = by_label(find_groups(path))
    assert list(groups) == ["model raw", "model_1 raw"]
    group = groups["model raw"]
    assert (group.layout, group.steps) == ("accelerate trainer", (2, 3))
    assert said(group, "found in `checkpoints`")
    for item in group.checkpoints:
        assert_same(item, expected[item.step])
    assert_same(groups["model_1 raw"].checkpoints[0], second.state_dict())
    assert choose(list(groups.values())).component == "model", "the other network is the same in all steps"
    inner = by_label(find_groups(path / "checkpoints" / "checkpoint_3"))
    assert {label: g.steps for label, g in inner.items()} == {"model raw": (3,), "model_1 raw": (3,)}


def test_accelerate_without_safetensors(folder):
    path = folder("accelerate_bin")
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net(3))
    for step in STEPS:
        accelerator.save_state(path / f"step_{step}", safe_serialization=False)
    group = choose(find_groups(path))
    assert (group.label, group.layout, group.steps) == ("raw", "accelerate trainer", STEPS)
    assert_same(group.checkpoints[0], model.state_dict())
    assert_same(group.checkpoints[0], torch.load(path / "step_50" / "pytorch_model.bin", weights_only=True))

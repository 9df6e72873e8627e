"""Torch files in one folder: openai's names, DiT and SiT, lucidrains, ema-pytorch, AveragedModel, plain ones."""

from __future__ import annotations

import argparse
import collections

import pytest
import torch
from ema_pytorch import EMA, PostHocEMA
from helpers_layouts import STEPS, assert_same, by_label, net, said
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lcsc.bank.find import choose, find_groups
from lcsc.core.errors import BankError


def trained(model):
    """An optimizer that has a state."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture(scope="session")
def openai(folder):
    """consistency_models/cm/train_util.py: `save()` writes these names."""
    path = folder("openai")
    for step in (100, 1000, 840000):
        model = net(step)
        optimizer = trained(model)
        torch.save(model.state_dict(), path / f"model{step:06d}.pt")
        for k, rate in enumerate(("0.999", "0.9999", "0.9999432189950708")):
            torch.save(net(step + k + 1).state_dict(), path / f"ema_{rate}_{step:06d}.pt")
        torch.save(optimizer.state_dict(), path / f"opt{step:06d}.pt")
        torch.save(net(step + 7).state_dict(), path / f"target_model{step:06d}.pt")
        torch.save(net(step + 8).state_dict(), path / f"teacher_model{step:06d}.pt")
    return path


def test_openai(openai):
    groups = by_label(find_groups(openai))
    assert list(groups) == ["raw", "ema 0.999", "ema 0.9999", "ema 0.9999432189950708"]
    for label, group in groups.items():
        assert (group.layout, group.steps) == ("openai", (100, 1000, 840000)), label
        assert said(group, "passed over (training state): opt000100.pt and 8 others")
        for item in group.checkpoints:
            stem = f"ema_{item.rate}_{item.step:06d}" if item.rate else f"model{item.step:06d}"
            assert_same(item, torch.load(openai / f"{stem}.pt", weights_only=True))
    chosen = choose(list(groups.values()))
    assert chosen.kind == "raw"
    assert said(chosen, "(`bank.weights=ema:0.999`, `bank.weights=ema:0.9999`, `bank.weights=ema:0.9999432189950708`")
    assert choose(list(groups.values()), weights="ema:0.99990").rate == "0.9999"
    with pytest.raises(BankError, match="several EMAs, which are never mixed. Choose one: `bank.weights=ema:0.999`, "):
        choose(list(groups.values()), weights="ema")


def test_ema_alone_and_several_rates(openai, tmp_path):
    for file in openai.glob("ema_0.9999_*.pt"):
        (tmp_path / file.name).symlink_to(file)
    group = choose(find_groups(tmp_path))
    assert (group.kind, group.rate, group.steps) == ("ema", "0.9999", (100, 1000, 840000))
    (tmp_path / "ema_0.5_000100.pt").symlink_to(openai / "ema_0.999_000100.pt")
    with pytest.raises(BankError, match="`bank.weights=ema:0.5`, `bank.weights=ema:0.9999`"):
        choose(find_groups(tmp_path))


def test_one_file_given_directly(openai):
    group = choose(find_groups(openai / "ema_0.9999_840000.pt"))
    assert (group.kind, group.rate, group.steps) == ("ema", "0.9999", (840000,))


def test_dit_and_sit(folder):
    """DiT/train.py: `model`, `ema`, `opt` and a namespace, in `<experiment>/checkpoints/<step:07d>.pt`."""
    path = folder("dit")
    inside = path / "000-DiT-XL-2" / "checkpoints"
    inside.mkdir(parents=True)
    for step in STEPS:
        model, optimizer = net(step), trained(net(step))
        state = {
            "model": model.state_dict(),
            "ema": net(step + 1).state_dict(),
            "opt": optimizer.state_dict(),
            "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4),
        }
        torch.save(state, inside / f"{step:07d}.pt")
    for given in (path, inside, path / "000-DiT-XL-2"):
        groups = find_groups(given)
        assert [(g.label, g.layout, g.steps) for g in groups] == [("raw", "DiT/SiT", STEPS), ("ema", "DiT/SiT", STEPS)]
    for group, key in zip(groups, ("model", "ema"), strict=True):
        for item in group.checkpoints:
            whole = torch.load(inside / f"{item.step:07d}.pt", weights_only=False)
            assert_same(item, whole[key])
    assert said(groups[0], "passed over inside: `opt` (training state)")


def test_lucidrains_trainer(folder):
    """denoising_diffusion_pytorch's Trainer.save: a milestone in the name, the EMA's module around both networks."""
    path = folder("lucidrains")
    for milestone in (2, 10):
        model = net(milestone)
        ema = EMA(model, beta=0.995, update_every=1, update_after_step=0)
        for _ in range(3):
            torch.nn.init.normal_(model.head.weight)
            ema.update()
        state = {
            "step": milestone * 1000,
            "model": model.state_dict(),
            "opt": trained(net(1)).state_dict(),
            "ema": ema.state_dict(),
            "scaler": None,
            "version": "2.2.6",
        }
        torch.save(state, path / f"model-{milestone}.pt")
    raw, ema = find_groups(path)
    assert [(g.label, g.layout, g.steps) for g in (raw, ema)] == [
        ("raw", "lucidrains", (2, 10)),
        ("ema", "lucidrains", (2, 10)),
    ]
    for a, b in zip(raw.checkpoints, ema.checkpoints, strict=True):
        whole = torch.load(a.path, weights_only=True)
        assert_same(a, whole["model"])
        restored = EMA(net(0))
        restored.load_state_dict(whole["ema"])
        assert_same(b, restored.ema_model.state_dict())
    assert said(ema, "`online_model` (the raw weights stand beside it)")


def test_ema_pytorch_alone(folder):
    path = folder("ema")
    for step in STEPS:
        ema = EMA(net(step), update_after_step=0, update_every=1)
        ema.update()
        torch.nn.init.normal_(ema.online_model.head.weight)
        torch.save(ema.state_dict(), path / f"ema_{step}.pt")
    groups = by_label(find_groups(path))
    assert {label: (g.layout, g.steps) for label, g in groups.items()} == {
        "raw": ("ema-pytorch", STEPS),
        "ema": ("ema-pytorch", STEPS),
    }
    whole = EMA(net(0))
    whole.load_state_dict(torch.load(path / "ema_50.pt", weights_only=True))
    assert_same(groups["raw"].checkpoints[0], whole.online_model.state_dict())
    assert_same(groups["ema"].checkpoints[0], whole.ema_model.state_dict())


def test_post_hoc_ema(folder):
    """Names are `{index}.{step}.pt`; all is float16, so that the step inside is lost from 65,520 on."""
    path = folder("posthoc")
    model = net(1)
    ema = PostHocEMA(
        model, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_every_num_steps="manual", checkpoint_folder=str(path)
    )
    for step in (8000, 9000, 70000):
        for one in ema.ema_models:
            one.step.fill_(step)
        torch.nn.init.normal_(model.head.weight)
        ema.update()
        for one in ema.ema_models:
            one.step.fill_(step)
        ema.checkpoint()
    groups = find_groups(path)
    assert [(g.label, g.layout) for g in groups] == [(f"ema {k}", "ema-pytorch PostHocEMA") for k in (0, 1)]
    for k, group in enumerate(groups):
        assert group.steps == (8000, 9000, 70000)
        assert said(group, "the rates are the indices of its EMAs")
        assert said(group, "passed over inside: `initted` (a counter), `step` (a counter)")
        for item in group.checkpoints:
            saved = torch.load(path / f"{k}.{item.step}.pt", weights_only=True)
            assert_same(item, {name[10:]: t for name, t in saved.items() if name.startswith("ema_model.")})
            assert {s.dtype for s in item.table.values()} == {"float16"}
    with pytest.raises(BankError, match="`bank.weights=ema:0`, `bank.weights=ema:1`"):
        choose(groups)


def test_averaged_model(folder):
    path = folder("averaged")
    for step in STEPS:
        averaged = AveragedModel(net(step), multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        averaged.update_parameters(net(step + 1))
        torch.save(averaged.state_dict(), path / f"averaged-{step}.pth")
    group = choose(find_groups(path))
    assert (group.label, group.steps) == ("ema", STEPS)
    whole = AveragedModel(net(0))
    whole.load_state_dict(torch.load(path / "averaged-1000.pth", weights_only=True))
    assert_same(group.checkpoints[-1], whole.module.state_dict())
    assert said(group, "`n_averaged` (a counter)")


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": tensors, "optimizer": trained(net(1)).state_dict(), "step": 12},
        lambda tensors: {"model_state_dict": tensors, "loss": torch.tensor(1.5)},
        lambda tensors: collections.OrderedDict(net=tensors, scheduler={"last_epoch": 3}),
        lambda tensors: {"model": {"state_dict": tensors}},
    ],
    ids=["flat", "state_dict", "model", "model_state_dict", "net", "nested"],
)
def test_wrappers(tmp_path, wrap, ending):
    for step in STEPS:
        torch.save(wrap(net(step).state_dict()), tmp_path / f"net_{step}.{ending}")
    group = choose(find_groups(tmp_path))
    assert (group.label, group.layout, group.steps) == ("raw", "torch files", STEPS)
    for item in group.checkpoints:
        assert_same(item, net(item.step).state_dict())


def test_two_kinds_in_one_file(tmp_path):
    """BasicSR keeps `params` and `params_ema`; a module may hold its EMA under another name."""
    for step in STEPS:
        raw, ema = net(step).state_dict(), net(step + 1).state_dict()
        torch.save({"params": raw, "params_ema": ema}, tmp_path / f"net_g_{step}.pth")
    both = by_label(find_groups(tmp_path))
    assert {label: g.steps for label, g in both.items()} == {"raw": STEPS, "ema": STEPS}
    assert_same(both["ema"].checkpoints[0], net(51).state_dict())
    whole = torch.nn.ModuleDict({"net": net(1), "net_ema": net(2)})
    path = tmp_path / "one.pt"
    torch.save(whole.state_dict(), path)
    both = by_label(find_groups(path))
    for label, seed in (("raw", 1), ("ema", 2)):
        assert_same(both[label].checkpoints[0], {f"net.{name}": t for name, t in net(seed).state_dict().items()})


def test_several_networks_are_never_mixed(tmp_path):
    for step in STEPS:
        torch.save(net(step).state_dict(), tmp_path / f"unet-{step}.pt")
        torch.save(net(step + 1).state_dict(), tmp_path / f"text_encoder-{step}.pt")
        torch.save(net(step + 2).state_dict(), tmp_path / f"vae-{step}.pt")
    groups = find_groups(tmp_path)
    assert [group.label for group in groups] == ["text-encoder raw", "unet raw", "vae raw"]
    chosen = choose(groups)
    assert chosen.component == "unet"
    assert_same(chosen.checkpoints[0], net(50).state_dict())
    for step in STEPS:
        (tmp_path / f"unet-{step}.pt").unlink()
    with pytest.raises(BankError, match="Choose one: `bank.component=text-encoder`, `bank.component=vae`"):
        choose(find_groups(tmp_path))
    torch.save({"G": net(1).state_dict(), "D": net(2).state_dict()}, tmp_path / "gan.pt")
    gan = by_label(find_groups(tmp_path / "gan.pt"))
    assert_same(gan["D raw"].checkpoints[0], net(2).state_dict())
    assert_same(gan["G raw"].checkpoints[0], net(1).state_dict())


def test_files_without_a_step(tmp_path):
    for step in STEPS:
        torch.save(net(step).state_dict(), tmp_path / f"run-{step}.pt")
    torch.save(net(1).state_dict(), tmp_path / "run.pt")
    torch.save({"global_step": 2000, "state_dict": net(2).state_dict()}, tmp_path / "last.ckpt")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "run-2000.pt.tmp").write_bytes(b"half")
    group = choose(find_groups(tmp_path))
    assert group.steps == (*STEPS, 2000)
    assert_same(group.checkpoints[-1], net(2).state_dict())
    assert said(group, "passed over (no step in the name or the file): run.pt")
    assert said(group, "passed over (no step in the name): broken.pt")
    assert said(group, "passed over (no weights): .cache and 1 other")


def test_nothing_and_unfit_values(tmp_path):
    with pytest.raises(BankError, match=r"no checkpoint found under .*Tried checkpoint-<step>/<component>/"):
        find_groups(tmp_path / "nowhere")
    torch.save([torch.zeros(3)], tmp_path / "list-1.pt")
    with pytest.raises(BankError, match="list-1.pt` holds no table of named tensors"):
        find_groups(tmp_path)
    torch.save({"shadow_params": [torch.zeros(3)]}, tmp_path / "list-1.pt")
    with pytest.raises(BankError, match=r"Passed over: `shadow_params` \(tensors without names\)"):
        find_groups(tmp_path)


def test_files_and_folders_with_steps_are_not_mixed(tmp_path):
    torch.save(net(1).state_dict(), tmp_path / "model100.pt")
    (tmp_path / "checkpoint-200").mkdir()
    torch.save(net(1).state_dict(), tmp_path / "checkpoint-200" / "model.pt")
    with pytest.raises(BankError, match=r"steps as files \(`model100.pt`\) and as folders \(`checkpoint-200`\)"):
        find_groups(tmp_path)


def test_epochs_and_steps_are_not_mixed(tmp_path):
    for epoch in (1, 2, 10):
        torch.save(net(epoch).state_dict(), tmp_path / f"net-epoch-{epoch}.pt")
    group = choose(find_groups(tmp_path))
    assert group.steps == (1, 2, 10)
    assert said(group, "the numbers are epochs")
    torch.save(net(3).state_dict(), tmp_path / "net-step-300.pt")
    with pytest.raises(BankError, match="net-step-300.pt` names its step and other checkpoints beside it their epoch"):
        find_groups(tmp_path)

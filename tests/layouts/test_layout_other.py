"""torch DCP folders, plain safetensors, and NVlabs' pickles before and after conversion."""

from __future__ import annotations

import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers_layouts import STEPS, assert_same, net, said
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lcsc.bank.find import choose, find_groups
from lcsc.core.errors import BankError


def save_dcp(state, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled.*")
        dcp.save(state, checkpoint_id=str(path), no_dist=True)


@pytest.fixture(scope="session")
def distributed(folder):
    path = folder("dcp")
    for step in STEPS:
        model = net(step)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": step}
        save_dcp(state, path / f"step-{step}")
    return path


def test_dcp(distributed, tmp_path):
    group = choose(find_groups(distributed))
    assert (group.label, group.layout, group.steps) == ("raw", "torch DCP", STEPS)
    for item in group.checkpoints:
        dcp_to_torch_save(distributed / f"step-{item.step}", tmp_path / "whole.pt")
        assert_same(item, torch.load(tmp_path / "whole.pt", weights_only=False)["model"])
    assert said(group, "passed over inside: `optim` (training state)")
    one = choose(find_groups(distributed / "step-100"))
    assert one.steps == (100,)


def test_flat_dcp_and_an_unfinished_one(distributed, tmp_path):
    for step in (1, 20):
        save_dcp(net(step).state_dict(), tmp_path / f"step-{step}" / "pytorch_model_fsdp_0")
        (tmp_path / f"step-{step}" / "optimizer_0").mkdir()
    unfinished = tmp_path / "step-30"
    shutil.copytree(distributed / "step-50", unfinished)
    (unfinished / ".metadata").unlink()
    group = choose(find_groups(tmp_path))
    assert (group.layout, group.component, group.steps) == ("torch DCP", None, (1, 20))
    assert_same(group.checkpoints[1], net(20).state_dict())
    assert said(group, "passed over (training state): step-1/optimizer_0/ and 1 other")
    assert said(group, "step-30/")


def test_plain_safetensors(tmp_path):
    for step in (9, 10, 1000):
        save_file(net(step).state_dict(), tmp_path / f"model{step}.safetensors")
    (tmp_path / "README.md").write_text("words")
    group = choose(find_groups(tmp_path))
    assert (group.label, group.layout, group.steps) == ("raw", "safetensors", (9, 10, 1000))
    assert group.notes == ("passed over (no weights): README.md",)
    for item in group.checkpoints:
        assert_same(item, load_file(tmp_path / f"model{item.step}.safetensors"))


def test_same_file_in_two_formats_and_a_step_twice(tmp_path):
    for step in (1, 2):
        save_file(net(step).state_dict(), tmp_path / f"net-{step}.safetensors")
        torch.save(net(step).state_dict(), tmp_path / f"net-{step}.ckpt")
    group = choose(find_groups(tmp_path))
    assert [item.format for item in group.checkpoints] == ["safetensors", "safetensors"]
    assert said(group, ".safetensors is read, the same in .ckpt passed over")
    save_file(net(1).state_dict(), tmp_path / "net-00002.safetensors")
    with pytest.raises(BankError, match="step 2 stands twice: `.*net-00002.safetensors` and `.*net-2.safetensors`"):
        find_groups(tmp_path)


def test_sharded_safetensors_without_an_index(tmp_path):
    tensors = net(1).state_dict()
    names = sorted(tensors)
    for k in range(3):
        part = {name: tensors[name] for name in names[k::3]}
        save_file(part, tmp_path / f"net-step5-0000{k + 1}-of-00003.safetensors")
    group = choose(find_groups(tmp_path))
    assert (group.layout, group.steps) == ("sharded safetensors", (5,))
    assert_same(group.checkpoints[0], tensors)
    assert group.checkpoints[0].path.name == "net-step5-00001-of-00003.safetensors"
    save_file(tensors, tmp_path / "net-step5-00003-of-00003.safetensors")
    with pytest.raises(BankError, match="and again in `.*00003-of-00003.safetensors`"):
        find_groups(tmp_path)


def test_steps_inside_the_metadata(tmp_path):
    save_file(net(1).state_dict(), tmp_path / "last.safetensors", {"step": "300"})
    assert choose(find_groups(tmp_path)).steps == (300,)


def test_edm_pickles_need_conversion(tmp_path):
    """edm2/training/training_loop.py: `network-snapshot-<kimg:07d><-std>.pkl` holds a whole module."""
    for kimg in (2048, 4096):
        for std in ("0.050", "0.100"):
            with open(tmp_path / f"network-snapshot-{kimg:07d}-{std}.pkl", "wb") as file:
                pickle.dump({"ema": net(kimg), "dataset_kwargs": {}}, file)
        torch.save({"state": {}}, tmp_path / f"training-state-{kimg:07d}.pt")
    with pytest.raises(BankError, match=r"network-snapshot-0002048-0.050.pkl to=OUT allow_code=true"):
        find_groups(tmp_path)
    for file in tmp_path.glob("*.pkl"):
        save_file(net(int(file.name[17:24])).half().state_dict(), file.with_suffix(".safetensors"))
    groups = find_groups(tmp_path)
    assert [(g.label, g.steps) for g in groups] == [("ema 0.050", (2048, 4096)), ("ema 0.100", (2048, 4096))]
    for group in groups:
        assert group.layout == "EDM (converted)"
        assert said(group, ".safetensors is read, the same in .pkl passed over")
        assert said(group, "thousands of images")
        assert said(group, "passed over (training state): training-state-0002048.pt and 1 other")
        assert_same(group.checkpoints[0], net(2048).half().state_dict())


def test_a_pickle_that_is_no_network_of_edm_is_said(tmp_path):
    (tmp_path / "weights-5.pkl").write_bytes(b"never opened")
    with pytest.raises(BankError, match=r"Pickles such as `weights-5.pkl` are not read; see `lcsc bank convert`"):
        find_groups(tmp_path)


def test_steps_as_folders_of_numbered_files(tmp_path):
    """Names inside may repeat the step; several networks in one component's folder keep their own names."""
    for step in (100, 200):
        folder = tmp_path / f"{step}"
        (folder / "nets").mkdir(parents=True)
        save_file(net(step).state_dict(), folder / f"model_{step}.safetensors")
        save_file(net(step + 1).state_dict(), folder / f"ema_0.99_{step}.safetensors")
        save_file(net(step + 2).state_dict(), folder / "nets" / "clip.safetensors")
        save_file(net(step + 3).state_dict(), folder / "nets" / "flux1.safetensors")
    groups = find_groups(tmp_path)
    assert [(group.label, group.steps) for group in groups] == [
        ("model raw", (100, 200)),
        ("model ema 0.99", (100, 200)),
        ("nets/clip raw", (100, 200)),
        ("nets/flux1 raw", (100, 200)),
    ]
    assert_same(groups[1].checkpoints[0], net(101).state_dict())
    assert_same(groups[3].checkpoints[1], net(203).state_dict())


def test_a_main_network_and_others_in_a_components_folder(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step{step}" / "unet").mkdir(parents=True)
        save_file(net(step).state_dict(), tmp_path / f"step{step}" / "unet" / "model.safetensors")
        save_file(net(9).state_dict(), tmp_path / f"step{step}" / "unet" / "extra.safetensors")
    group = choose(find_groups(tmp_path))
    assert_same(group.checkpoints[1], net(2).state_dict())
    assert said(group, "passed over (no weights): step1/unet/extra.safetensors and 1 other")


def test_whole_file_and_numbered_shards_without_an_index(tmp_path):
    tensors = net(1).state_dict()
    save_file(tensors, tmp_path / "net-5.safetensors")
    save_file(tensors, tmp_path / "net-5-00001-of-00001.safetensors")
    with pytest.raises(BankError, match="net-5.safetensors` and the same weights in parts"):
        find_groups(tmp_path)


def test_a_torch_shard_that_is_nested(tmp_path):
    for k in (1, 2):
        torch.save({"model": net(k).state_dict()}, tmp_path / f"net-7-0000{k}-of-00002.bin")
    with pytest.raises(BankError, match="00001-of-00002.bin` is a shard"):
        find_groups(tmp_path)


def test_files_without_tensors_and_files_that_are_no_weights(tmp_path):
    save_file({}, tmp_path / "net-5.safetensors")
    with pytest.raises(BankError, match="net-5.safetensors` holds no tensor"):
        find_groups(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BankError, match="no checkpoint found under `.*notes.txt`"):
        find_groups(tmp_path / "notes.txt")
    with pytest.raises(BankError, match="cannot be looked at: File name too long"):
        find_groups(tmp_path / ("x" * 5000))


def test_all_files_without_a_step_are_damaged(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").write_bytes(b"")
    with pytest.raises(BankError, match="a.pt` is empty"):
        find_groups(tmp_path)


def test_a_damaged_run_beside_a_good_one_is_said(tmp_path):
    (tmp_path / "good").mkdir()
    save_file(net(1).state_dict(), tmp_path / "good" / "net-1.safetensors")
    (tmp_path / "bad").mkdir()
    save_file(net(1).state_dict(), tmp_path / "bad" / "net-00002-of-00002.safetensors")
    group = choose(find_groups(tmp_path))
    assert group.steps == (1,)
    assert said(group, "passed over, it cannot be read: ")


def test_components_of_other_sizes_are_not_constant(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"step{step}"
        for name in ("one", "two", "three"):
            (folder / name).mkdir(parents=True)
        save_file(net(1).state_dict(), folder / "one" / "model.safetensors", {"step": "x" * 8 * step})
        save_file({"w": torch.zeros(3)}, folder / "two" / "model.safetensors")
        save_file({"w": torch.zeros(3)}, folder / "three" / "model.safetensors")
    groups = find_groups(tmp_path)
    assert choose(groups).component == "one", "the other two are the same in all steps"
    with pytest.raises(BankError, match="no component named `four`"):
        choose(groups, component="four")


def test_a_rate_that_is_no_number(tmp_path):
    save_file(net(1).state_dict(), tmp_path / "ema_0.5_100.safetensors")
    save_file(net(2).state_dict(), tmp_path / "ema_100.safetensors")
    groups = find_groups(tmp_path)
    assert choose(groups, weights="ema:.50").rate == "0.5"
    with pytest.raises(BankError, match="no `ema:half` weights"):
        choose(groups, weights="ema:half")

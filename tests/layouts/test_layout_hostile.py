"""Folders and names made to mislead, to block or to cost: refused or passed over, soon, and within the folder."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from helpers_layouts import assert_same, net, said
from safetensors.torch import save_file

from lcsc.bank.extents import Piece, Source
from lcsc.bank.find import choose, find_groups
from lcsc.bank.names import parse, parse_component
from lcsc.bank.unwrap import unwrap
from lcsc.core.errors import BankError


@pytest.fixture
def quick():
    """A second at most for what a test does."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 1


def source(offset=0):
    return Source("float32", (1,), (Piece(0, offset, (1,)),))


def run(path):
    for step in (1, 2):
        save_file(net(step).state_dict(), path / f"model{step}.safetensors")
    return path


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink("nowhere", p)])
def test_special_files_with_a_step_are_refused_without_opening_them(tmp_path, quick, make):
    make(run(tmp_path) / "model3.safetensors")
    with pytest.raises(BankError, match="model3.safetensors` is (a named pipe|a device|a link to nowhere)"):
        find_groups(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_special_configurations_are_refused(tmp_path, quick, name):
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    os.mkfifo(tmp_path / name)
    with pytest.raises(BankError, match=f"{name}` is a named pipe"):
        find_groups(tmp_path)


def test_links_in_circles_are_passed_over(tmp_path, quick):
    run(tmp_path)
    os.symlink("self", tmp_path / "self")
    os.symlink(tmp_path, tmp_path / "checkpoint-7")
    os.symlink("..", tmp_path / "sub")
    assert choose(find_groups(tmp_path)).steps == (1, 2)
    deep = tmp_path / "deep"
    deep.mkdir()
    os.symlink(deep, deep / "again")
    with pytest.raises(BankError, match="no checkpoint found"):
        find_groups(deep)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path, quick):
    outside = tmp_path / "secret.safetensors"
    save_file({"w": torch.ones(2)}, outside)
    inside = tmp_path / "run" / "checkpoint-1"
    inside.mkdir(parents=True)
    index = inside / "model.safetensors.index.json"
    for name in ("../../secret.safetensors", str(outside), "..\\secret.safetensors", "", "."):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(BankError, match="only plain names"):
            find_groups(tmp_path / "run")
    os.symlink(outside, inside / "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(BankError, match="link out of its folder"):
        find_groups(tmp_path / "run")


def test_links_that_lie_in_the_folder_are_followed(tmp_path, quick):
    """They are the user's, who collects checkpoints that way; those of shards that an index names are not."""
    there, here = tmp_path / "elsewhere", tmp_path / "run"
    (there / "checkpoint-3").mkdir(parents=True)
    here.mkdir()
    save_file({"w": torch.ones(2)}, there / "x.safetensors")
    (there / "config.json").write_text('{"_class_name": "Net", "size": 2}')
    for name in ("model1.safetensors", "model2.safetensors"):
        os.symlink(there / "x.safetensors", here / name)
    os.symlink(there / "config.json", here / "config.json")
    group = choose(find_groups(here))
    assert group.steps == (1, 2)
    assert group.checkpoints[0].arch == {"class": "Net", "config": {"size": 2}}
    for k in (1, 2):
        save_file({f"w{k}": torch.ones(2)}, there / "checkpoint-3" / f"model-0000{k}-of-00002.safetensors")
    os.symlink(there / "checkpoint-3", tmp_path / "checkpoint-3")
    assert len(choose(find_groups(tmp_path / "checkpoint-3")).checkpoints[0].files) == 2


def test_configurations_are_data(tmp_path, quick):
    """Nothing that a configuration names is looked up, let alone run."""
    run(tmp_path)
    config = {"_class_name": "os.system", "_target_": "os.system", "auto_map": {"AutoModel": "evil.py"}, "x": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    item = choose(find_groups(tmp_path)).checkpoints[0]
    assert item.arch["class"] == "os.system"
    assert item.arch["config"]["x"] == 1
    for text in ("[" * 100_000, '{"_class_name":' + '{"a":' * 90_000, "{" * 10, "\x00", '{"a": 1, "a": 2}', "[1, 2]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BankError, match="config.json`"):
            find_groups(tmp_path)


def test_names_that_cost_time(quick):
    """Regular expressions and the search for EMA copies stay quick on names a model would never have."""
    for text in ("_" * 10**6, "ema_" * 10**5, "1" * 10**6, "a=" * 10**5, "-000001" * 10**5, "0." * 10**5):
        assert parse(text).step is None
        assert parse_component(text) == (text, None, None)
    for text in ("_" * 500, "ema_" * 120, "1" * 500, "a=" * 250, "epoch=" * 80, "v1-" * 160):
        parse(text)
        parse_component(text)


@pytest.mark.parametrize(
    "names",
    [
        [f"a{n}.ema.w" for n in range(10_000)] + ["w"],
        [f"m{n}.decay" for n in range(5_000)] + [f"m{n}.num_updates.x" for n in range(5_000)],
        ["model_ema.decay", "model_ema.num_updates", "model_ema.w"] + [f"a{n}.b.w" for n in range(10_000)],
        [".".join(["x"] * 60) + f".{n}" for n in range(2_000)] + ["e.decay", "e.num_updates", "e.n"],
    ],
    ids=["heads", "decays", "roots", "dots"],
)
def test_tables_that_cost_time(tmp_path, quick, names):
    file = tmp_path / "f.pt"
    file.write_bytes(bytes(64))
    try:
        found = unwrap({name: source() for name in names}, (file,))
    except BankError:
        return
    assert sum(len(part.table) for part in found.parts) >= len(names) - 3


def test_a_tensor_name_that_is_not_text(tmp_path):
    torch.save({"a\ud800": torch.zeros(2)}, tmp_path / "m1.pt")
    with pytest.raises(BankError, match="m1.pt` holds a tensor name that is not text"):
        find_groups(tmp_path)


def test_a_counter_that_is_a_network_is_not_read(tmp_path):
    tensors = {"model.w": torch.zeros(3), "model_ema.decay": torch.zeros(7), "model_ema.num_updates": torch.tensor(1)}
    torch.save({"state_dict": tensors}, tmp_path / "m1.ckpt")
    assert_same(choose(find_groups(tmp_path)).checkpoints[0], tensors)


def test_a_deep_tree_without_checkpoints_is_not_walked_to_its_end(tmp_path, quick):
    for a in range(12):
        for b in range(12):
            (tmp_path / f"a{chr(97 + a)}" / f"b{chr(97 + b)}" / "c" / "d" / "e" / "f").mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, tmp_path / "aa" / "ba" / "c" / "d" / "e" / "f" / "m1.safetensors")
    with pytest.raises(BankError, match="no checkpoint found"):
        find_groups(tmp_path)


def test_several_runs_are_named(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        run(tmp_path / "runs" / name)
    with pytest.raises(BankError, match="runs` holds several runs: `one`, `two`. Give one of them with `bank.path`"):
        find_groups(tmp_path)
    (tmp_path / "runs" / "two" / "model1.safetensors").unlink()
    (tmp_path / "runs" / "two" / "model2.safetensors").unlink()
    group = choose(find_groups(tmp_path))
    assert group.steps == (1, 2)
    assert said(group, "found in `runs`")
    assert said(group, "found in `one`")

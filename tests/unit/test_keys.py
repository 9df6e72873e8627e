"""The bijection of names: wrappers come off only where all files then agree, and no key is ever lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcsc.bank.extents import Piece, Source
from lcsc.bank.find import Checkpoint, find_groups
from lcsc.bank.keys import agree, strip_wrappers
from lcsc.core.errors import BankError


def checkpoint(step, names, shape=(2,), dtype="float32"):
    table = {name: Source(dtype, shape, (Piece(0, 8 * k, shape),)) for k, name in enumerate(names)}
    return Checkpoint(step, Path(f"run/m{step}.pt"), (Path(f"run/m{step}.pt"),), table, "torch", "raw")


def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleDict({"module": nn.Linear(3, 1)}))


WRAPPERS = {
    "none": lambda net: net,
    "DataParallel": nn.DataParallel,
    "compile": lambda net: torch.compile(net, backend="eager"),
    "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
    "inside": lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_real_wrappers_come_off(tmp_path, wrapper):
    """The oracle is the unwrapped network's own `state_dict`."""
    for step in (1, 2, 3):
        torch.manual_seed(step)
        net = model()
        wrapped = WRAPPERS[wrapper](net) if step == 2 else net
        torch.save(wrapped.state_dict(), tmp_path / f"net-{step}.pt")
    [group] = find_groups(tmp_path)
    for item, table in zip(group.checkpoints, agree(group.checkpoints), strict=True):
        assert set(table) == set(model().state_dict())
        short = {strip_wrappers(name): source for name, source in item.table.items()}
        assert {strip_wrappers(name): source for name, source in table.items()} == short


def test_names_stay_where_all_files_agree():
    wrapped = [checkpoint(step, ["module.a", "module.b"]) for step in (1, 2)]
    assert agree(wrapped) == [item.table for item in wrapped]
    assert agree(wrapped)[0] is wrapped[0].table


def test_a_network_with_a_module_called_module_keeps_it():
    plain, wrapped = checkpoint(1, ["module.a", "module.b"]), checkpoint(2, ["module.module.a", "module.module.b"])
    first, second = agree([plain, wrapped])
    assert list(first) == list(second) == ["module.a", "module.b"]
    assert second["module.b"] is wrapped.table["module.module.b"]


def test_different_wrappers_meet_at_the_bare_name():
    first, second = agree([checkpoint(1, ["module.a"]), checkpoint(2, ["_orig_mod.a"])])
    assert list(first) == list(second) == ["a"]


def test_two_names_that_become_one_are_refused():
    items = [checkpoint(1, ["a", "b"]), checkpoint(2, ["module.a", "a"])]
    with pytest.raises(BankError, match=r"`b` is only in step 1; `module.a` is only in step 2"):
        agree(items)


def test_both_paths_shapes_and_kinds_are_named():
    with pytest.raises(BankError, match=r"checkpoints `run/m1.pt` and `run/m2.pt` differ: `a` is \(2,\) vs \(3,\)"):
        agree([checkpoint(1, ["a"]), checkpoint(2, ["a"], (3,))])
    with pytest.raises(BankError, match="`a` is float32 vs int64"):
        agree([checkpoint(1, ["a"]), checkpoint(2, ["a"], dtype="int64")])
    assert len(agree([checkpoint(1, ["a"]), checkpoint(2, ["a"], dtype="bfloat16")])) == 2


def test_ten_differences_are_named_and_the_rest_counted():
    many = [f"k{n:02d}" for n in range(25)]
    with pytest.raises(BankError, match=r"`k09` is only in step 1 and 15 more\.") as caught:
        agree([checkpoint(1, many), checkpoint(2, [])])
    assert str(caught.value).count("is only in") == 10


def test_a_tied_tensor_that_one_file_lacks_is_an_error_with_its_twin():
    tied = checkpoint(1, ["embed", "head"])
    tied.table["head"] = tied.table["embed"]
    assert agree([tied, tied])[1] is tied.table
    with pytest.raises(BankError, match=r"`head` is only in step 1 \(there tied to `embed`"):
        agree([tied, checkpoint(2, ["embed"])])


def test_names_from_files_are_shown_without_control_characters():
    with pytest.raises(BankError) as caught:
        agree([checkpoint(1, ["a", "\x1b[31mred"]), checkpoint(2, ["a"])])
    assert "\x1b" not in str(caught.value)


names = st.lists(
    st.lists(st.sampled_from(["a", "b", "conv", "0", "module", "weight"]), min_size=1, max_size=4).map(".".join),
    min_size=2,
    max_size=8,
    unique=True,
)
prefixes = st.sampled_from(["", "module.", "_orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."])


@settings(max_examples=300, deadline=None)
@given(names, st.lists(prefixes, min_size=2, max_size=5), st.data())
def test_dropping_or_renaming_any_one_key_of_any_file_fails(found, wrapped, data):
    """Mutation: files that agree stop agreeing as soon as one file lacks one tensor, or has another name for it."""
    bare = [strip_wrappers(name) for name in found]
    if len(set(bare)) < len(bare):
        return
    files = [checkpoint(k, [prefix + name for name in found]) for k, prefix in enumerate(wrapped)]
    agreed = agree(files)
    assert all(table.keys() == agreed[0].keys() and len(table) == len(found) for table in agreed)
    for item, table in zip(files, agreed, strict=True):  # tensor k is tensor k in every file
        assert [source.pieces[0].offset for source in table.values()] == [8 * k for k in range(len(found))]
        assert list(table.values()) == list(item.table.values())
    assert [strip_wrappers(name) for name in agreed[0]] == bare
    victim = data.draw(st.sampled_from(files))
    key = data.draw(st.sampled_from(sorted(victim.table)))
    source = victim.table.pop(key)
    with pytest.raises(BankError, match="is only in step"):
        agree(files)
    victim.table[key + "_x"] = source
    with pytest.raises(BankError, match="is only in step"):
        agree(files)

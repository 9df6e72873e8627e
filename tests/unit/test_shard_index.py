"""Shard indices, and what a name inside a checkpoint may lead to."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from huggingface_hub import save_torch_state_dict

from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shard_index import MAX_NAMES, plain_file, read_index, regular_file, shown
from lcsc.core.errors import BankError


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "good.bin").write_bytes(b"12345")
    (tmp_path / "secret").write_bytes(b"no")
    return inside


def index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def test_the_index_the_hub_library_writes(tmp_path):
    tensors = {f"layer.{i}.weight": torch.randn(64, 64) for i in range(8)}
    save_torch_state_dict(tensors, tmp_path, max_shard_size=40_000)
    found = read_index(tmp_path / "model.safetensors.index.json")
    assert found.keys() == tensors.keys()
    assert len(set(found.values())) > 2
    for name, file in found.items():
        assert read_safetensors(tmp_path / file)[0][name].shape == (64, 64)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", ".", "", "a/good.bin", "..\\secret", "C:\\x", "C:x", "good.bin\0", "./good.bin"],
)
def test_names_with_a_path_in_them_are_refused(folder, name):
    with pytest.raises(BankError, match="only plain names of files in the same folder"):
        read_index(index(folder, {"a": "good.bin", "b": name}))


def test_links_must_stay_inside(folder):
    (folder / "out").symlink_to("../secret")
    (folder / "in").symlink_to("good.bin")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.bin").write_bytes(b"1")
    (folder / "down").symlink_to("sub/deep.bin")
    assert plain_file(folder, "in") == folder / "in"
    assert plain_file(folder, "down") == folder / "down"
    with pytest.raises(BankError, match=r"`.*out` is a link out of its folder, to `.*secret`"):
        plain_file(folder, "out")
    with pytest.raises(BankError, match="link out of its folder"):
        read_index(index(folder, {"a": "out"}))


def test_a_folder_that_is_itself_a_link_is_fine(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    assert plain_file(tmp_path / "alias", "good.bin").read_bytes() == b"12345"


def test_the_hub_cache_keeps_its_files_as_links_to_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    revision = repository / "snapshots" / ("f" * 40)
    (revision / "unet").mkdir(parents=True)
    for folder in (repository, tmp_path):
        (folder / "blobs").mkdir()
    for blob in (repository / "blobs" / ("0" * 64), repository / "blobs" / "config", tmp_path / "blobs" / ("0" * 64)):
        blob.write_bytes(b"123")
    links = {
        "good": "../../blobs/" + "0" * 64,
        "unnamed": "../../blobs/config",
        "other": "../../../blobs/" + "0" * 64,
    }
    for name, target in links.items():
        (revision / name).symlink_to(target)
    (revision / "unet" / "good").symlink_to("../../../blobs/" + "0" * 64)
    assert plain_file(revision, "good").read_bytes() == b"123"
    assert plain_file(revision / "unet", "good").read_bytes() == b"123"
    for name in ("unnamed", "other"):
        with pytest.raises(BankError, match="link out of its folder"):
            plain_file(revision, name)
    repository.rename(tmp_path / "plain")  # not a repository folder of the cache
    with pytest.raises(BankError, match="link out of its folder"):
        plain_file(tmp_path / "plain" / "snapshots" / ("f" * 40), "good")


def test_only_regular_files_are_looked_into(folder, monkeypatch):
    os.mkfifo(folder / "fifo")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    (folder / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)  # a socket's name is short
        server.bind("socket")
    expected = {
        "fifo": "is a named pipe",
        "nowhere": "is a link to nowhere",
        "loop": "cannot be looked at: Too many levels of symbolic links",
        "zero": "is a device",
        "socket": "is a socket",
        "absent": "does not exist",
        "n" * 300: "cannot be looked at: File name too long",
        "nul\0": "cannot be looked at",
    }
    for name, sentence in expected.items():
        with pytest.raises(BankError, match=sentence):
            regular_file(folder / name)
    with pytest.raises(BankError, match="is a folder"):
        regular_file(folder)
    assert regular_file(folder / "good.bin") == 5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "does not hold valid JSON"),
        ("[]", "holds a JSON list, not an object"),
        ("{}", "has no `weight_map`"),
        ('{"weight_map": {}}', "has no `weight_map`"),
        ('{"weight_map": {"a": 1}}', "names no file for `a`, but 1"),
        ('{"weight_map": {"a": "good.bin", "a": "good.bin"}}', "`a` stands in it twice"),
        ('{"weight_map": ' + "[" * 900 + "]" * 900 + "}", "no `weight_map`|nested without end"),
        ('{"weight_map": ' + "[" * 9000 + "]" * 9000 + "}", "more names than any model"),
        ('{"weight_map": {"a": "absent.bin"}}', "does not exist"),
    ],
)
def test_damaged_indices(folder, text, sentence):
    (folder / "i.json").write_text(text)
    with pytest.raises(BankError, match=sentence):
        read_index(folder / "i.json")


def test_as_many_names_as_the_largest_models_have(folder):
    many = {f"model.layers.{i}.w": "good.bin" for i in range(140_000)}
    assert len(many) < MAX_NAMES
    assert read_index(index(folder, many)) == many


def test_shown_is_one_short_printable_line():
    assert shown("a.b") == "a.b"
    assert shown("\x1b[31mred\n`") == "\\x1b[31mred\\n'"
    assert shown("x" * 500) == "x" * 117 + "..."
    assert len(shown({"a": [[[[[[[[["x" * 9999] * 999]]]]]]]]})) <= 120
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "[[[[[[[...]]]]]]]"

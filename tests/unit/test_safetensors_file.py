"""The header reader against the safetensors library, and one sentence for each lie."""

from __future__ import annotations

import json
import os
import struct
import time

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank.extents import ITEMSIZE, Piece, Source, read_source
from lcsc.bank.safetensors_file import DTYPES, MAX_HEADER, MAX_TENSORS, read_safetensors
from lcsc.core.errors import BankError


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("code", [code for code, name in DTYPES.items() if name in ITEMSIZE])
def test_each_dtype_has_the_bits_the_library_wrote(tmp_path, code):
    dtype = getattr(torch, DTYPES[code])
    bits = torch.arange(5 * 3 * ITEMSIZE[DTYPES[code]], dtype=torch.uint8)
    tensor = (bits % 2 if dtype == torch.bool else bits).view(dtype).reshape(5, 3)
    path = tmp_path / "a.safetensors"
    save_file({"w": tensor}, path)
    table, metadata = read_safetensors(path, part=2)
    assert table.keys() == {"w"}
    assert metadata == {}
    assert table["w"].dtype == str(dtype).removeprefix("torch.")
    assert [piece.part for piece in table["w"].pieces] == [2]
    assert read_source([path] * 3, table["w"]).tobytes() == raw(load_file(path)["w"]) == raw(tensor)


def test_names_shapes_order_and_metadata_are_the_librarys(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "empty.too": torch.zeros(3, 0, dtype=torch.int64),
        "ünïcode \U0001f600 name": torch.randn(2, 3, 4),
        "": torch.ones(1),
        "../etc/passwd": torch.arange(4),
        'quote"back\\slash\nline': torch.zeros(2, dtype=torch.bool),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"format": "pt", "ss_steps": "12", "ключ": "значение"})
    table, metadata = read_safetensors(path)
    expected = load_file(path)
    assert {name: source.shape for name, source in table.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    for name, tensor in expected.items():
        assert read_source([path], table[name]).tobytes() == raw(tensor), name
    with safetensors.safe_open(path, "pt") as handle:
        assert metadata == handle.metadata()
    assert all(source.plain for source in table.values())


def test_a_file_of_metadata_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({}, path, {"a": "b"})
    assert read_safetensors(path) == ({}, {"a": "b"})


def test_only_the_header_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: asked.append((offset, size)) or pread(fd, size, offset))
    table, _ = read_safetensors(path)
    assert asked == [(0, 8), (8, length)]
    assert table == {"w": Source("float32", (1000,), (Piece(0, 8 + length, (1000,)),))}


def test_a_hundred_headers_of_a_large_unet_take_under_a_second(tmp_path):
    """CPU time, best of three rounds of twenty headers; 0.12 s a round on the machine it was written on."""
    path = tmp_path / "a.safetensors"
    save_file({f"down_blocks.{i}.resnets.0.conv1.weight": torch.zeros(4, 4, 3, 3) for i in range(686)}, path)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        for _ in range(20):
            read_safetensors(path)
        best = min(best, time.process_time() - start)
    assert best < 0.4  # twice the promise: a busy machine has cold caches


A = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "size", "sentence"),
    [
        ({"a": A}, 15, "truncated: its tensors need 16 bytes of data and 15 are there"),
        ({"a": A}, 17, "has 1 bytes behind its last tensor"),
        ({"a": A, "b": A | {"data_offsets": [8, 24]}}, 24, "`b` begins at data byte 8, where 16 was due: it overlaps"),
        ({"a": A, "b": A | {"data_offsets": [20, 36]}}, 36, "`b` begins at data byte 20, where 16 was due: it leaves"),
        ({"a": A | {"shape": [5]}}, 16, r"`a` has shape \[5\] and dtype F32, 20 bytes, but lies at \[0, 16\]"),
        ({"a": A | {"shape": [-4]}}, 16, r"`a` has the shape \[-4\], which no file can hold"),
        ({"a": A | {"shape": [1 << 62, 4, 0]}}, 16, "which no file can hold"),
        ({"a": A | {"shape": [True]}}, 16, "which no file can hold"),
        ({"a": A | {"dtype": "F4"}}, 16, "`a` has the dtype `F4`; known are F64, F32,"),
        ({"a": A | {"dtype": "F6_E3M2"}}, 16, "`a` has the dtype `F6_E3M2`"),
        ({"a": {"dtype": "F32"}}, 16, "not by dtype, shape and data_offsets"),
        ({"a": A, "__metadata__": {"step": 3}}, 16, "metadata that is not a table of texts"),
        (b'{"a":1,"a":1}', 0, "`a` stands in it twice"),
        (b'{"a":', 0, "does not hold valid JSON"),
        (b'{"\xff":1}', 0, "text that is not UTF-8"),
        (b'{"\\ud800":1}', 0, "text that is not UTF-8"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, 0, "not by dtype|nested without end"),
        (b"[]", 0, "must begin with a brace"),
    ],
)
def test_each_lie_has_its_sentence(tmp_path, header, size, sentence):
    path = write(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(BankError, match=sentence):
        read_safetensors(path)


def test_sizes_beyond_the_limits(tmp_path):
    path = write(tmp_path / "a.safetensors", b"{}" + b" " * MAX_HEADER)
    with pytest.raises(BankError, match=f"at most {MAX_HEADER} are read"):
        read_safetensors(path)
    many = {f"a{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}
    with pytest.raises(BankError, match=f"{MAX_TENSORS}|more names than any model"):
        read_safetensors(write(path, many))
    del many["a0"]
    assert len(read_safetensors(write(path, many))[0]) == MAX_TENSORS


def test_what_is_not_a_safetensors_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(BankError, match=r"Git LFS pointer, not the file. Fetch it with `git lfs pull`"):
        read_safetensors(path)
    path.write_bytes(b"1234567")
    with pytest.raises(BankError, match="has 7 bytes, too few"):
        read_safetensors(path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(BankError, match="truncated or not a safetensors file"):
        read_safetensors(path)

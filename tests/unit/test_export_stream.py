"""Safetensors files written in pieces are those that the libraries write and read."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lcsc.bank.layout import Layout
from lcsc.core.errors import ConfigError, NonFiniteError
from lcsc.export.stream import (
    ModelWriter,
    Spec,
    header_bytes,
    index_bytes,
    overflows,
    parse_size,
    plan_files,
    round_to,
    writing,
)

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def floats():
    """Float32 numbers of every exponent, with the bits below bfloat16 at, just above and just below ties."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001], np.uint32)
    values = (upper[:, None] | lower).reshape(-1).view(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_rounding_is_torchs_for_every_exponent_and_tie(dtype):
    values = floats()
    bits = round_to(values, dtype)
    wanted = torch.from_numpy(values).to(TORCH[dtype])
    assert bits.tobytes() == wanted.view(torch.uint8).numpy().tobytes()
    infinite = np.flatnonzero(torch.isinf(wanted).numpy())
    assert overflows(bits, dtype) == (int(infinite[0]) if len(infinite) else None)
    assert (len(infinite) > 0) == (dtype in ("bfloat16", "float16"))


@pytest.mark.parametrize("text", ["5GB", "1.5 MB", "20KB", "3TB", "7gb", "0.5GB"])
def test_sizes_are_read_as_the_hub_reads_them(text):
    assert parse_size(text) == parse_size_to_int(text)


@pytest.mark.parametrize("text", ["5XB", "", "GB", "-1GB", "0", "0.1", "1e9", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="write a size such as 500MB or 5GB"):
        parse_size(text)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20), limit=st.integers(1, 60))
def test_shards_are_those_of_the_hub(sizes, limit):
    specs = [Spec(f"t{i:02d}", "float32", (size,)) for i, size in enumerate(sizes)]
    files = plan_files(specs, "model", limit * 4)
    wanted = split_state_dict_into_shards_factory(
        {spec.name: spec for spec in specs},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit * 4,
    )
    assert {file: [spec.name for spec in part] for file, part in files.items()} == wanted.filename_to_tensors
    if wanted.is_sharded:
        index = {"metadata": wanted.metadata, "weight_map": wanted.tensor_to_filename}
        assert json.loads(index_bytes(files)) == index


# ---------------------------------------------------------------------------------------------------------- writing

SHAPES = {"a": (3, 5), "b": (), "c": (0, 4), "d": (7,), "e": (2, 2, 2)}
LAYOUT = Layout.of(SHAPES, {"z": "d"})
DTYPES = {"a": "bfloat16", "b": "float32", "c": "float32", "d": "float64", "e": "float16", "z": "float64"}


def specs(dtypes, extra=()):
    return [Spec(name, dtypes[name], LAYOUT.shapes[name]) for name in LAYOUT.shapes if name in dtypes] + list(extra)


def write(folder, tensors, cuts, order, limit="5GB", metadata=None, rough=None):
    """Write the row 0, 1, 2 ... / 7 in blocks between `cuts`, in the given order; returns the row."""
    row_P = (np.arange(LAYOUT.num_parameters) / 7).astype(np.float32)
    files = plan_files(tensors, "model", parse_size(limit))
    edges = sorted({0, LAYOUT.num_parameters, *cuts})
    blocks = list(itertools.pairwise(edges))
    writer = ModelWriter(folder, files, LAYOUT, LAYOUT.ties, rough or metadata or {"format": "pt"})
    for i in order(list(range(len(blocks)))):
        writer.put(blocks[i][0], row_P[slice(*blocks[i])])
    for spec in tensors:
        if spec.name == "counts":
            writer.put_raw("counts", np.arange(4, dtype=np.int64).reshape(2, 2))
    writer.finish(metadata or {"format": "pt"})
    assert sum((folder / file).stat().st_size for file in files) == writer.nbytes
    return row_P


@pytest.mark.parametrize("limit", ["5GB", "60", "8"])
@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 15, 16, 20), range(40)])
@pytest.mark.parametrize("order", [list, lambda rows: rows[::-1], lambda rows: rows[::2] + rows[1::2]])
def test_any_blocks_in_any_order_load_in_the_library(tmp_path, cuts, order, limit):
    tensors = specs(DTYPES, [Spec("counts", "int64", (2, 2))])
    row_P = write(tmp_path, tensors, [c for c in cuts if c < LAYOUT.num_parameters], order, limit)
    found = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    views = LAYOUT.views(torch.from_numpy(row_P))
    assert set(found) == {*SHAPES, "z", "counts"}
    for name, view in views.items():
        assert found[name].dtype == TORCH[DTYPES[name]]
        assert torch.equal(found[name], view.to(TORCH[DTYPES[name]])), name
    assert torch.equal(found["counts"], torch.arange(4).view(2, 2))
    indices = list(tmp_path.glob("*.index.json"))
    assert len(indices) == (limit != "5GB")
    for index in indices:
        for name, file in json.loads(index.read_bytes())["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_a_tied_tensor_can_be_stored_once(tmp_path):
    row_P = write(tmp_path, specs({n: d for n, d in DTYPES.items() if n != "z"}), (), list)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(SHAPES)
    assert torch.equal(found["d"], LAYOUT.views(torch.from_numpy(row_P))["d"].double())


def test_the_header_may_be_shorter_than_the_room_it_got_but_not_longer(tmp_path):
    write(tmp_path, specs(DTYPES), (), list, metadata={"k": "short ü"}, rough={"k": "x" * 1000})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"k": "short ü"}
        assert file.get_tensor("d").shape == (7,)
    (tmp_path / "b").mkdir()
    with pytest.raises(AssertionError, match="longer than what was announced"):
        write(tmp_path / "b", specs(DTYPES), (), list, metadata={"k": "x" * 1000}, rough={"k": ""})


def test_what_is_too_large_for_the_dtype_is_named(tmp_path):
    files = plan_files(specs(dict.fromkeys(SHAPES, "float16")), "model", 10**9)
    writer = ModelWriter(tmp_path, files, LAYOUT, {}, {})
    row_P = np.zeros(LAYOUT.num_parameters, np.float32)
    row_P[LAYOUT.entries[3].start + 2] = 70000
    with pytest.raises(NonFiniteError, match=r"`d` reaches 70000, too large for float16. Write it with dtype=float32"):
        writer.put(0, row_P)
    writer.close()


def test_rounding_errors_are_summed(tmp_path):
    files = plan_files(specs(dict.fromkeys(SHAPES, "bfloat16")), "model", 10**9)
    writer = ModelWriter(tmp_path, files, LAYOUT, {}, {})
    row_P = np.linspace(1, 2, LAYOUT.num_parameters, dtype=np.float32)
    wanted = ((torch.from_numpy(row_P).bfloat16().double() - torch.from_numpy(row_P).double()) ** 2).sum().item()
    assert wanted > 0
    assert writer.put(0, row_P) == pytest.approx(wanted, rel=1e-5)
    writer.close()


def test_a_full_disk_is_noticed_before_the_first_number(tmp_path):
    """A real limit of the operating system: no file of this process may pass 100 kB."""
    files = plan_files([Spec("w", "float32", (10**6,))], "model", 10**9)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(ConfigError, match=r"model.safetensors` cannot be written: .*Make room, or write elsewhere"):
            ModelWriter(tmp_path, files, Layout.of({"w": (10**6,)}), {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_other_faults_of_the_system_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="nowhere/model.safetensors` cannot be written: No such file or directory"):
        ModelWriter(tmp_path / "nowhere", plan_files(specs(DTYPES), "model", 10**9), LAYOUT, LAYOUT.ties, {})
    with (
        pytest.raises(ConfigError, match="cannot be written: Disk quota exceeded, .* bytes are free"),
        writing(tmp_path),
    ):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_what_the_format_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="`w` is complex128, which safetensors files cannot hold"):
        header_bytes([Spec("w", "complex128", (2,))], {})
    with pytest.raises(ConfigError, match="header would take .* bytes, more than"):
        header_bytes([], {"k": "x" * (17 << 20)})

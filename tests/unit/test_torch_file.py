"""Torch files: the same names, values and bits as `torch.load(weights_only=True)`, and nothing read on the way."""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import pathlib
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch

from lcsc.bank.extents import Source, read_source
from lcsc.bank.torch_file import read_torch
from lcsc.core.errors import BankError


def saved(tmp_path, value, **options):
    path = tmp_path / "a.pt"
    torch.save(value, path, **options)
    return path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(path, found, expected):
    """Compare a described value with the one torch loaded, tensor by tensor and bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, Source)
        assert found.dtype == str(expected.dtype).removeprefix("torch.")
        assert found.shape == tuple(expected.shape)
        assert read_source([path], found).tobytes() == raw(expected)
    elif isinstance(expected, dict):
        assert type(found) is dict
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(path, found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is (tuple if isinstance(expected, tuple) else list)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(path, one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected


def check(tmp_path, value, **options):
    path = saved(tmp_path, value, **options)
    expected = torch.load(path, weights_only=True)
    found = read_torch(path).value
    same(path, found, expected)
    return found


DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
]
DTYPES += ["uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128"]


def test_each_dtype(tmp_path):
    bits = torch.randint(0, 2, (96,), dtype=torch.uint8)
    check(tmp_path, {name: bits.clone().view(getattr(torch, name)) for name in DTYPES})


def test_views_of_every_kind(tmp_path):
    base = torch.randn(6, 8)
    image = torch.randn(2, 3, 4, 5)
    found = check(
        tmp_path,
        {
            "whole": base,
            "rows": base[2:5],
            "columns": base[:, 3:6],
            "every_other": base[::2, ::3],
            "transposed": base.T,
            "element": base[3, 4],
            "expanded": base[0, 0].expand(5, 2),
            "channels_last": image.to(memory_format=torch.channels_last),
            "permuted": image.permute(3, 0, 2, 1),
            "empty": base[3:3],
            "empty_slice": base[:, 8:],
            "diagonal": base.diagonal(),
            "unfolded": base.flatten().unfold(0, 4, 2),
            "one_row": base[5:6, :],
        },
    )
    assert found["whole"].plain
    assert found["rows"].plain
    assert found["one_row"].plain
    assert not found["columns"].plain
    assert found["rows"].pieces[0].offset == found["whole"].pieces[0].offset + 2 * 8 * 4


def test_tied_tensors_are_equal_sources(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    found = check(tmp_path, {"wte": weight, "head": weight, "slice": weight.detach()[1:]})
    assert found["wte"] == found["head"] != found["slice"]


def test_a_module_and_its_optimizer(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    found = check(
        tmp_path,
        {
            "model": model.state_dict(),
            "parameters": list(model.parameters()),
            "opt": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "epoch": 3,
            "step": 2**40,
            "big": 2**300,
            "loss": -0.25,
            "none": None,
            "flags": [True, False],
            "nested": {"tuple": (1, (2.5, "three")), 4: b"bytes \xff"},
        },
    )
    assert found["model"]["1.num_batches_tracked"].shape == ()
    assert found["opt"]["state"][0]["exp_avg"].shape == (4, 3, 3, 3)


def test_values_that_trainers_put_beside_the_weights(tmp_path):
    """torch needs these classes allowed by name; here they are plain values."""
    attributed = torch.nn.Parameter(torch.ones(3))
    attributed.tag = "x"
    value = {
        "args": argparse.Namespace(lr=1e-4, betas=[0.9, 0.95], inner=argparse.Namespace(a=None)),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
        "score": np.float64(1.5),
        "half": np.float32(0.25),
        "steps": np.int64(-7),
        "flag": np.bool_(True),
        "size": torch.Size([3, 4]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "set": {3},
        "path": pathlib.PurePosixPath("/a/b"),
        "tensor": attributed,
    }
    path = saved(tmp_path, value)
    found = read_torch(path).value
    assert read_source([path], found.pop("tensor")).tolist() == [1, 1, 1]
    assert found == {
        "args": {"lr": 1e-4, "betas": [0.9, 0.95], "inner": {"a": None}},
        "counts": {"a": [1]},
        "counter": {"a": 2, "b": 1},
        "score": 1.5,
        "half": 0.25,
        "steps": -7,
        "flag": True,
        "size": (3, 4),
        "dtype": "torch.bfloat16",
        "device": "cuda:1",
        "set": [3],
        "path": ("/", "a", "b"),
    }
    assert type(found["score"]) is float
    assert type(found["steps"]) is int
    assert type(found["flag"]) is bool


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    value = {"w": torch.randn(3), "half": torch.zeros(2, dtype=torch.bfloat16), "text": "é" * 300, "b": b"x" * 300}
    path = saved(tmp_path, value, pickle_protocol=protocol)
    same(path, read_torch(path).value, value)


def test_a_file_beyond_4_gib_is_described_without_reading_it(tmp_path):
    """Four numbers of 9 GB exist; torch's own reader says where they must lie."""
    path = tmp_path / "big.pt"
    with torch.serialization.skip_data():
        value = {"a": torch.empty(1_200_000_000), "b": torch.empty(3), "c": torch.empty(1_100_000_000)}
        torch.save(value | {"d": torch.empty(5)}, path)
    start = time.process_time()
    found = read_torch(path, crc=False).value
    assert time.process_time() - start < 0.5
    reader = torch._C.PyTorchFileReader(str(path))
    for key, name in enumerate("abcd"):
        assert found[name].pieces[0].offset == reader.get_record_offset(f"data/{key}")
    assert found["c"].nbytes == 4_400_000_000


def test_the_checksum_of_every_tensor_is_compared(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(1000), "v": torch.zeros(10)})
    place = read_torch(path).value["w"].pieces[0].offset
    data = bytearray(path.read_bytes())
    data[place + 2000] ^= 16
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"][500] != 0  # torch reads it as if nothing had happened
    with pytest.raises(BankError, match=r"holds entry `a/data/0` with checksum .*, written with"):
        read_torch(path)
    assert read_torch(path, crc=False).value["v"].shape == (10,)


class Custom:
    pass


def test_other_classes_are_refused_by_name(tmp_path):
    for value, name in (
        (Custom(), "test_torch_file.Custom"),
        (np.zeros(3), r"numpy\.(_core|core)\.multiarray\._reconstruct"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (print, "builtins.print"),
    ):
        path = saved(tmp_path, {"w": torch.zeros(3), "x": value})
        with pytest.raises(BankError, match=rf"names the global `{name}`.*lcsc bank convert .* allow_code=true"):
            read_torch(path)


def test_complex_views_that_are_not_what_is_stored(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(3, dtype=torch.complex64).conj()})
    with pytest.raises(BankError, match="conjugate or negative view"):
        read_torch(path)


def test_other_formats_are_refused_with_their_names(tmp_path):
    value = {"w": torch.zeros(3)}
    buffer, archive = io.BytesIO(), io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    safetensors = b"\x02\0\0\0\0\0\0\0{}"
    inner = io.BytesIO()
    torch.save(value, inner)
    cases = {
        "has the format of torch before 1.6.*lcsc bank convert": buffer.getvalue(),
        "is a tar archive": archive.getvalue(),
        "is a bare pickle, which runs code.*lcsc bank convert": pickle.dumps({"a": 1}),
        "is compressed by gzip": gzip.compress(inner.getvalue()),
        "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "is a safetensors file": safetensors,
        "is empty": b"",
        "is not a torch file": b"<html>404</html>",
        "is not a torch file.*text pickle.*lcsc bank convert": pickle.dumps({"a": 1}, 0),
        "too few for a zip": b"PK\3\4",
    }
    path = tmp_path / "a.ckpt"
    for sentence, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(BankError, match=sentence):
            read_torch(path)


def test_scripts_and_other_archives(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/constants.pkl", pickle.dumps(()))
    with pytest.raises(BankError, match="is a TorchScript program"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(BankError, match="without `data.pkl`"):
        read_torch(path)


def test_compressed_entries(tmp_path):
    first, second = saved(tmp_path, {"w": torch.zeros(1000)}), tmp_path / "b.pt"
    with zipfile.ZipFile(first) as old, zipfile.ZipFile(second, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    assert torch.load(second, weights_only=True)["w"].shape == (1000,)  # torch inflates whatever it is given
    with pytest.raises(BankError, match="holds the compressed entry `a/data.pkl`; torch stores entries as they are"):
        read_torch(second)


def test_an_archive_rewritten_by_python_is_read(tmp_path):
    """Python's zipfile writes sizes into the local headers, and as zip64 where it is told to."""
    value = {"w": torch.randn(4, 4)}
    first = saved(tmp_path, value)
    second = tmp_path / "b.pt"
    with zipfile.ZipFile(first) as old, zipfile.ZipFile(second, "w", zipfile.ZIP_STORED) as new:
        for item in old.infolist():
            with new.open(item.filename, "w", force_zip64=True) as out:
                out.write(old.read(item))
    same(second, read_torch(second).value, value)


def test_many_tensors_are_described_quickly(tmp_path):
    """CPU time of one file of 686 tensors, best of five; 0.025 s on the machine it was written on."""
    path = saved(tmp_path, {f"block.{i}.weight": torch.zeros(2, 2) for i in range(686)})
    best = np.inf
    for _ in range(5):
        start = time.process_time()
        assert len(read_torch(path).value) == 686
        best = min(best, time.process_time() - start)
    assert best < 0.15


def test_no_reader_imports_torch():
    code = "import sys, lcsc.bank.dcp_file, lcsc.bank.torch_file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

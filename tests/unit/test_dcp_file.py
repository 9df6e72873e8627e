"""Folders of torch.distributed.checkpoint, written by it in one and in two processes, against its own reader."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import socket

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from lcsc.bank.dcp_file import _in_grid, read_dcp
from lcsc.bank.extents import read_source
from lcsc.core.errors import BankError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12: torch has threads
]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(folder, tmp_path):
    """Compare a folder with what torch puts together from it."""
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    expected, _ = flatten_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    table, files, values = read_dcp(folder)
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert table.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert table[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert table[name].shape == tuple(tensor.shape)
        assert read_source(files, table[name]).tobytes() == raw(tensor), name
    assert values == {name: value for name, value in expected.items() if name not in tensors}
    return table, files


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    state = {
        "model": {"a": weight, "tied": weight, "t": weight.T, "slice": weight[1:3], "columns": weight[:, 1:3]},
        "other": {"scalar": torch.tensor(3), "empty": torch.empty(0, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
        "list": [torch.zeros(2), torch.ones(2)],
        "step": 7,
        "config": {"lr": 0.1, "betas": [0.9, 0.95], "name": "unet"},
    }
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def test_one_process(folder, tmp_path):
    table, files = check(folder, tmp_path)
    assert files == (folder / "__0_0.distcp",)
    assert table["model.a"].plain
    assert table["list.1"].shape == (2,)


def test_several_files(tmp_path):
    state = {"model": {f"w{i}": torch.randn(3, i) for i in range(9)}}
    writer = FileSystemWriter(tmp_path / "dcp", single_file_per_rank=False, thread_count=2)
    dcp.save(state, storage_writer=writer, no_dist=True)
    _, files = check(tmp_path / "dcp", tmp_path)
    assert len(files) > 2


def train_and_save(rank: int, port: int, folder: str) -> None:
    """One of two processes: FSDP with an optimizer, and tensors split along other axes."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    extra = {
        "columns": distribute_tensor(torch.arange(42.0).reshape(6, 7), mesh, [Shard(1)]),
        "both": distribute_tensor(torch.arange(12).reshape(3, 4), mesh, [Replicate()]),
        "image": distribute_tensor(torch.randn(2, 3, 4, 5), mesh, [Shard(2)]),
        "short": distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)]),
    }
    dcp.save({"model": weights, "optim": states, "extra": extra, "step": 12}, checkpoint_id=folder)
    torch.distributed.destroy_process_group()


def test_two_processes_with_fsdp(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # torch is imported already; importing it twice more takes seconds
    args = (port, str(tmp_path / "dcp"))
    processes = [context.Process(target=train_and_save, args=(rank, *args)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    table, files = check(tmp_path / "dcp", tmp_path)
    assert len(files) == 2
    weight = table["model.0.weight"]
    assert weight.shape == (5, 4)
    assert [(piece.at, piece.shape) for piece in weight.pieces] == [((0, 0), (3, 4)), ((3, 0), (2, 4))]
    assert {piece.part for piece in weight.pieces} == {0, 1}
    assert [piece.at for piece in table["extra.columns"].pieces] == [(0, 0), (0, 4)]
    assert "optim.state.0.weight.exp_avg" in table


def test_data_files_in_the_safetensors_format(tmp_path):
    """torch writes them so if it is told to; its reader of this folder is the safetensors library."""
    from safetensors.torch import load_file

    state = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    writer = FileSystemWriter(tmp_path / "dcp", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(state, storage_writer=writer, no_dist=True)
    table, files, values = read_dcp(tmp_path / "dcp")
    expected = load_file(files[0])
    assert table.keys() == expected.keys() == state.keys()
    for name, tensor in expected.items():
        assert read_source(files, table[name]).tobytes() == raw(tensor)
    assert values == {}


class Custom:
    pass


def test_values_that_need_code_are_left_out(tmp_path):
    dcp.save({"w": torch.ones(2), "x": Custom(), "y": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    table, _, values = read_dcp(tmp_path / "dcp")
    assert table.keys() == {"w"}
    assert values == {"y": 3}


def edit(folder, change):
    """Change the metadata by torch's own classes and write it as torch does."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def chunks(*parts):
    made = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]

    def change(metadata):
        metadata.state_dict_metadata["model.a"].chunks = made

    return change


def test_parts_in_no_grid(tmp_path):
    """Four around one: no cut goes through the whole, so that all pairs are compared."""
    whole = torch.arange(9.0).reshape(3, 3)
    parts = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    state = {f"p{i}": whole[a : a + m, b : b + n].clone() for i, ((a, b), (m, n)) in enumerate(parts)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)

    def joined(boxes):
        def change(metadata):
            kinds, places = metadata.state_dict_metadata, metadata.storage_data
            old = {key.fqn: info for key, info in places.items()}
            entry = dataclasses.replace(kinds["p0"], size=torch.Size((3, 3)))
            entry.chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
            metadata.state_dict_metadata = {"whole": entry}
            metadata.storage_data = {
                MetadataIndex("whole", torch.Size(at)): old[f"p{i}"] for i, (at, _) in enumerate(boxes)
            }

        return change

    saved = (tmp_path / "dcp" / ".metadata").read_bytes()
    edit(tmp_path / "dcp", joined(parts))
    table, files, _ = read_dcp(tmp_path / "dcp")
    assert read_source(files, table["whole"]).tolist() == whole.tolist()
    (tmp_path / "dcp" / ".metadata").write_bytes(saved)
    edit(tmp_path / "dcp", joined([*parts[:4], ((0, 1), (1, 1))]))
    with pytest.raises(BankError, match="describes parts of `whole` that overlap"):
        read_dcp(tmp_path / "dcp")


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=2, max_size=2), max_size=6))
def test_parts_in_a_grid_never_overlap(boxes):
    start = np.array([[at for at, _ in box] for box in boxes], int).reshape(-1, 2)
    stop = start + np.array([[size for _, size in box] for box in boxes], int).reshape(-1, 2)
    meet = np.ones((len(boxes), len(boxes)), bool)
    for axis in range(2):
        meet &= (start[:, None, axis] < stop[None, :, axis]) & (start[None, :, axis] < stop[:, None, axis])
    if boxes and _in_grid(start, stop):
        assert meet.sum() == len(boxes)


@given(st.permutations(range(12)))
def test_a_grid_in_any_order_is_one(order):
    start = np.array([(a, b, c) for a in (0, 2) for b in (0, 1, 4) for c in (0, 7)])
    size = np.array([(m, n, k) for m in (2, 5) for n in (1, 3, 2) for k in (7, 1)])
    assert _in_grid(start[list(order)], (start + size)[list(order)])


def place(**fields):
    def change(metadata):
        key = next(key for key in metadata.storage_data if key.fqn == "model.a")
        metadata.storage_data[key] = dataclasses.replace(metadata.storage_data[key], **fields)

    return change


def drop(metadata):
    metadata.storage_data = {key: value for key, value in metadata.storage_data.items() if key.fqn != "model.a"}


def set_dtype(metadata):
    metadata.state_dict_metadata["model.a"].properties.dtype = torch.float16


def set_size(metadata):
    metadata.state_dict_metadata["model.a"].size = torch.Size((4, 6))
    chunks(((0, 0), (4, 6)))(metadata)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (chunks(((0, 0), (3, 4))), "describes parts that do not cover `model.a`"),
        (chunks(((0, 0), (3, 4)), ((2, 0), (3, 4))), "describes parts of `model.a` that overlap"),
        (chunks(((0, 0), (3, 4)), ((4, 0), (3, 4))), "describes parts that do not cover"),
        (chunks(((0,), (6,))), "with another number of axes"),
        (chunks(), "without parts"),
        (place(relative_path="../outside"), "only plain names of files in the same folder"),
        (place(relative_path="/etc/passwd"), "only plain names"),
        (place(relative_path="absent.distcp"), "absent.distcp` does not exist"),
        (place(relative_path="link"), "link out of its folder"),
        (place(relative_path="fifo"), "is a named pipe"),
        (place(offset=10**9), "places a tensor at bytes 1000000000 to"),
        (place(offset=-1), "a place before the beginning of a file"),
        (place(length=30), "does not end like a zip archive"),
        (place(transform_descriptors=["zstd"]), "compressed data, which is not read"),
        (drop, "does not say where `model.a` lies"),
        (set_dtype, r"holds float32 \(6, 4\) for `model.a`, but `.metadata` says float16"),
        (set_size, r"holds float32 \(6, 4\) for `model.a`, but `.metadata` says float32 \(4, 6\)"),
        (lambda metadata: setattr(metadata, "storage_data", None), "has no table `storage_data`"),
        (lambda metadata: setattr(metadata, "planner_data", Custom()), "names the global `test_dcp_file.Custom`"),
    ],
)
def test_metadata_that_lies(folder, change, sentence):
    (folder.parent / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to("../outside")
    os.mkfifo(folder / "fifo")
    edit(folder, change)
    with pytest.raises(BankError, match=sentence):
        read_dcp(folder)


def test_damaged_and_missing_files(folder):
    data = folder / "__0_0.distcp"
    whole = data.read_bytes()
    place = read_dcp(folder)[0]["model.a"].pieces[0].offset
    data.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(BankError, match="with checksum"):
        read_dcp(folder)
    assert read_dcp(folder, crc=False)[0]["model.a"].shape == (6, 4)
    data.write_bytes(whole[:-1])
    with pytest.raises(BankError, match="It is truncated"):
        read_dcp(folder)
    data.unlink()
    with pytest.raises(BankError, match="__0_0.distcp` does not exist"):
        read_dcp(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(BankError, match=r"\.metadata` does not exist"):
        read_dcp(folder)


def test_no_cut_of_the_metadata_is_read(folder):
    whole = (folder / ".metadata").read_bytes()
    for cut in range(0, len(whole), 29):
        (folder / ".metadata").write_bytes(whole[:cut])
        with pytest.raises(BankError, match="damaged near byte"):
            read_dcp(folder)

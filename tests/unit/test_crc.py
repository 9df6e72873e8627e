"""A bit that flipped in a torch file is found by whatever reads the numbers, not by the scan alone."""

from __future__ import annotations

import random
import warnings
import zlib

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from lcsc.bank import CheckpointBank
from lcsc.bank.content import CHUNK
from lcsc.bank.crc import joined
from lcsc.bank.pack import write_pack
from lcsc.cli.main import main
from lcsc.core.errors import BankError

LONG = 2 * CHUNK + 77


def state(step: int) -> dict[str, torch.Tensor]:
    """A tensor of three chunks, a short one, one in strides, two views of one storage, and a counter."""
    torch.manual_seed(step)
    shared = torch.randn(30)
    tensors = {"long": torch.randn(LONG), "short": torch.randn(7, 3), "strided": torch.randn(4, 6).T}
    return tensors | {"view.a": shared[:10], "view.b": shared[10:], "bn.num_batches_tracked": torch.tensor(1000 + step)}


@pytest.fixture
def folder(tmp_path):
    (run := tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        torch.save({"model": state(step), "opt": {"m": torch.full((9,), 0.123456)}}, run / f"m{step}.pt")
    return run


def flip(path, bits: bytes, at: int = 0) -> None:
    """Flip the lowest bit of a byte in the only place of a file where `bits` stand."""
    raw = bytearray(path.read_bytes())
    assert raw.count(bits) == 1
    raw[raw.index(bits) + at] ^= 1
    path.write_bytes(raw)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("last", [1, 5, 4096])
def test_joined_checksums_are_those_of_the_whole(count, last):
    data = random.Random(count).randbytes(4096 * (count - 1) + last)
    parts = [zlib.crc32(data[start : start + 4096]) for start in range(0, len(data), 4096)]
    assert joined(parts, 4096, len(data)) == zlib.crc32(data)


def uses(bank: CheckpointBank, use: str, to) -> None:
    """Read a bank's numbers in one of the ways there are."""
    if use == "load":
        bank.load()
    elif use == "combine":
        bank.combine(torch.tensor([0.5, 0.25, 0.25]))
    elif use == "project":
        bank.project(torch.ones(bank.layout.num_parameters))
    elif use == "stream":
        for _ in bank.stream(np.full((1, 3), 1 / 3)):
            pass
    elif use == "parent":
        bank.parent(1)
    else:
        write_pack(bank, to)


USES = ("load", "combine", "project", "stream", "parent", "pack")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("storage", ["resident", "delta", "streamed"])
def test_every_way_of_reading_finds_it(folder, tmp_path, storage, use):
    bank = CheckpointBank.open(folder, storage=storage)
    uses(bank, use, tmp_path / "good.safetensors")
    flip(folder / "m2.pt", bits_of(state(2)["long"]), at=4 * LONG - 4)
    with pytest.raises(BankError, match=r"m2.pt` holds entry `long` with checksum .* written with"):
        uses(CheckpointBank.open(folder, storage=storage), use, to := tmp_path / "bad.safetensors")
    assert not to.exists()


def test_a_merge_of_damaged_files_leaves_nothing_behind(folder, tmp_path, capsys):
    flip(folder / "m2.pt", bits_of(state(2)["long"]), at=4 * CHUNK)
    assert main(["combine", f"bank={folder}", "schedule=uniform", f"to={tmp_path / 'out'}"]) == 2
    assert "m2.pt` holds entry `long` with checksum" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["short", "strided", "view.a", "view.b", "bn.num_batches_tracked"])
def test_whatever_the_tensor(folder, name):
    tensor = state(3)[name]
    raw = tensor.T.contiguous() if name == "strided" else tensor
    flip(folder / "m3.pt", bits_of(raw))
    with pytest.raises(BankError, match=r"m3.pt` holds entry `(view.[ab]|" + name + ")` with checksum"):
        CheckpointBank.open(folder, storage="streamed").combine(torch.tensor([0.5, 0.25, 0.25]))


def test_rows_without_a_coefficient_are_not_read_but_for_what_is_copied(folder):
    flip(folder / "m3.pt", bits_of(state(3)["short"]))
    bank = CheckpointBank.open(folder, storage="streamed")
    coef = torch.tensor([0.5, 0.5, 0.0])
    whole = bank.combine(coef)
    assert torch.equal(bank.combine(coef), whole)  # the second pass compares nothing
    assert bank.constants["bn.num_batches_tracked"].item() == 1003
    flip(folder / "m3.pt", bits_of(state(3)["bn.num_batches_tracked"]))
    with pytest.raises(BankError, match="m3.pt` holds entry `bn.num_batches_tracked`"):
        _ = CheckpointBank.open(folder, storage="streamed").constants


def test_what_is_copied_is_compared_once(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    assert set(bank.constant_sources()) == {"bn.num_batches_tracked"}
    flip(folder / "m3.pt", bits_of(state(3)["bn.num_batches_tracked"]))
    assert set(bank.constant_sources()) == {"bn.num_batches_tracked"}  # the second call reads nothing
    with pytest.raises(BankError, match="m3.pt` holds entry `bn.num_batches_tracked`"):
        CheckpointBank.open(folder, storage="streamed").constant_sources()


def test_what_is_copied_may_share_its_storage_with_what_is_combined(tmp_path):
    for step in (1, 2):
        shared = torch.arange(40, dtype=torch.float32) + step
        torch.save({"a.weight": shared[:20], "bn.running_mean": shared[20:]}, tmp_path / f"m{step}.pt")
    flip(tmp_path / "m2.pt", bits_of(shared))
    with pytest.raises(BankError, match="m2.pt` holds entry `bn.running_mean` with checksum"):
        CheckpointBank.open(tmp_path, storage="streamed").constant_sources()


def test_what_no_network_needs_is_not_read(folder):
    flip(folder / "m1.pt", bits_of(torch.full((9,), 0.123456)))
    CheckpointBank.open(folder).load()


def test_distributed_checkpoints_too(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled.*")
        for step in (1, 2):
            dcp.save({"long": state(step)["long"]}, checkpoint_id=str(tmp_path / "run" / f"step-{step}"), no_dist=True)
    coef = torch.tensor([0.5, 0.5])
    CheckpointBank.open(tmp_path / "run", storage="streamed").combine(coef)
    [path] = (tmp_path / "run" / "step-2").glob("*.distcp")
    flip(path, bits_of(state(2)["long"]), at=4 * CHUNK)
    with pytest.raises(BankError, match=rf"{path.name}` holds entry `long` with checksum"):
        CheckpointBank.open(tmp_path / "run", storage="streamed").combine(coef)

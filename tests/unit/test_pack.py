"""A packed bank is the same bank in one file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.pack import PAGE, map_pack, open_pack, write_pack
from lcsc.core.errors import BankError, ConfigError, NonFiniteError, OutputExistsError


@pytest.fixture
def folder(tmp_path):
    """Four checkpoints with a batch norm, so that there is something to copy."""
    for step in (10, 20, 30, 40):
        torch.manual_seed(step)
        net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
        net(torch.randn(8, 7))
        save_file(net.state_dict(), tmp_path / f"model-{step}.safetensors")
    return tmp_path


@pytest.fixture
def packed(folder, tmp_path):
    """The bank in one file."""
    to = tmp_path / "out" / "bank.safetensors"
    assert write_pack(CheckpointBank.open(folder, storage="streamed"), to) == "float32"
    return to


def test_the_packed_bank_is_the_bank(folder, packed):
    loose, bank = CheckpointBank.open(folder), CheckpointBank.open(packed)
    assert bank.steps == loose.steps == (10, 20, 30, 40)
    assert bank.layout == loose.layout
    assert torch.equal(bank.matrix(), loose.matrix())
    assert bank.digest == loose.digest
    assert [dict(parent) for parent in bank.parents] == [dict(parent) for parent in loose.parents]
    coef = torch.tensor([[2.0, -1.5, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(bank.combine(coef), loose.combine(coef))
    assert torch.equal(CheckpointBank.open(packed, storage="streamed").combine(coef), loose.combine(coef))


def test_constants_belong_to_the_last_selected_checkpoint(folder, packed):
    for last in (20, 40):
        bank = CheckpointBank.open(packed, select=Selection(stop=last))
        state = load_file(folder / f"model-{last}.safetensors")
        assert set(bank.constants) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        for name, tensor in bank.constants.items():
            assert torch.equal(tensor, state[name]), name
            assert tensor.dtype == state[name].dtype


def test_rows_are_mapped_not_read(packed):
    bank = CheckpointBank.open(packed)
    assert map_pack(packed, bank.rows, bank.layout, "float32") is not None
    assert map_pack(packed, bank.rows, bank.layout, "bfloat16") is None
    some = CheckpointBank.open(packed, select=Selection(every=2))
    assert some.steps == (20, 40)
    assert torch.equal(some.matrix(), bank.matrix()[[1, 3]])
    assert open_pack(packed).rows[0].table["0.bias"].pieces[0].offset % PAGE == 0
    assert bank.matrix().data_ptr() % 64 == 0
    before = packed.read_bytes()
    bank.matrix().zero_()
    assert packed.read_bytes() == before


def test_other_libraries_read_the_rows(packed):
    rows = load_file(packed)["rows"]
    bank = CheckpointBank.open(packed)
    assert torch.equal(rows[:, : bank.layout.num_parameters], bank.matrix())


def test_a_rounded_pack_says_so_and_has_another_digest(folder, tmp_path):
    to = tmp_path / "half.safetensors"
    loose = CheckpointBank.open(folder)
    write_pack(CheckpointBank.open(folder, storage="streamed"), to, "bfloat16")
    bank = CheckpointBank.open(to)
    assert torch.equal(bank.matrix(), loose.matrix().to(torch.bfloat16).float())
    assert torch.equal(CheckpointBank.open(to, dtype="bfloat16").matrix(), loose.matrix().to(torch.bfloat16))
    assert bank.digest != loose.digest
    assert bank.parents[0]["rounded"] == "bfloat16"


def test_half_precision_files_stay_half(folder, tmp_path):
    for file in folder.glob("*.safetensors"):
        save_file({n: t.half() if t.is_floating_point() else t for n, t in load_file(file).items()}, file)
    to = tmp_path / "half.safetensors"
    assert write_pack(CheckpointBank.open(folder, storage="streamed"), to) == "float16"
    assert CheckpointBank.open(to).digest == CheckpointBank.open(folder).digest
    assert "rounded" not in CheckpointBank.open(to).parents[0]


def test_what_cannot_be_packed(folder, packed, tmp_path):
    bank = CheckpointBank.open(folder, storage="streamed")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_pack(bank, packed)
    with pytest.raises(ConfigError, match="must be one of float32, bfloat16, float16"):
        write_pack(bank, tmp_path / "x.safetensors", "int8")
    with pytest.raises(ConfigError, match="ends in `.safetensors`"):
        write_pack(bank, tmp_path / "x.bin")
    tensors = load_file(folder / "model-20.safetensors")
    tensors["0.bias"][0] = 1e6
    save_file(tensors, folder / "model-20.safetensors")
    with pytest.raises(NonFiniteError, match="step 20 holds numbers beyond 65504"):
        write_pack(CheckpointBank.open(folder, storage="streamed"), tmp_path / "x.safetensors", "float16")
    assert sorted(path.name for path in tmp_path.iterdir() if "model-" not in path.name) == ["out"]


def test_a_damaged_description_is_refused(packed):
    raw = packed.read_bytes()
    packed.write_bytes(raw.replace(b'\\"version\\":1', b'\\"version\\":7', 1))
    with pytest.raises(BankError, match="no whole packed bank.*version 7"):
        CheckpointBank.open(packed)
    packed.write_bytes(raw[:-1])
    with pytest.raises(BankError, match="bank.safetensors`"):
        CheckpointBank.open(packed)

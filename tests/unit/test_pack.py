"""A packed bank is the same bank in one file."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.pack import PAGE, write_pack
from lcsc.bank.pack_read import map_pack, on_network, open_pack
from lcsc.bank.survey import survey
from lcsc.core.errors import BankError, ConfigError, NonFiniteError, OutputExistsError


@pytest.fixture
def folder(tmp_path):
    """Four checkpoints with a batch norm, so that there is something to copy."""
    (run := tmp_path / "run").mkdir()
    for step in (10, 20, 30, 40):
        torch.manual_seed(step)
        net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
        net(torch.randn(8, 7))
        save_file(net.state_dict(), run / f"model-{step}.safetensors")
    return run


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


def test_packing_a_rounded_pack_again_says_so_again(folder, tmp_path):
    once, twice, wide = (tmp_path / f"{name}.safetensors" for name in ("once", "twice", "wide"))
    write_pack(CheckpointBank.open(folder, storage="streamed"), once, "bfloat16")
    write_pack(CheckpointBank.open(once, storage="streamed"), twice)
    write_pack(CheckpointBank.open(once, storage="streamed"), wide, "float32")
    first = CheckpointBank.open(once)
    for path in (twice, wide):
        bank = CheckpointBank.open(path)
        assert torch.equal(bank.matrix(), first.matrix())
        assert bank.digest == first.digest
        assert [dict(parent) for parent in bank.parents] == [dict(parent) for parent in first.parents]
    half = tmp_path / "half.safetensors"
    write_pack(CheckpointBank.open(once, storage="streamed"), half, "float16")
    assert CheckpointBank.open(half).parents[0]["rounded"] == "bfloat16, float16"
    assert CheckpointBank.open(half).digest != first.digest


def test_only_rows_that_lose_something_are_called_rounded(tmp_path):
    (run := tmp_path / "run").mkdir()
    for step, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        save_file({"w": torch.linspace(0, 1, 9).to(dtype)}, run / f"m{step}.safetensors")
    write_pack(CheckpointBank.open(run, storage="streamed"), to := tmp_path / "p.safetensors", "bfloat16")
    assert [parent.get("rounded") for parent in CheckpointBank.open(to).parents] == ["bfloat16", None]


@pytest.fixture
def emas(tmp_path):
    """Two EMAs of the same three steps."""
    (run := tmp_path / "emas").mkdir()
    for step in (1, 2, 3):
        for rate, factor in (("0.9", 1.0), ("0.99", 100.0)):
            save_file({"w": torch.full((4,), factor * step)}, run / f"ema_{rate}_{step:06d}.safetensors")
    return run


def test_several_ema_rates_stay_apart_in_a_pack(emas, tmp_path):
    loose = CheckpointBank.open(emas, weights="ema:*", storage="streamed")
    write_pack(loose, to := tmp_path / "p.safetensors")
    bank = CheckpointBank.open(to, weights="ema:*")
    assert bank.steps == loose.steps == (1, 2, 3, 1, 2, 3)
    assert bank.rates == loose.rates == ("0.9", "0.9", "0.9", "0.99", "0.99", "0.99")
    assert bank.digest == loose.digest
    assert bank.matrix()[:, 0].tolist() == [1, 2, 3, 100, 200, 300]
    for several in (bank, loose):
        assert several.rate is None
        assert several.lines[0].startswith("bank: 6 checkpoints (ema 0.9 and 0.99) x 4 parameters")
    one = CheckpointBank.open(to, weights="ema:0.99", select=Selection(last=2))
    assert one.lines[0].startswith("bank: 2 checkpoints (ema 0.99) x 4 parameters")
    assert (one.steps, one.rates, one.rate) == ((2, 3), (), "0.99")
    assert one.matrix()[:, 0].tolist() == [200, 300]
    both = CheckpointBank.open(to, weights="ema:*", select=Selection(last=1))
    assert (both.steps, both.rates) == ((3, 3), ("0.9", "0.99"))
    assert both.matrix()[:, 0].tolist() == [3, 300]
    with pytest.raises(BankError, match=r"several EMAs, which are never mixed.*`bank.weights=ema:\*`"):
        CheckpointBank.open(to)
    with pytest.raises(BankError, match="no `raw` weights"):
        CheckpointBank.open(to, weights="raw")
    write_pack(bank, again := tmp_path / "again.safetensors")
    assert again.read_bytes() == to.read_bytes()


def test_a_scan_reads_each_row_of_a_pack_with_several_rates(emas, tmp_path):
    write_pack(CheckpointBank.open(emas, weights="ema:*", storage="streamed"), to := tmp_path / "p.safetensors")
    found = survey(to)
    assert [row.group.label for row in found.groups] == ["ema 0.9", "ema 0.99"]
    assert [[file.step for file in row.files] for row in found.groups] == [[1, 2, 3], [1, 2, 3]]
    assert len({file.digest for row in found.groups for file in row.files}) == 6
    assert [row.duplicates for row in found.groups] == [(), ()]


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_what_cannot_be_written_is_one_sentence(folder, tmp_path):
    bank = CheckpointBank.open(folder, storage="streamed")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"`.*/file/x.safetensors` cannot be written: .*Choose another path"):
        write_pack(bank, tmp_path / "file" / "x.safetensors")
    with pytest.raises(ConfigError, match=r"`/proc/x.safetensors` cannot be written: .*Choose another path"):
        write_pack(bank, type(tmp_path)("/proc/x.safetensors"))
    for to in (folder / "m50.safetensors", folder / "sub" / "x.safetensors"):
        with pytest.raises(ConfigError, match="inside the bank.*Choose a path outside"):
            write_pack(bank, to)
    assert len(list(folder.iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_more_checkpoints_than_a_description_holds(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lcsc.bank.pack.MAX_HEADER", 1000)
    with pytest.raises(BankError, match="description of 4 checkpoints takes 4096 bytes, more than the 1000"):
        write_pack(CheckpointBank.open(folder, storage="streamed"), tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_pack_among_checkpoints_is_no_checkpoint(folder, packed):
    (folder / "m50.safetensors").write_bytes(packed.read_bytes())
    with pytest.raises(BankError, match=r"m50.safetensors` is a whole bank that `lcsc bank pack` wrote"):
        CheckpointBank.open(folder)
    assert "whole bank" in str(survey(folder).problems[0])
    (alone := packed.parent / "m1.safetensors").write_bytes(packed.read_bytes())
    with pytest.raises(BankError, match="Give the file itself"):
        CheckpointBank.open(packed.parent)
    assert CheckpointBank.open(alone).steps == (10, 20, 30, 40)


def calls_to_open(path) -> int:
    """Python functions that are called to open a bank."""
    count = 0

    def watch(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(watch)
    try:
        CheckpointBank.open(path)
    finally:
        sys.setprofile(None)
    return count


def test_opening_takes_work_in_proportion_to_the_rows(tmp_path):
    calls = []
    for rows in (60, 120, 180):
        (run := tmp_path / str(rows)).mkdir()
        for step in range(rows):
            save_file({"w": torch.tensor([float(step)])}, run / f"m{step}.safetensors")
        write_pack(CheckpointBank.open(run, storage="streamed"), path := tmp_path / f"{rows}.safetensors")
        calls.append(calls_to_open(path))
    assert calls[2] - calls[1] < 1.1 * (calls[1] - calls[0])


@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("/home/x", False),
        ("/data/x", True),
        ("/data2/x", False),
        ("/data/local/x", False),
        ("/a b/x", True),
        ("/gcs/x", True),
        ("/auto/x", True),
    ],
)
def test_the_mount_table_says_what_lies_on_a_network(tmp_path, monkeypatch, path, network):
    (tmp_path / "self").mkdir()
    (tmp_path / "filesystems").write_text("nodev\tnfs4\n\text4\n")
    mounts = ["/dev/sda / ext4", "host:/d /data nfs4", "/dev/sdb /data/local ext4", "//h/s /a\\040b cifs"]
    mounts += ["gcsfuse /gcs fuse.gcsfuse", "auto.home /auto autofs", "host:/h /auto nfs"]
    (tmp_path / "self" / "mounts").write_text("".join(f"{mount} rw 0 0\n" for mount in mounts))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert on_network(type(tmp_path)(path)) is network


def test_a_damaged_description_is_refused(packed):
    raw = packed.read_bytes()
    packed.write_bytes(raw.replace(b'\\"version\\":1', b'\\"version\\":7', 1))
    with pytest.raises(BankError, match="no whole packed bank.*version 7"):
        CheckpointBank.open(packed)
    packed.write_bytes(raw[:-1])
    with pytest.raises(BankError, match="bank.safetensors`"):
        CheckpointBank.open(packed)

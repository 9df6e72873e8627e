"""A bank as bytes opens to the same bank, and a machine's processes share one copy of it."""

from __future__ import annotations

import inspect
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank, Selection
from lcsc.core.errors import ConfigError
from lcsc.search import packed_bank
from lcsc.search.packed_bank import forget, keeping, pack_section, packed, share_bank, unpack_once
from lcsc.search.setup import open_bank


def checkpoints(folder, dtype):
    for step in (10, 20, 30, 40, 50):
        torch.manual_seed(step)
        tensors = {"a": torch.randn(7, 5).to(dtype), "num_batches_tracked": torch.tensor(step)}
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / f"model-{step}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("held", "used", "storage"),
    [
        (torch.float32, "float32", "auto"),
        (torch.bfloat16, "float32", "auto"),
        (torch.float32, "bfloat16", "auto"),
        (torch.float64, "float32", "auto"),
        (torch.float64, "float32", "delta"),
        (torch.float64, "float32", "streamed"),
        (torch.float32, "bfloat16", "streamed"),  # whose numbers are not rounded while it works
    ],
)
def test_what_comes_out_is_the_bank_with_its_selection(tmp_path, held, used, storage):
    select = Selection(start=20, every=2)  # 30 and 50; every second of these again would be one
    bank = CheckpointBank.open(checkpoints(tmp_path / "run", held), select=select, dtype=used, storage=storage)
    assert bank.steps == (30, 50)
    with packed(bank) as data:
        assert data.dtype == np.uint8
        lock = unpack_once(data, tmp_path / "there.safetensors")
    section = {**pack_section(bank.config, bank), "path": str(tmp_path / "there.safetensors")}
    there = open_bank({"bank": section})
    assert (there.steps, there.storage, there.digest) == (bank.steps, bank.storage, bank.digest)
    coef = torch.tensor([[0.3, 0.7], [1.9, -0.9]], dtype=torch.float64)
    assert torch.equal(there.combine(coef), bank.combine(coef))
    lock.close()


def test_a_copys_name_tells_banks_apart(tmp_path):
    folder = checkpoints(tmp_path / "run", torch.float32)
    opened = [{}, {"select": Selection(every=2)}, {"dtype": "bfloat16"}]
    banks = [CheckpointBank.open(folder, **settings) for settings in opened]
    assert len({pack_section(bank.config, bank)["path"] for bank in banks}) == 3


def test_a_bank_that_cannot_be_packed_is_refused(tmp_path):
    (folder := tmp_path / "checkpoint-10").mkdir()
    tensors = {"0.lora_A.weight": torch.randn(1, 3), "0.lora_B.weight": torch.randn(2, 1)}
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    bank = CheckpointBank.open(tmp_path)
    with pytest.raises(ConfigError, match="cannot be sent to workers: .* LoRA factors.*`bank=path`"), packed(bank):
        pass


def unpacking(data, path, begin, seen):
    begin.wait()
    with unpack_once(data, path):
        seen.put((path.stat().st_ino, path.read_bytes() == data.tobytes()))
        time.sleep(0.1)


def test_many_processes_write_it_once(tmp_path):
    data, path = np.arange(100_000, dtype=np.uint32).view(np.uint8), tmp_path / "bank.safetensors"
    path.write_bytes(b"torn")  # by a process that was killed
    fork = multiprocessing.get_context("fork")
    begin, seen = fork.Event(), fork.Queue()
    processes = [fork.Process(target=unpacking, args=(data, path, begin, seen)) for _ in range(6)]
    for process in processes:
        process.start()
    begin.set()
    found = [seen.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert set(found) == {(path.stat().st_ino, True)}
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".lock"}
    assert all(file.stem == path.stem for file in tmp_path.iterdir())


def test_it_is_forgotten_when_nobody_uses_it(tmp_path):
    data, path = np.arange(1000, dtype=np.uint8), Path(tmp_path / "bank.safetensors")
    forget(path)  # nothing there
    first, second = unpack_once(data, path), unpack_once(data, path)
    first.close()
    forget(path, tries=1)
    assert path.read_bytes() == data.tobytes()
    second.close()
    forget(path, tries=1)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- searches share one


@pytest.fixture
def packs(monkeypatch):
    """Paths of the copies that were written."""
    written = []

    def write(bank, path):
        written.append(path)
        time.sleep(0.1)
        write_copy(bank, path)

    write_copy = packed_bank._write
    monkeypatch.setattr(packed_bank, "_write", write)
    return written


def shared(bank, folder):
    notes = []
    section, leave = share_bank(bank.config, bank, folder, notes.append)
    assert notes == []
    assert open_bank({"bank": section}).digest == bank.digest
    return Path(section["path"]), leave


def test_searches_at_once_share_one_copy_until_the_last_leaves(tmp_path, packs):
    bank, banks = CheckpointBank.open(checkpoints(tmp_path / "run", torch.float64)), tmp_path / ".banks"
    bank.load()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: shared(bank, banks), range(6)))
    assert packs == [found[0][0]]
    assert {path for path, _ in found} == set(packs)
    with ThreadPoolExecutor(6) as pool:  # some leave while others come
        later = pool.map(lambda _: shared(bank, banks), range(5))
        list(pool.map(lambda pair: pair[1](), found[1:]))
    assert packs == [found[0][0]]
    for _, leave in (*later, found[0]):
        assert packs[0].is_file()
        leave()
    assert not banks.exists()


def test_coming_and_leaving_in_any_order_finds_a_whole_copy(tmp_path):
    bank, banks = CheckpointBank.open(checkpoints(tmp_path / "run", torch.float32)), tmp_path / ".banks"
    bank.load()

    def search(_):
        path, leave = shared(bank, banks)
        whole = packed_bank._is_copy({**bank.config, **pack_section(bank.config, bank), "path": path}, bank)
        leave()
        return whole

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(search, range(40))) == [True] * 40
    assert not banks.exists()


def killed(leave):
    """What the kernel does for a search that is killed: its lock is given back."""
    inspect.getclosurevars(leave).nonlocals["lock"].close()


def test_what_a_killed_search_left_is_used_or_removed_by_the_next(tmp_path, packs):
    folder = checkpoints(tmp_path / "run", torch.float32)
    bank, other, banks = CheckpointBank.open(folder), CheckpointBank.open(folder, dtype="bfloat16"), tmp_path / ".banks"
    path, leave = shared(bank, banks)
    killed(leave)
    (banks / f".{path.name}.12345678.tmp").write_bytes(b"half")
    again, leave = shared(bank, banks)
    assert (again, packs) == (path, [path])
    killed(leave)
    last, leave = shared(other, banks)
    assert {file.name for file in banks.iterdir()} == {last.name, last.with_suffix(".lock").name}
    leave()
    assert not banks.exists()


def test_a_sweep_keeps_the_copy_for_its_next_search(tmp_path, packs):
    folder, banks = checkpoints(tmp_path / "run", torch.float32), tmp_path / ".banks"
    bank, other = CheckpointBank.open(folder), CheckpointBank.open(folder, select=Selection(every=2))
    with keeping():
        for _ in range(3):
            shared(bank, banks)[1]()
        assert len(packs) == 1
        assert packs[0].is_file()
        shared(other, banks)[1]()
        assert [file for file in banks.iterdir() if file.suffix == ".safetensors"] == [packs[1]]
    assert not banks.exists()

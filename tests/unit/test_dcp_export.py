"""Combinations as folders of torch.distributed.checkpoint, by one process and by two, read by torch and by us."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers_ranks import run_ranks
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lcsc.bank import CheckpointBank
from lcsc.bank.dcp_file import read_dcp
from lcsc.bank.extents import read_source
from lcsc.core.errors import BankError, ConfigError, NonFiniteError, OutputExistsError
from lcsc.export import dcp_plan
from lcsc.export.dcp import RECIPE, combine_dcp, save_dcp
from lcsc.export.oneshot import given
from lcsc.export.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12: torch has threads
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COEF = [0.3, -1.1, 2.6, -0.8]


def state(k):
    generator = torch.Generator().manual_seed(k)
    made = {
        "a": torch.randn(5, 7, 2, generator=generator),
        "b.half": torch.randn(9, 3, generator=generator).to(torch.bfloat16),
        "c.scalar": torch.randn((), generator=generator),
        "d.empty": torch.zeros(0, 4),
        "e.big": torch.randn(301, 1000, generator=generator),
        "f.running_var": torch.rand(6, generator=generator),
        "f.count": torch.tensor(k),
        "g.row": torch.randn(1, 2000, generator=generator),
    }
    return made | {"h.tied": made["a"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank")
    for k in range(4):
        torch.save(state(k), path / f"model{k + 1}.pt")
    return path


@pytest.fixture(scope="module")
def wanted(folder):
    """The whole combination by name, float32; made here, so that the kernels are loaded before the processes part."""
    bank = CheckpointBank.open(folder, storage="resident")
    return {**bank.layout.views(bank.combine(torch.tensor(COEF, dtype=torch.float64))), **bank.constants}


def as_written(wanted, dtype):
    """What a folder should hold: our copies of integers and statistics, everything else in a dtype."""
    copied = ("f.running_var", "f.count")
    kept = {name: tensor.dtype for name, tensor in state(3).items()}
    return {
        n: t if n in copied else t.to(kept[n] if dtype == "same" else getattr(torch, dtype)) for n, t in wanted.items()
    }


def check(to, wanted, tmp_path, files):
    """torch's loader, torch's converter and our reader find the same bits."""
    assert sorted(path.name for path in to.glob("*.distcp")) == [f"__{rank}_0.distcp" for rank in range(files)]
    loaded = {name: torch.full_like(tensor, 77) for name, tensor in wanted.items()}
    dcp.load(loaded, checkpoint_id=to, no_dist=True)
    dcp_to_torch_save(to, tmp_path / f"{to.name}.pt")
    converted = torch.load(tmp_path / f"{to.name}.pt", weights_only=True)
    table, paths, _ = read_dcp(to)
    assert loaded.keys() == converted.keys() == table.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor), name
        assert converted[name].dtype == tensor.dtype
        assert torch.equal(converted[name], tensor), name
        bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert read_source(paths, table[name]).tobytes() == bits, name
    return table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "same"])
def test_one_process(folder, wanted, tmp_path, dtype):
    bank = CheckpointBank.open(folder, storage="streamed")
    save_dcp(bank, COEF, tmp_path / "out", dtype=dtype)
    check(tmp_path / "out", as_written(wanted, dtype), tmp_path, 1)
    recipe = json.loads((tmp_path / "out" / RECIPE).read_text())
    assert recipe["coef"] == COEF
    assert recipe["dtype"] == dtype
    size = (folder / "model2.pt").stat().st_size
    assert recipe["parents"][1] == {"step": 2, "files": {"model2.pt": size}}
    assert (tmp_path / "out" / "coefficients.csv").read_text() == "step,coef\n1,0.3\n2,-1.1\n3,2.6\n4,-0.8\n"
    again = CheckpointBank.open(
        tmp_path / "out", storage="resident"
    )  # one checkpoint of a bank, tied names tied no more
    assert torch.equal(again.layout.views(again.matrix()[0])["e.big"], as_written(wanted, dtype)["e.big"].float())


def bytes_read():
    """What this process has asked the system to read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def shared(rank, folder, to):
    bank = CheckpointBank.open(folder, storage="streamed")
    save_dcp(bank, COEF, to.with_name("first"))  # loads what is loaded once
    before = bytes_read()
    save_dcp(bank, COEF, to)
    # 64 KiB: messages between the processes, and rank 0's constants
    share = 4 * 4 * bank.layout.num_parameters / 2
    assert share > 20 * 2**16
    assert abs(bytes_read() - before - share) < 2**16


def test_two_processes_read_half_and_write_half(folder, wanted, tmp_path):
    run_ranks(2, tmp_path, shared, folder, tmp_path / "out")
    table = check(tmp_path / "out", wanted, tmp_path, 2)
    assert [piece.at for piece in table["e.big"].pieces] == [(0, 0), (152, 0)]
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.distcp")]
    assert max(sizes) < 1.03 * min(sizes)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("batch", [1, 1500, 20_000])
def test_small_batches_give_the_same_files(folder, wanted, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(dcp_plan, "BATCH", batch * (1 if batch > 1 else 300))
    save_dcp(CheckpointBank.open(folder, storage="resident"), COEF, tmp_path / "out")
    table = check(tmp_path / "out", wanted, tmp_path, 1)
    assert len(table["e.big"].pieces) == {1: 301, 1500: 301, 20_000: 16}[batch]


def little_memory(rank, small, large, to):
    """Grow by a batch, not by the candidate."""
    dcp_plan.BATCH = 2**19
    save_dcp(CheckpointBank.open(small), COEF, to / "small")  # loads what is loaded once
    bank = CheckpointBank.open(large, storage="streamed")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    status = Path("/proc/self/status")
    peak, now = (int(re.search(rf"{key}:\s+(\d+) kB", status.read_text())[1]) for key in ("VmHWM", "VmRSS"))
    assert peak - now < 1000
    save_dcp(bank, [1.0], to / "large")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    assert 4 * bank.layout.num_parameters > 80_000_000
    assert (peak - now) * 1024 < 40_000_000


def test_memory_is_a_batch(folder, wanted, tmp_path):
    (tmp_path / "bank").mkdir()
    tensors = {f"t{i}": torch.ones(20, 25_100, dtype=torch.bfloat16) for i in range(40)}
    save_file(tensors, tmp_path / "bank" / "m1.safetensors")
    run_ranks(1, tmp_path, little_memory, folder, tmp_path / "bank", tmp_path)


def broken(rank, folder, to):
    bank = CheckpointBank.open(folder, storage="streamed")
    with pytest.raises(NonFiniteError, match=r"m1.safetensors` holds 1 NaN or Inf in `z`"):
        save_dcp(bank, [0.5, 0.5], to)
    with pytest.raises(NonFiniteError, match=r"`w` reaches 1e\+08, too large for float16. Write it with dtype=float32"):
        save_dcp(CheckpointBank.open(folder / "m0.safetensors"), [1e8], to, dtype="float16")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if rank else soft, hard))  # a full disk, for one of them
    with pytest.raises(ConfigError, match="out` cannot be written: File too large, .* Make room, or write elsewhere"):
        save_dcp(CheckpointBank.open(folder / "m0.safetensors"), [1.0], to)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (to.parent / "taken").mkdir(exist_ok=True)
    with pytest.raises(OutputExistsError, match="taken` exists already"):
        save_dcp(CheckpointBank.open(folder / "m0.safetensors"), [1.0], to.parent / "taken")


def test_an_error_of_one_process_is_raised_in_all_and_nothing_stays(wanted, tmp_path):
    (tmp_path / "bank").mkdir()
    for k in range(2):
        tensors = {"w": torch.ones(3000), "z": torch.tensor([1.0, float("nan") if k else 0.0])}  # in the second's range
        save_file(tensors, tmp_path / "bank" / f"m{k}.safetensors")
    run_ranks(2, tmp_path, broken, tmp_path / "bank", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "taken"]


def test_several_outputs(folder, wanted, tmp_path):
    bank = CheckpointBank.open(folder, storage="streamed")
    outputs = given(bank, {"one": COEF, "two": [0.0, 0.0, 0.0, 1.0]})
    told = []
    done = combine_dcp(bank, outputs, tmp_path / "out", progress=lambda *numbers: told.append(numbers))
    check(tmp_path / "out" / "one", wanted, tmp_path, 1)
    check(tmp_path / "out" / "two", as_written(state(3), "float32"), tmp_path, 1)
    assert [item.path for item in done] == [tmp_path / "out" / "one", tmp_path / "out" / "two"]
    assert done[0].nbytes == (tmp_path / "out" / "one" / "__0_0.distcp").stat().st_size
    total = sum(tensor.numel() for name, tensor in wanted.items() if name[0] != "f")
    assert told[-1] == (total, total)
    assert (
        4 * total < done[0].nbytes < 4 * total + 2000 * len(wanted)
    )  # a torch archive has some 1,200 bytes of its own


def test_what_cannot_be_written_is_refused(folder, tmp_path):
    bank = CheckpointBank.open(folder, storage="streamed")
    for coef, dtype, to, message in (
        (COEF[:3], "float32", tmp_path / "out", r"shape \(3,\); they must be finite, one for each of the bank's 4"),
        ([*COEF[:3], np.nan], "float32", tmp_path / "out", "must be finite"),
        (COEF, "float8", tmp_path / "out", "`dtype` is `float8`; it must be one of float32"),
        (COEF, "float32", folder / "out", "inside the bank"),
    ):
        with pytest.raises(ConfigError, match=message):
            save_dcp(bank, coef, to, dtype=dtype)
    names = {
        f"base_model.model.a.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (2, 3)), ("B", (3, 2)))
    }
    (tmp_path / "lora").mkdir()
    save_file(names, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(BankError, match="holds LoRA adapters.*without format=dcp"):
        save_dcp(CheckpointBank.open(tmp_path / "lora"), [1.0], tmp_path / "out")
    save_dcp(bank, COEF, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is a folder of torch.distributed.checkpoint.*format=safetensors"):
        verify(tmp_path / "out")

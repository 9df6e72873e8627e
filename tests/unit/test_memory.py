"""The peak memory of processes of their own (VmHWM) beside the number that the scan prints, and what it is made of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers_cli import TOY
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.find import choose, find_groups
from lcsc.bank.memory import PER_CHUNK, Extent, bank_bytes, bank_peak, search_peak
from lcsc.bank.shape import shape_of

PEAK = """
from pathlib import Path
status = Path("/proc/self/status").read_text()
print("VmHWM", 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))))
"""
BANK = """
import sys, torch
from lcsc.bank import CheckpointBank
bank = CheckpointBank.open(sys.argv[1], storage=sys.argv[2])
bank.load()
coef_K = torch.full((bank.num_checkpoints,), 1 / bank.num_checkpoints, dtype=torch.float64)
bank.combine(coef_K, out=torch.empty(bank.layout.num_parameters))
"""
# the toy alone does without diffusers, which the prediction counts in
SEARCH = """
import sys
import diffusers.models.modeling_utils
from lcsc.cli.main import main
assert main(["search", *sys.argv[1:]]) == 0
"""


def begin(code, *words):
    command = [sys.executable, "-c", code + PEAK, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def peak(child):
    out, _ = child.communicate()
    assert child.returncode == 0
    return int(out.split("VmHWM")[1])


def extent_of(folder):
    group = choose(find_groups(folder))
    shape = shape_of(group, group.checkpoints)
    return Extent.of(shape.rows, shape.layout)


def test_a_strided_tensor_takes_what_is_predicted(tmp_path):
    for step in range(1, 7):
        torch.save({"w": torch.ones(2000, 4000).t()}, tmp_path / f"model{step}.pt")
    child, extent = begin(BANK, tmp_path, "streamed"), extent_of(tmp_path)
    assert extent.long == (8_000_000,)
    assert peak(child) == pytest.approx(bank_peak(extent, "streamed"), rel=0.1)
    # by hand: a candidate, one buffer of sums (8), result (4) and a row (4), and what else a bank of this size takes
    plain = bank_bytes(Extent(6, 8_000_000, extent.num_chunks), "streamed")
    assert bank_bytes(extent, "streamed") == plain + 16 * 8_000_000
    assert bank_bytes(extent, "delta") == bank_bytes(Extent(6, 8_000_000, extent.num_chunks), "delta") + 8 * 8_000_000


def test_marks_and_sums_of_chunks_are_counted(tmp_path):
    tensors = {f"block{i}.weight": torch.full((4,), float(i)) for i in range(700)}
    for step in (1, 2):
        save_file(tensors, tmp_path / f"model{step}.safetensors")
    bank = CheckpointBank.open(tmp_path)
    extent = extent_of(tmp_path)
    assert extent.num_chunks == 700
    assert bank.checksums.nbytes == PER_CHUNK * 2 * 700
    assert bank_bytes(extent, "streamed") - bank_bytes(Extent(2, 2800), "streamed") == bank.checksums.nbytes


@pytest.mark.faults
def test_a_search_takes_what_is_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["search.num_trials=3", "search.num_finalists=1", "quiet=true"]
    measured = peak(begin(SEARCH, *TOY, *few))
    assert measured == pytest.approx(search_peak(extent_of(tmp_path / "banks" / "toy_gaussian"), "resident"), rel=0.1)

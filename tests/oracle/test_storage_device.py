"""Rows for another device: padded, loaded through a staging row, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.rows import Checksums
from lcsc.bank.storage import PADDING, load
from lcsc.core.errors import ConfigError


@pytest.fixture
def bank(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for step in range(3):
        save_file({"a": torch.randn(7, 3, generator=rng), "b": torch.randn(5)}, tmp_path / f"step_{step}.safetensors")
    return CheckpointBank.open(tmp_path)


@pytest.mark.parametrize("anchor", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_rows_equal_direct_rows(bank, dtype, anchor):
    # `cpu:0` is the CPU under a name that takes the path of a GPU
    sums, other_sums = Checksums(bank.layout, bank.rows), Checksums(bank.layout, bank.rows)
    plain = load(bank.rows, bank.layout, sums, dtype, anchor)
    staged = load(bank.rows, bank.layout, other_sums, dtype, anchor, "cpu:0")
    assert torch.equal(staged.W_KP, plain.W_KP)
    assert staged.W_KP.stride(0) == PADDING
    assert sums.of(2) is not None
    assert [sums.of(k) for k in range(3)] == [other_sums.of(k) for k in range(3)]
    assert (staged.anchor_P is None) == (anchor is None)
    assert anchor is None or torch.equal(staged.anchor_P, plain.anchor_P)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is there")
def test_a_missing_gpu_is_refused_and_auto_falls_back(bank):
    with pytest.raises(ConfigError, match=r"`bank.device` is `cuda`, but torch finds no such device"):
        CheckpointBank.open(bank.path, device="cuda")
    assert CheckpointBank.open(bank.path, device="auto").device == "cpu"

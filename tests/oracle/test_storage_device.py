"""Rows for another device: padded, loaded through a staging row, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.rows import Checksums
from lcsc.bank.storage import PADDING, OnCpu, Resident, load
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.export.model import export_model
from lcsc.export.verify import verify
from lcsc.export.weights import read_weights
from lcsc.kernels import Groups
from lcsc.operators.linear import Linear


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


@pytest.mark.parametrize("anchor", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [4, 2**18])
def test_rows_elsewhere_are_combined_on_the_cpu(bank, dtype, anchor, columns, monkeypatch):
    monkeypatch.setattr("lcsc.bank.storage.COLUMNS", columns)
    sums = Checksums(bank.layout, bank.rows)
    plain = load(bank.rows, bank.layout, sums, dtype, anchor)
    staged = load(bank.rows, bank.layout, sums, dtype, anchor, "cpu:0")
    there = OnCpu(staged.W_KP, staged.anchor_P)
    coef_BGK = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = Groups((0, 21, 26), (1, 0), 2)
    for coef, own in ((coef_BGK[0, 0], None), (coef_BGK[0], None), (coef_BGK[0], groups), (coef_BGK, groups)):
        wanted = plain.combine(coef, own, None)
        assert torch.equal(there.combine(coef, own, None), wanted)
        into = torch.full_like(wanted, torch.nan)
        assert there.combine(coef, own, into) is into
        assert torch.equal(into, wanted)


class Float32Sums(Resident):
    """What a GPU without fast float64 does: the sums are float32."""

    def combine(self, coef, groups, out):
        theta_P = coef.float() @ self.W_KP
        return theta_P if out is None else out.copy_(theta_P)


def test_an_export_is_combined_on_the_cpu(tiny_bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank, linear = CheckpointBank.open(tiny_bank), Linear()
    on_gpu = Float32Sums(bank.matrix())
    bank.__dict__["_store"], bank.device = on_gpu, "cuda:0"
    point = linear.point(bank, np.array([1.7, -1.1234567, 0.3, 0.1234567, 0.0]))
    objective = build("objective", "command", command="echo 1")
    info = {
        "run_id": "r", "name": "r", "command": "", "metric": "m", "nfe": 1, "bank": {"steps": bank.steps},
        "fingerprints": {"evaluator": {}, "versions": {"lcsc": "x"}},
    }  # fmt: skip
    score = {"value": 1.0, "se": None, "num_images": 2, "label": "x"}
    how = {"expected": score, "info": info, "report": {"best": score, "baselines": {}}, "to": tmp_path / "out"}
    export_model(bank=bank, operator=linear, objective=objective, seed=0, point=point, **how)
    (checked,) = verify(tmp_path / "out")  # on the CPU
    assert checked.num_parents == 5
    written, scored = read_weights(tmp_path / "out"), linear.apply(bank, point).weights()
    assert any(not torch.equal(written[name], scored[name]) for name in scored)
    assert bank._store is on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is there")
def test_a_missing_gpu_is_refused_and_auto_falls_back(bank):
    with pytest.raises(ConfigError, match=r"`bank.device` is `cuda`, but torch finds no such device"):
        CheckpointBank.open(bank.path, device="cuda")
    assert CheckpointBank.open(bank.path, device="auto").device == "cpu"

"""A bank whose rows lie on a GPU gives the CPU bank's numbers, in every storage and from every buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank
from lcsc.kernels import Groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def folder(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        tensors = {f"layer{i}.weight": torch.randn(37, 11 + i, generator=rng) for i in range(4)}
        save_file(tensors, tmp_path / f"step_{step}.safetensors")
    return tmp_path


def fast_float64():
    from lcsc.kernels import _triton

    return torch.cuda.get_device_capability() in _triton.FAST_FLOAT64


@pytest.mark.parametrize("storage", ["resident", "delta", "streamed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_candidates_as_on_the_cpu(folder, storage, dtype):
    here, there = (
        CheckpointBank.open(folder, storage=storage, dtype=dtype, device=device) for device in ("cpu", "cuda")
    )
    coef_BK = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 5)))
    wanted = here.combine(coef_BK)
    into = torch.full_like(wanted, torch.nan, device="cuda")
    assert there.combine(coef_BK, out=into) is into
    on_cpu = there.combine(coef_BK, out=torch.full_like(wanted, torch.nan))
    assert torch.equal(on_cpu, into.cpu())
    if fast_float64():
        assert torch.equal(on_cpu, wanted)
    torch.testing.assert_close(on_cpu, wanted, rtol=1e-5, atol=1e-5)
    assert here.digest == there.digest


def test_transpose_blocks_stream_and_rows(folder):
    here, there = (CheckpointBank.open(folder, storage="resident", device=device) for device in ("cpu", "cuda"))
    P = here.layout.num_parameters
    groups = Groups((0, 407, P), (1, 0), 2)
    grad_P = torch.randn(P, generator=torch.Generator().manual_seed(2))
    for extra in ({}, {"groups": groups}):
        torch.testing.assert_close(
            there.project(grad_P.cuda(), **extra).cpu(), here.project(grad_P, **extra), rtol=1e-5, atol=1e-4
        )
    assert there.matrix().is_cuda
    assert there.matrix().stride(0) % 64 == 0
    assert torch.equal(there.matrix().cpu(), here.matrix())
    rows = np.concatenate([W_KC for _, W_KC in there.blocks(100)], axis=1)
    assert np.array_equal(rows, here.matrix().numpy())
    coef_MK = np.random.default_rng(3).normal(size=(2, 5))
    found = np.concatenate([out_MC.copy() for _, out_MC in there.stream(coef_MK)], axis=1)
    np.testing.assert_allclose(found, coef_MK @ rows.astype(np.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["resident", "delta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cpu_gives_the_bits_of_a_cpu(folder, storage, dtype, monkeypatch):
    from lcsc.kernels import _triton

    monkeypatch.setattr(_triton, "FAST_FLOAT64", frozenset())  # sums are float32 on this card, as on most
    here, there = (
        CheckpointBank.open(folder, storage=storage, dtype=dtype, device=device) for device in ("cpu", "cuda")
    )
    coef_BGK = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 2, 5)))
    groups = Groups((0, 407, here.layout.num_parameters), (1, 0), 2)
    with there.on_cpu():
        assert torch.equal(there.combine(coef_BGK[0, 0]), here.combine(coef_BGK[0, 0]))
        assert torch.equal(there.combine(coef_BGK, groups=groups), here.combine(coef_BGK, groups=groups))
    assert there.combine(coef_BGK[0, 0]).is_cuda


def test_auto_takes_the_gpu(folder):
    bank = CheckpointBank.open(folder, device="auto")
    assert bank.device.startswith("cuda")
    assert "on cuda" in bank.lines[0]

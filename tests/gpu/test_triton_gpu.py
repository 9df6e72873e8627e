"""The Triton kernels on a CUDA device: the cases of tests/oracle/test_triton.py through the public functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_triton import CASES, PROJECT, check_combine, check_project

from lcsc.core.errors import EvaluationError
from lcsc.kernels import _reference, combine, project

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def exact():
    from lcsc.kernels import _triton

    return torch.cuda.get_device_capability() in _triton.FAST_FLOAT64


def public(coef, W_KP, out_BP, groups, anchor_P):
    try:
        found = combine(torch.from_numpy(coef), W_KP, groups=groups, anchor_P=anchor_P, out_BP=out_BP)
    except EvaluationError:
        return False
    assert found is out_BP
    return True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_combine(case):
    found = check_combine(case, public, "cuda")
    assert found["same_kind"]
    assert found["inside"]
    assert found["finite"] == found["wanted_finite"]
    assert found["worst"] <= 1
    if exact() or case.coef in ("one-hot", "zero", "small"):
        assert found["bits"]


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if case.coef != "small"], ids=lambda case: case.name)
def test_combine_in_both_kinds_of_sums(case, float64):
    from lcsc.kernels import _triton

    found = check_combine(case, lambda *args: _triton.combine_rows(*args, float64=float64), "cuda")
    assert found["finite"] == found["wanted_finite"]
    assert found["bits"] if float64 else found["worst"] <= 1


@pytest.mark.parametrize("case", PROJECT, ids=lambda case: case.name)
def test_project(case):
    from lcsc.kernels import _triton

    def call(grad_P, W_KP, anchor_P):
        return project(grad_P, W_KP, anchor_P=anchor_P)

    found = check_project(case, call, _triton.DOT_TERMS, "cuda")
    assert found["shape"]
    assert found["again"]
    assert found["tight" if exact() else "loose"] <= 1
    rough = check_project(case, lambda *args: _triton.project_rows(*args, float64=False), _triton.DOT_TERMS, "cuda")
    assert rough["loose"] <= 1


def test_a_candidate_does_not_depend_on_the_others_of_its_call():
    W_KP = torch.randn(7, 5000, device="cuda")
    coef_BK = torch.randn(21, 7, dtype=torch.float64)
    coef_BK[3, 2] = 0
    together = combine(coef_BK, W_KP)
    assert all(torch.equal(combine(coef_K, W_KP), row_P) for coef_K, row_P in zip(coef_BK, together, strict=True))


def test_banks_of_more_than_two_to_the_31_numbers():
    K, P = 3, 2**30 - 5
    need = 2 * K * P + 4 * 2 * P
    if torch.cuda.mem_get_info()[0] < 1.1 * need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    W_KP = torch.zeros(K, P, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([0, 1, P // 2, P - 2, P - 1])
    W_KP[:, ends] = torch.randn(K, len(ends), device="cuda").bfloat16()
    coef_BK = np.array([[0.5, -1.25, 3.0], [1.0, 2.0, -0.125]])
    out_BP = combine(torch.from_numpy(coef_BK), W_KP)
    part = W_KP[:, ends].float().cpu().numpy()
    for coef_K, row_P in zip(coef_BK, out_BP, strict=True):
        np.testing.assert_allclose(row_P[ends].cpu().numpy(), _reference.combine(coef_K, part), rtol=0, atol=1e-5)
    grad_P = out_BP[0]
    wanted = [math.fsum(row * grad_P[ends].cpu().double().numpy()) for row in part.astype(np.float64)]
    np.testing.assert_allclose(project(grad_P, W_KP).cpu().numpy(), wanted, rtol=1e-4, atol=1e-4)

"""Whatever the shapes, the coefficients and the numbers, the CPU kernels give the bits of their definition."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc.kernels import _reference
from lcsc.kernels._numba import accumulate, combine_rows, finish, project_rows, round_coef

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: coefficients that are easily treated wrongly, among ordinary ones
COEFS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e30, 2.0**-140]), st.floats(-6, 6, allow_subnormal=False)
)


@st.composite
def problems(draw):
    """Any bit patterns as rows, and coefficients of several candidates."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    K, P, B = draw(st.integers(1, 20)), draw(st.integers(1, 140)), draw(st.integers(1, 9))
    word = np.uint32 if dtype == "float32" else np.uint16
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    W_KP = rng.integers(0, np.iinfo(word).max, (K, P), word, endpoint=True)
    if draw(st.booleans()):  # ordinary numbers, some of them zeros of either sign
        W_KP = rng.standard_normal((K, P)).astype(np.float32) * rng.choice([-1, 0, 1], (K, P)).astype(np.float32)
        W_KP = torch.from_numpy(W_KP).to(DTYPES[dtype]).view(torch.int32 if word is np.uint32 else torch.int16)
        W_KP = W_KP.numpy().view(word)
    coef_BK = np.array(draw(st.lists(COEFS, min_size=B * K, max_size=B * K))).reshape(B, K)
    signed = W_KP.view(np.int32 if word is np.uint32 else np.int16)
    wide_KP = torch.from_numpy(signed).view(DTYPES[dtype]).double().numpy()
    return dtype, W_KP, wide_KP, coef_BK


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits; any NaN equals any NaN."""
    return np.array_equal(
        np.where(np.isnan(a), 0, a).view(np.uint32), np.where(np.isnan(b), 0, b).view(np.uint32)
    ) and (np.array_equal(np.isnan(a), np.isnan(b)))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_bits_of_the_definition_and_the_flag(problem):
    dtype, W_KP, wide_KP, coef_BK = problem
    out_BP = np.empty((len(coef_BK), W_KP.shape[1]), np.float32)
    finite = combine_rows(coef_BK, W_KP, out_BP, dtype=dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = np.stack([_reference.combine(coef_K, wide_KP) for coef_K in coef_BK])
    assert same(out_BP, wanted)
    assert finite == np.isfinite(wanted).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_company_cuts_and_pieces_do_not_matter(problem, data):
    dtype, W_KP, _, coef_BK = problem
    (K, P), B = W_KP.shape, len(coef_BK)
    whole = np.empty((B, P), np.float32)
    combine_rows(coef_BK, W_KP, whole, dtype=dtype)
    some = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=9), label="candidates")
    a, b = sorted(data.draw(st.tuples(st.integers(0, P), st.integers(0, P)), label="columns"))
    k = data.draw(st.integers(0, K), label="first piece of rows")
    acc_BC, out_BC = np.full((len(some), b - a), -0.0), np.empty((len(some), b - a), np.float32)
    accumulate(acc_BC, coef_BK[some, :k], W_KP[:k, a:b], dtype)
    accumulate(acc_BC, coef_BK[some, k:], W_KP[k:, a:b], dtype)
    finish(acc_BC, out_BC)
    assert same(out_BC, whole[some, a:b])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_project_is_the_transpose(problem):
    """<combine(c), g> = <c, project(g)> up to the rounding of the results, for numbers that cannot overflow."""
    dtype, W_KP, wide_KP, coef_BK = problem
    tame = np.nan_to_num(wide_KP, posinf=1, neginf=-1).clip(-1e4, 1e4)
    tame_t = torch.from_numpy(tame).to(DTYPES[dtype])
    rows = tame_t.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
    tame, coef_BK = tame_t.double().numpy(), round_coef(coef_BK.clip(-6, 6))
    grad_P = np.random.default_rng(0).standard_normal(W_KP.shape[1]).astype(np.float32)
    dots_K = project_rows(grad_P, rows, dtype=dtype)
    size_K = np.abs(tame) @ np.abs(grad_P).astype(np.float64)
    assert (np.abs(dots_K - _reference.project(grad_P, tame)) <= 1e-14 * size_K).all()
    out_BP = np.empty((len(coef_BK), W_KP.shape[1]), np.float32)
    assert combine_rows(coef_BK, rows, out_BP, dtype=dtype)
    slack_B = 2.0**-24 * (np.abs(coef_BK) @ size_K) + 1e-40
    assert (np.abs(out_BP.astype(np.float64) @ grad_P - coef_BK @ dots_K) <= slack_B).all()

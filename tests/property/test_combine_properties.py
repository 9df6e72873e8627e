"""The combiner is linear, order-free, exact on one-hot coefficients, and agrees with float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc.kernels import _reference, combine, project


def bank(seed: int, K: int, P: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((K, P)).astype(np.float32)).to(dtype)


shapes = st.tuples(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 300))


@settings(max_examples=50, deadline=None)
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_float64_oracle(shape, dtype):
    W_KP = bank(*shape, dtype=dtype)
    coef_K = np.random.default_rng(1).uniform(-6, 6, W_KP.shape[0]).astype(np.float32)
    exact = _reference.combine(coef_K, W_KP.float().numpy())
    scale = np.abs(coef_K).sum() * W_KP.float().abs().max().item()
    assert np.abs(combine(torch.from_numpy(coef_K), W_KP).numpy() - exact).max() <= 1e-6 * scale
    grad_P = bank(2, 1, W_KP.shape[1])[0]
    exact_K = _reference.project(grad_P.numpy(), W_KP.float().numpy())
    bound = 1e-6 * (W_KP.float().abs() @ grad_P.abs()).max().item() + 1e-7
    assert np.abs(project(grad_P, W_KP).numpy() - exact_K).max() <= bound


@settings(max_examples=50, deadline=None)
@given(shapes, st.data())
def test_one_hot_is_the_checkpoint_bit_for_bit(shape, data):
    W_KP = bank(*shape)
    W_KP[:, 0] = -0.0
    k = data.draw(st.integers(0, W_KP.shape[0] - 1))
    coef_K = torch.zeros(W_KP.shape[0])
    coef_K[k] = 1.0
    assert combine(coef_K, W_KP).numpy().tobytes() == W_KP[k].numpy().tobytes()


@settings(max_examples=30, deadline=None)
@given(shapes, st.floats(-3, 3), st.floats(-3, 3))
def test_linear_and_order_free(shape, a, b):
    W_KP = bank(*shape)
    x, y = bank(5, 2, W_KP.shape[0])
    both = combine(a * x + b * y, W_KP)
    apart = a * combine(x, W_KP) + b * combine(y, W_KP)
    torch.testing.assert_close(both, apart, atol=2e-4, rtol=1e-4)
    order = torch.randperm(W_KP.shape[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(combine(x[order], W_KP[order]), combine(x, W_KP), atol=1e-4, rtol=1e-4)


def test_project_is_the_gradient_of_combine():
    W_KP = bank(0, 7, 50).double()
    coef_K = torch.linspace(-1, 2, 7, dtype=torch.float64, requires_grad=True)
    loss = torch.sin(coef_K @ W_KP).sum()
    (wanted,) = torch.autograd.grad(loss, coef_K)
    grad_P = torch.cos(coef_K.detach() @ W_KP)
    torch.testing.assert_close(project(grad_P.float(), W_KP.float()), wanted.float(), atol=1e-4, rtol=1e-4)


def test_several_candidates_and_a_given_buffer():
    W_KP = bank(0, 4, 9)
    coef_BK = bank(1, 3, 4)
    out_BP = torch.full((3, 9), 7.0)
    assert combine(coef_BK, W_KP, out_BP=out_BP) is out_BP
    torch.testing.assert_close(out_BP, coef_BK @ W_KP)


def test_blocks_of_half_precision_banks_join_without_seams():
    W_KP = bank(3, 6, 1000, torch.bfloat16)
    coef_K = bank(4, 1, 6)[0]
    cuts = [0, 1, 64, 100, 999, 1000]
    parts = [combine(coef_K, W_KP[:, a:b]) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), combine(coef_K, W_KP))


@pytest.mark.parametrize(
    ("coef", "out", "text"),
    [
        (torch.zeros(3), None, "do not fit a bank"),
        (torch.zeros(4), torch.zeros(8), "out must be float32 of shape"),
        (torch.zeros(4), torch.zeros(9, dtype=torch.float64), "out must be float32"),
    ],
)
def test_wrong_shapes_are_refused(coef, out, text):
    with pytest.raises(ValueError, match=text):
        combine(coef, bank(0, 4, 9), out_BP=out)

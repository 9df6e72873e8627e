"""Tensors x coefficients. K = checkpoints, P = flat parameters, B = candidates.

Coefficients and accumulator are float32 whatever the bank stores: coefficients rounded to bfloat16 do
not even sum to one. The definition these functions are held to is `lcsc.kernels._reference` (float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: bytes of float32 scratch when a half-precision bank is combined block by block
BLOCK_BYTES = 32 * 2**20


def combine(coef_BK: Tensor, W_KP: Tensor, *, out_BP: Tensor | None = None) -> Tensor:
    """Linear combinations of checkpoints, `theta = coef @ W` (arXiv:2404.02241, Eq. for theta-bar).

    Args:
        coef_BK: coefficients, shape (B, K) or (K,), any float dtype; used as float32.
        W_KP: bank, shape (K, P), float32, bfloat16 or float16.
        out_BP: float32 buffer to fill, shape (B, P) or (P,); made when None.

    Returns:
        `out_BP`. A one-hot row returns that checkpoint bit for bit.

    Raises:
        ValueError: shapes or the dtype of the buffer do not fit.
    """
    coef_BK = coef_BK.to(device=W_KP.device, dtype=torch.float32)
    if coef_BK.ndim not in (1, 2) or W_KP.ndim != 2 or coef_BK.shape[-1] != W_KP.shape[0]:
        raise ValueError(
            f"coefficients of shape {tuple(coef_BK.shape)} do not fit a bank of shape {tuple(W_KP.shape)}."
        )
    shape = (*coef_BK.shape[:-1], W_KP.shape[1])
    if out_BP is None:
        out_BP = torch.empty(shape, dtype=torch.float32, device=W_KP.device)
    if out_BP.shape != shape or out_BP.dtype != torch.float32:
        raise ValueError(f"out must be float32 of shape {shape}, got {out_BP.dtype} of shape {tuple(out_BP.shape)}.")
    if coef_BK.ndim == 2:
        for coef_K, out_P in zip(coef_BK, out_BP, strict=True):
            combine(coef_K, W_KP, out_BP=out_P)
        return out_BP
    support = torch.nonzero(coef_BK).flatten()
    if len(support) == 1 and coef_BK[support[0]] == 1:  # 0 * x + w would lose the sign of -0.0
        return out_BP.copy_(W_KP[support[0]])
    if W_KP.dtype == torch.float32:
        return torch.mv(W_KP.T, coef_BK, out=out_BP)
    width = max(1, BLOCK_BYTES // (4 * W_KP.shape[0]))
    for start in range(0, W_KP.shape[1], width):
        block = W_KP[:, start : start + width].float()
        torch.mv(block.T, coef_BK, out=out_BP[start : start + width])
    return out_BP


def project(grad_P: Tensor, W_KP: Tensor) -> Tensor:
    """The transpose of `combine`: `grad_K = W @ grad`, the gradient of a loss with respect to the coefficients.

    Args:
        grad_P: gradient with respect to the combined parameters, shape (P,), float32.
        W_KP: bank, shape (K, P), float32, bfloat16 or float16.

    Returns:
        float32, shape (K,).
    """
    if W_KP.ndim != 2 or grad_P.shape != W_KP.shape[1:]:
        raise ValueError(f"a gradient of shape {tuple(grad_P.shape)} does not fit a bank of shape {tuple(W_KP.shape)}.")
    grad_P = grad_P.to(device=W_KP.device, dtype=torch.float32)
    if W_KP.dtype == torch.float32:
        return torch.mv(W_KP, grad_P)
    width = max(1, BLOCK_BYTES // (4 * W_KP.shape[0]))
    grad_K = torch.zeros(W_KP.shape[0], dtype=torch.float32, device=W_KP.device)
    for start in range(0, W_KP.shape[1], width):
        grad_K += torch.mv(W_KP[:, start : start + width].float(), grad_P[start : start + width])
    return grad_K

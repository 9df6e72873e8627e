"""Tensors x coefficients. K = checkpoints, P = flat parameters, B = candidates, G = layer groups.

The arithmetic is defined in `lcsc.kernels._reference`; on CPUs the results are its bits (`lcsc.kernels._numba`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc.core.errors import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which columns use which layer group's coefficients.

    Args:
        starts: first column of each of S segments, increasing, and P at the end; S + 1 numbers from 0.
        groups: layer group of each segment, S numbers in [0, num_groups).
        num_groups: G.

    Raises:
        ValueError: these do not fit together.
    """

    starts: tuple[int, ...]
    groups: tuple[int, ...]
    num_groups: int

    def __post_init__(self) -> None:
        rising = all(a <= b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if len(self.starts) != len(self.groups) + 1 or not self.groups or self.starts[0] != 0 or not rising:
            raise ValueError(f"{len(self.starts)} starts for {len(self.groups)} segments must rise from 0 to P.")
        if not all(0 <= group < self.num_groups for group in self.groups):
            raise ValueError(f"layer groups {sorted(set(self.groups))[:10]} are not all in [0, {self.num_groups}).")


def combine(
    coef: Tensor,
    W_KP: Tensor,
    *,
    groups: Groups | None = None,
    anchor_P: Tensor | None = None,
    out_BP: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """Linear combinations of checkpoints, `theta = coef @ W` (arXiv:2404.02241, Eq. for theta-bar).

    Args:
        coef: coefficients, shape (K,) or (B, K); with `groups` (G, K) or (B, G, K). Any float dtype; 29 significant
            bits of them are used.
        W_KP: bank, shape (K, P), float32, bfloat16 or float16; rows contiguous, any stride between them.
        groups: columns and the coefficients they use; None uses the same everywhere.
        anchor_P: float32, shape (P,): the rows are differences to it. None: they are the checkpoints.
        out_BP: float32 buffer to fill, shape (B, P) or (P,); made when None.
        check: refuse results that are not finite; the check is part of the pass.

    Returns:
        `out_BP`. A one-hot row of coefficients returns that checkpoint bit for bit.

    Raises:
        ValueError: shapes or the dtype of the buffer do not fit.
        EvaluationError: a candidate holds NaN or Inf.
    """
    import torch

    lead, P = coef.shape[: coef.ndim - (1 if groups is None else 2)], W_KP.shape[-1]
    inner = (W_KP.shape[0],) if groups is None else (groups.num_groups, W_KP.shape[0])
    if W_KP.ndim != 2 or len(lead) > 1 or tuple(coef.shape[len(lead) :]) != inner:
        raise ValueError(f"coefficients of shape {tuple(coef.shape)} do not fit a bank of shape {tuple(W_KP.shape)}.")
    shape = (*lead, P)
    if out_BP is None:
        out_BP = torch.empty(shape, dtype=torch.float32, device=W_KP.device)
    if out_BP.shape != shape or out_BP.dtype != torch.float32:
        raise ValueError(f"out must be float32 of shape {shape}, got {out_BP.dtype} of shape {tuple(out_BP.shape)}.")
    numbers = coef.detach().to("cpu", torch.float64).numpy().reshape(-1, *inner)
    rows_BP = out_BP.view(1, P) if out_BP.ndim == 1 else out_BP
    finite = _device(W_KP).combine_rows(numbers, W_KP, rows_BP, groups, anchor_P)
    if check and not finite:
        _raise(rows_BP, numbers)
    return out_BP


def _raise(rows_BP: Tensor, coef: np.ndarray) -> None:
    import torch

    for b, row_P in enumerate(rows_BP):
        bad = ~torch.isfinite(row_P)
        if bad.any():
            raise EvaluationError(
                f"candidate {b} holds {int(bad.sum())} NaN or Inf, the first at position {int(bad.nonzero()[0])}; its "
                f"coefficients reach {np.abs(coef[b]).max():.3g}. Smaller coefficients keep it within float32."
            )


def project(grad_P: Tensor, W_KP: Tensor, *, groups: Groups | None = None, anchor_P: Tensor | None = None) -> Tensor:
    """The transpose of `combine`: `grad_K = W @ grad`, the gradient of a loss with respect to the coefficients.

    Args:
        grad_P: gradient with respect to the combined parameters, shape (P,).
        W_KP: bank, shape (K, P), float32, bfloat16 or float16.
        groups: as for `combine`; None sums over all columns.
        anchor_P: as for `combine`.

    Returns:
        float32, shape (K,), with groups (G, K).

    Raises:
        ValueError: shapes do not fit.
    """
    import torch

    if W_KP.ndim != 2 or grad_P.shape != W_KP.shape[1:]:
        raise ValueError(f"a gradient of shape {tuple(grad_P.shape)} does not fit a bank of shape {tuple(W_KP.shape)}.")
    grad_P = grad_P.detach().to(device=W_KP.device, dtype=torch.float32).contiguous()
    device = _device(W_KP)
    if groups is None:
        return device.project_rows(grad_P, W_KP, anchor_P)
    grad_GK = torch.zeros(groups.num_groups, W_KP.shape[0], dtype=torch.float32, device=W_KP.device)
    for start, stop, group in zip(groups.starts, groups.starts[1:], groups.groups, strict=False):
        if stop > start:
            anchor = None if anchor_P is None else anchor_P[start:stop]
            grad_GK[group] += device.project_rows(grad_P[start:stop], W_KP[:, start:stop], anchor)
    return grad_GK


def _device(W_KP: Tensor) -> Any:
    if W_KP.is_cuda:
        from lcsc.kernels import _triton

        return _triton
    return _Cpu


class _Cpu:
    """Torch tensors as numpy arrays over the same memory."""

    @staticmethod
    def combine_rows(
        coef: np.ndarray, W_KP: Tensor, out_BP: Tensor, groups: Groups | None, anchor_P: Tensor | None
    ) -> bool:
        from lcsc.kernels import _numba

        return _numba.combine_rows(
            coef,
            _bits(W_KP),
            out_BP.numpy(),
            dtype=_name(W_KP),
            anchor_P=None if anchor_P is None else anchor_P.numpy(),
            starts_S=None if groups is None else np.array(groups.starts),
            groups_S=None if groups is None else np.array(groups.groups),
            threads=_threads(),
        )

    @staticmethod
    def project_rows(grad_P: Tensor, W_KP: Tensor, anchor_P: Tensor | None) -> Tensor:
        import torch

        from lcsc.kernels import _numba

        anchor = None if anchor_P is None else anchor_P.numpy()
        args = grad_P.numpy(), _bits(W_KP)
        grad_K = _numba.project_rows(*args, dtype=_name(W_KP), anchor_P=anchor, threads=_threads())
        return torch.from_numpy(grad_K.astype(np.float32))


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array; numpy has no bfloat16, so halves are their raw bits."""
    import torch

    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.detach().view(torch.int16).numpy().view(np.uint16) if half else tensor.detach().numpy()

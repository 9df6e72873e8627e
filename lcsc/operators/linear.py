"""Linear combination of saved checkpoints. K = checkpoints, P = flat parameters."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.bank.lora import refuse_lora
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Box, Natural, Point, SearchSpace
from lcsc.operators import profiles
from lcsc.operators.base import Baseline, Candidate

#: Directions shorter than this share of the longest are treated as that long: they are numerically degenerate
#: (copies of a checkpoint, say), and dividing by their length would only produce huge, idle coefficients.
SHORTEST = 1e-3
#: Coefficients are rounded to this many decimals, so that a journal reads the same on every machine.
DECIMALS = 12


@dataclass(frozen=True)
class Axes:
    """Coordinates of the sum-to-one plane: coef = center + axes @ z, and z = inverse @ (coef - center).

    `spread` is the length of the bank's deltas along each axis in weight space, decreasing.
    """

    center_K: np.ndarray
    axes_KZ: np.ndarray
    inverse_ZK: np.ndarray
    spread_Z: np.ndarray

    @property
    def lengths_Z(self) -> np.ndarray:
        """Weight-space length of a unit step along each axis, relative to their geometric mean, shape (Z,)."""
        length_Z = np.maximum(self.spread_Z, SHORTEST * self.spread_Z[0]) * np.linalg.norm(self.axes_KZ, axis=0)
        return length_Z / np.exp(np.log(length_Z).mean())


@functools.lru_cache(maxsize=4)
def whitened_axes(bank: CheckpointBank, whitening: float) -> Axes:
    """Singular directions of the deltas from the mean, scaled so that unit steps are comparable moves in weight space.

    With the deltas D = W - mean(W) restricted to coefficients that sum to zero, D^T = V S U^T. A unit step along
    axis i moves the weights by S_i^(1 - whitening) (times a common factor): 1 makes all steps equally long in weight
    space, 0 leaves the orthonormal coefficient axes, 0.5 is half-way on a log scale and searched best
    (docs/methods.md). The common factor keeps the steps' geometric mean independent of `whitening`.
    """
    K = bank.num_checkpoints
    plane_ZK = np.linalg.svd(np.ones((1, K)))[2][1:]  # orthonormal basis of the coefficients that sum to zero
    gram_KK = np.zeros((K, K))
    for _, W_KC in bank.blocks(max(1, 2**22 // K)):  # blocks, because float64 doubles the memory
        block = W_KC.astype(np.float64)
        block -= block.mean(0)
        gram_KK += block @ block.T
    variance_Z, turn_ZZ = np.linalg.eigh(plane_ZK @ gram_KK @ plane_ZK.T)
    spread_Z = np.sqrt(np.clip(variance_Z[::-1], 0.0, None))
    turn_ZZ = turn_ZZ[:, ::-1]
    turn_ZZ = turn_ZZ * np.where(turn_ZZ[np.abs(turn_ZZ).argmax(0), np.arange(K - 1)] < 0, -1.0, 1.0)  # fix the signs
    if not spread_Z[0] > 0:
        raise BankError(f"all {K} checkpoints of `{bank.path}` are identical; there is nothing to combine.")
    length_Z = np.maximum(spread_Z, SHORTEST * spread_Z[0])
    stretch_Z = (np.exp(np.log(length_Z).mean()) / length_Z) ** whitening / np.sqrt(K)
    return Axes(
        center_K=np.full(K, 1.0 / K),
        axes_KZ=(plane_ZK.T @ turn_ZZ) * stretch_Z,
        inverse_ZK=(turn_ZZ.T @ plane_ZK) / stretch_Z[:, None],
        spread_Z=spread_Z,
    )


@register("operator", "linear", source="LCSC, arXiv:2404.02241")
@dataclass(frozen=True)
class Linear:
    """theta = sum_k coef_k theta_k with coefficients that sum to one and may be negative.

    Args:
        whitening: 0 searches orthonormal coefficient axes, 1 searches axes of equal weight-space length.
    """

    whitening: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.whitening <= 1:
            raise ConfigError(f"`operator.whitening` is {self.whitening}; it must lie in [0, 1].")

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """K - 1 unbounded coordinates of the sum-to-one plane."""
        refuse_lora(bank.layout.shapes, bank.path)
        if bank.num_checkpoints < 2:
            raise BankError(
                f"`{bank.path}` holds {bank.num_checkpoints} checkpoint; a combination needs at least 2. "
                "Save more, or widen `bank.start` and `bank.stop`."
            )
        axes = whitened_axes(bank, self.whitening)
        natural = Natural(axes.center_K, axes.axes_KZ, axes.inverse_ZK, total=1.0)
        lengths = tuple(axes.lengths_Z.tolist())
        return SearchSpace((Box("z", bank.num_checkpoints - 1, lengths=lengths, natural=natural),))

    def coefficients(self, bank: CheckpointBank, point: Point) -> np.ndarray:
        """The point's coefficients, float64, shape (K,), sum one to rounding."""
        axes = whitened_axes(bank, self.whitening)
        coef_K = axes.center_K + axes.axes_KZ @ np.asarray(point["z"], dtype=np.float64)
        coef_K = np.round(coef_K - (coef_K.sum() - 1) / coef_K.size, DECIMALS)  # additive projection, never division
        return coef_K + 0.0  # no -0.0 in a journal

    def point(self, bank: CheckpointBank, coef_K: np.ndarray) -> dict[str, np.ndarray]:
        """The point whose coefficients are `coef_K`, shape (K,).

        Raises:
            ConfigError: the coefficients do not sum to one.
        """
        coef_K = np.asarray(coef_K, dtype=np.float64)
        if coef_K.shape != (bank.num_checkpoints,) or not abs(coef_K.sum() - 1) < 1e-6:
            raise ConfigError(
                f"{coef_K.size} coefficients that sum to {coef_K.sum():.9g} are no combination of "
                f"{bank.num_checkpoints} checkpoints. Give one for each, with sum 1."
            )
        axes = whitened_axes(bank, self.whitening)
        return {"z": axes.inverse_ZK @ (coef_K - axes.center_K)}

    def pull_back(self, bank: CheckpointBank, point: Point, grad_P: Tensor) -> dict[str, np.ndarray]:
        """`axes^T (W grad)`: one pass over the bank gives all K derivatives (see `lcsc.kernels.project`)."""
        grad_K = bank.project(grad_P).double().cpu().numpy()
        return {"z": whitened_axes(bank, self.whitening).axes_KZ.T @ grad_K}

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The combined network; written straight into the buffer it is asked to fill."""
        coef_K = self.coefficients(bank, point)
        if bank.arch is None:
            raise BankError(
                f"no config.json describes the network of `{bank.path}`. "
                "Put the model's config.json beside the weights."
            )

        def write(theta_P: Tensor) -> None:
            bank.combine(torch.from_numpy(coef_K), out=theta_P)

        recipe = {"operator": "linear", "steps": list(bank.steps), "coef": coef_K.tolist()}
        return Candidate(bank.arch, bank.layout, write, recipe, bank.constants)

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Last, every single one, EMA, power-function EMA, uniform and minus-sqrt windows."""
        steps, K = bank.steps, bank.num_checkpoints
        gap, span = (steps[-1] - steps[0]) / (K - 1), steps[-1] - steps[0]
        windows = sorted({int(w) for w in np.geomspace(2, K, 10).round()})
        rows = [("last", f"step {steps[-1]}", profiles.one_hot(K, K - 1))]
        rows += [("best_single", f"step {step}", profiles.one_hot(K, k)) for k, step in enumerate(steps)]
        for halflife in np.geomspace(gap / 4, span * 2, 14):
            rows.append(("ema", f"EMA half-life {halflife:.3g} steps", profiles.ema(steps, halflife)))
        for sigma_rel in np.geomspace(0.02, 0.28, 10):
            rows.append(("power_ema", f"power EMA sigma_rel {sigma_rel:.3f}", profiles.power_ema(steps, sigma_rel)))
        rows += [("uniform", f"mean of last {w}", profiles.uniform(K, w)) for w in windows]
        rows += [("wsm", f"minus-sqrt over last {w}", profiles.minus_sqrt(K, w)) for w in windows]
        return [Baseline(family, label, self.point(bank, coef_K)) for family, label, coef_K in rows]

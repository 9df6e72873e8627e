"""Linear combination of saved checkpoints. K = checkpoints, P = flat parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.bank.lora import refuse_lora
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Box, Natural, Point, SearchSpace
from lcsc.kernels import Groups
from lcsc.operators import profiles
from lcsc.operators.base import Baseline, Candidate, Distances

#: Directions shorter than this share of the longest are treated as that long: they are numerically degenerate
#: (copies of a checkpoint, say), and dividing by their length would only produce huge, idle coefficients.
SHORTEST = 1e-3
#: Coefficients are rounded to this many decimals, so that a journal reads the same on every machine.
DECIMALS = 12
#: A truncated point this close to a baseline's, as a share of its own size, is that baseline: far above what float64
#: loses when a searcher scales a vector there and back, far below any step.
SAME = 1e-9


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
    def steps_Z(self) -> np.ndarray:
        """Weight-space length of a unit step along each axis, shape (Z,)."""
        return np.maximum(self.spread_Z, SHORTEST * self.spread_Z[0]) * np.linalg.norm(self.axes_KZ, axis=0)

    @property
    def unit(self) -> float:
        """Geometric mean of the unit steps' lengths in weight space."""
        return float(np.exp(np.log(self.steps_Z).mean()))

    def coefficients(self, z_R: np.ndarray) -> np.ndarray:
        """center + axes @ z with the first R of the axes, shape (K,); not rounded."""
        return self.center_K + self.axes_KZ[:, : z_R.size] @ z_R


@functools.lru_cache(maxsize=4)
def whitened_axes(bank: CheckpointBank, whitening: float) -> Axes:
    """Singular directions of the deltas from the mean, scaled so that unit steps are comparable moves in weight space.

    With the deltas D = W - mean(W) restricted to coefficients that sum to zero, D^T = V S U^T. A unit step along
    axis i moves the weights by S_i^(1 - whitening) (times a common factor): 1 makes all steps equally long in weight
    space, 0 leaves the orthonormal coefficient axes, 0.5 is half-way on a log scale and searched best
    (docs/methods.md). The common factor keeps the steps' geometric mean independent of `whitening`.
    """
    axes = axes_of(gram_matrices(bank)[0], whitening)
    if axes is None:
        raise BankError(
            f"all {bank.num_checkpoints} checkpoints of `{bank.path}` are identical; there is nothing to combine."
        )
    return axes


def delta_blocks(bank: CheckpointBank) -> Iterator[tuple[slice, np.ndarray]]:
    """Deltas from the mean block by block, because float64 doubles the memory: (columns, float64 (K, C)); one pass."""
    for part, W_KC in bank.blocks(max(1, 2**22 // bank.num_checkpoints)):
        block = W_KC.astype(np.float64)
        block -= block.mean(0)
        yield part, block


def gram_matrices(bank: CheckpointBank, groups: Groups | None = None) -> np.ndarray:
    """Inner products of the deltas from the mean, one matrix for each layer group, float64, shape (G, K, K).

    One pass over the bank; without groups there is one matrix over all columns.
    """
    K = bank.num_checkpoints
    starts, ids, G = (None, (0,), 1) if groups is None else (groups.starts, groups.groups, groups.num_groups)
    gram_GKK = np.zeros((G, K, K))
    for part, block in delta_blocks(bank):
        if starts is None:
            gram_GKK[0] += block @ block.T
            continue
        for start, stop, group in zip(starts, starts[1:], ids, strict=False):
            a, b = max(start, part.start) - part.start, min(stop, part.stop) - part.start
            if a < b:
                gram_GKK[group] += block[:, a:b] @ block[:, a:b].T
    return gram_GKK


def singular_directions(gram_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular directions of deltas with these inner products, longest first, in coefficients that sum to zero.

    Returns:
        Squared lengths, shape (Z,), Z = K - 1, and orthonormal coefficients of the directions, shape (K, Z).
    """
    K = len(gram_KK)
    if K == 1:
        return np.zeros(0), np.zeros((1, 0))
    plane_ZK = np.linalg.svd(np.ones((1, K)))[2][1:]  # orthonormal basis of the coefficients that sum to zero
    energy_Z, turn_ZZ = np.linalg.eigh(plane_ZK @ gram_KK @ plane_ZK.T)
    turn_ZZ = turn_ZZ[:, ::-1]
    turn_ZZ = turn_ZZ * np.where(turn_ZZ[np.abs(turn_ZZ).argmax(0), np.arange(K - 1)] < 0, -1.0, 1.0)  # fix the signs
    return np.clip(energy_Z[::-1], 0.0, None), plane_ZK.T @ turn_ZZ


def axes_of(gram_KK: np.ndarray, whitening: float) -> Axes | None:
    """Whitened axes of deltas with these inner products, shape (K, K); None when all checkpoints are the same."""
    K = len(gram_KK)
    energy_Z, directions_KZ = singular_directions(gram_KK)
    spread_Z = np.sqrt(energy_Z)
    if not spread_Z[0] > 0:
        return None
    length_Z = np.maximum(spread_Z, SHORTEST * spread_Z[0])
    stretch_Z = (np.exp(np.log(length_Z).mean()) / length_Z) ** whitening / np.sqrt(K)
    return Axes(
        center_K=np.full(K, 1.0 / K),
        axes_KZ=directions_KZ * stretch_Z,
        inverse_ZK=directions_KZ.T / stretch_Z[:, None],
        spread_Z=spread_Z,
    )


def settle(coef: np.ndarray) -> np.ndarray:
    """Coefficients, shape (..., K), that sum to one by adding (never by dividing), rounded to `DECIMALS`."""
    total = coef.sum(-1, keepdims=True)
    return np.round(coef - (total - 1) / coef.shape[-1], DECIMALS) + 0.0  # no -0.0 in a journal


@register("operator", "linear", source="LCSC, arXiv:2404.02241")
@dataclass(frozen=True)
class Linear:
    """theta = sum_k coef_k theta_k with coefficients that sum to one and may be negative.

    With a `rank` below K - 1 only the longest singular directions are searched, and the mean of all checkpoints plus
    those is a plane that holds almost no baseline. So the space is that plane and, besides it, the baselines: a point
    where a baseline's projection lies is that baseline, with its own coefficients, and every score of it is its own.

    Args:
        whitening: 0 searches orthonormal coefficient axes, 1 searches axes of equal weight-space length.
        rank: how many of the K - 1 singular directions of the deltas to search, longest first; null takes all.
    """

    whitening: float = 0.5
    rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.whitening <= 1:
            raise ConfigError(f"`operator.whitening` is {self.whitening}; it must lie in [0, 1].")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"`operator.rank` is {self.rank}; it must be at least 1, or null for all directions.")

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Unbounded coordinates of the sum-to-one plane: K - 1 of them, or the first `rank`.

        Raises:
            BankError: LoRA factors, or fewer than two different checkpoints.
            ConfigError: more directions are wanted than there are.
        """
        refuse_lora(bank.layout.shapes, bank.path)
        if bank.num_checkpoints < 2:
            raise BankError(
                f"`{bank.path}` holds {bank.num_checkpoints} checkpoint; a combination needs at least 2. "
                "Save more, or widen `bank.start` and `bank.stop`."
            )
        axes, size = whitened_axes(bank, self.whitening), self._size(bank)
        natural = Natural(axes.center_K, axes.axes_KZ[:, :size], axes.inverse_ZK[:size], total=1.0)
        lengths = tuple((axes.steps_Z / axes.unit)[:size].tolist())  # as without a rank: steps do not depend on it
        return SearchSpace((Box("z", size, lengths=lengths, natural=natural),))

    def _size(self, bank: CheckpointBank) -> int:
        most = bank.num_checkpoints - 1
        if self.rank is not None and self.rank > most:
            raise ConfigError(
                f"`operator.rank` is {self.rank}, but {bank.num_checkpoints} checkpoints span {most} directions. "
                "Choose at most that, or null."
            )
        return most if self.rank is None else self.rank

    def notes(self, bank: CheckpointBank) -> list[str]:
        """How much of the bank a `rank` leaves out."""
        size, energy_Z = self._size(bank), whitened_axes(bank, self.whitening).spread_Z ** 2
        if size == energy_Z.size:
            return []
        lost = 100 * energy_Z[size:].sum() / energy_Z.sum()
        return [
            f"operator.rank={size} searches the {size} longest of {energy_Z.size} directions; the others hold "
            f"{lost:.3g} % of the checkpoints' squared distance from their mean. Baselines are scored in full; "
            "`searcher.radius` counts distances within these directions, from the start's nearest point there."
        ]

    def coefficients(self, bank: CheckpointBank, point: Point) -> np.ndarray:
        """The point's coefficients, float64, shape (K,), sum one to rounding."""
        z_R = np.asarray(point["z"], dtype=np.float64)
        if self._size(bank) < bank.num_checkpoints - 1:
            given_BR, given_BK = _given(bank, self.whitening, z_R.size)
            distance_B = np.abs(given_BR - z_R).max(1)
            nearest = int(distance_B.argmin())
            if distance_B[nearest] <= SAME * max(1.0, float(np.abs(z_R).max())):
                return settle(given_BK[nearest])
        return settle(whitened_axes(bank, self.whitening).coefficients(z_R))

    def point(self, bank: CheckpointBank, coef_K: np.ndarray) -> dict[str, np.ndarray]:
        """The point whose coefficients are `coef_K`, shape (K,); with a `rank` the nearest one in weight space.

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
        return {"z": axes.inverse_ZK[: self._size(bank)] @ (coef_K - axes.center_K)}

    def pull_back(self, bank: CheckpointBank, point: Point, grad_P: Tensor) -> dict[str, np.ndarray]:
        """`axes^T (W grad)`: one pass over the bank gives all K derivatives (see `lcsc.kernels.project`).

        At a baseline of a truncated space it is the derivative along the searched directions from the baseline itself.
        """
        return self._pull(bank, bank.project(grad_P).double().cpu().numpy()[None])

    def _pull(self, bank: CheckpointBank, grad_GK: np.ndarray) -> dict[str, np.ndarray]:
        """`axes^T grad`, of coefficients in one row, shape (1, K)."""
        return {"z": whitened_axes(bank, self.whitening).axes_KZ[:, : self._size(bank)].T @ grad_GK[0]}

    def distances(self, bank: CheckpointBank) -> Distances:
        """Distances of weights by coefficients, in one group; one pass over the bank."""
        return Distances(gram_matrices(bank), functools.partial(self._pull, bank))

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The combined network; written straight into the buffer it is asked to fill."""
        coef_K, arch = self.coefficients(bank, point), need_arch(bank)

        def write(theta_P: Tensor) -> None:
            bank.combine(torch.from_numpy(coef_K), out=theta_P)

        recipe = {"operator": "linear", "steps": list(bank.steps), "coef": coef_K.tolist()}
        return Candidate(arch, bank.layout, write, recipe, bank.constants)

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Last, every single one, EMA, power-function EMA, uniform and minus-sqrt windows."""
        rows = published(bank.steps)
        return [Baseline(family, label, self.point(bank, coef_K)) for family, label, coef_K in rows]


def published(steps: Sequence[int]) -> list[tuple[str, str, np.ndarray]]:
    """Family, label and coefficients, shape (K,), of everything that is chosen without a search."""
    K = len(steps)
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
    return rows


@functools.lru_cache(maxsize=4)
def _given(bank: CheckpointBank, whitening: float, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the baselines lie in the truncated space, shape (B, rank), and their coefficients, shape (B, K)."""
    coef_BK = np.stack([coef_K for _, _, coef_K in published(bank.steps)])
    linear = Linear(whitening, rank)
    return np.stack([linear.point(bank, coef_K)["z"] for coef_K in coef_BK]), coef_BK


def need_arch(bank: CheckpointBank) -> Mapping[str, Any]:
    """`{"class", "config"}` of the bank's network; raises BankError when nothing describes it."""
    if bank.arch is None:
        if (file := bank.rows[-1].files[0].parent / "config.json").is_file():
            raise BankError(
                f"`{file}` names no class (`architectures`, or `_class_name` of diffusers). Add it, or save the model "
                "with its own `save_pretrained`."
            )
        raise BankError(
            f"no config.json describes the network of `{bank.path}`. Put the model's config.json beside the weights."
        )
    return bank.arch

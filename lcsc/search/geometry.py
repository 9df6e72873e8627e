"""Where a winner lies among the checkpoints, and how far the scores pin it down.

K checkpoints, P weights, D = K - 1 directions of the bank, Z searched floats, T trials with a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lcsc.bank import CheckpointBank
from lcsc.core.right_angles import right_angles
from lcsc.core.space import SearchSpace
from lcsc.operators.base import Operator
from lcsc.operators.linear import delta_blocks, singular_directions
from lcsc.search.frames import Record

#: Share of the squared slope that the steep directions hold together.
MOST = 0.99
#: A direction is flat when it holds less than this share of the mean direction's squared slope.
FLAT = 0.01
#: Gradients wanted for each direction: unstructured noise then stays above `FLAT` in every one (the smallest eigenvalue
#: is (1 - sqrt(1/2))^2 = 0.086 of the mean, Marchenko and Pastur, 1967), so that no direction looks flat by chance.
ENOUGH = 2
#: Directions of the bank shorter than this share of the longest hardly move the weights.
SHORT = 1e-3
#: Below this share of the longest a direction is rounding, and of last to mean a distance.
ROUNDING = 1e-7


def geometry(
    bank: CheckpointBank,
    operator: Operator,
    reports: Sequence[Record],
    trials: Sequence[Record],
    rival: str | None,
    space: SearchSpace | None = None,
) -> dict[str, Any]:
    """The `geometry` section of summary.json: plain values; what an operator or a search does not have is left out.

    Two rows of P floats and one pass over the bank.

    Args:
        bank, operator: of the search.
        reports: report records of the winner and of the baselines.
        trials: all trial records; those with a `gradient` tell where the score is flat.
        rival: `who` of the best baseline, from which the winner's way is measured; None where there is none.
        space: what was searched, where that is more than the operator's space.

    Returns:
        `points`: for each of `reports` sum and maximum of |coef|, distance from the last checkpoint, and that in units
        of last checkpoint to mean. `bank`: see `bank_shape`. `way`: the winner's distance from `rival`, its effective
        rank and its share along each direction of the bank. `slope`: see `slope_shape`.
    """
    space = operator.space(bank) if space is None else space
    records = {record["who"]: record for record in reports}
    points: dict[str, dict[str, float | None]] = {
        who: {**coefficient_size(record["coef"])} if "coef" in record else {} for who, record in records.items()
    }
    section: dict[str, Any] = {"points": points}
    # LoRA factors: the same update has many factors, so their distance says nothing
    if bank.kind != "lora" and (found := _distances(bank, operator, space, records, rival)) is not None:
        distances, way_P = found
        section |= bank_shape(bank, way_P) if bank.num_checkpoints > 1 else {}  # one alone has no directions
        unit = section["bank"]["last_to_mean"] if "bank" in section else 0.0
        for who, exact in distances.items():
            distance = exact if exact > ROUNDING * unit else 0.0
            points[who] |= {"from_last": distance, "from_last_relative": distance / unit if unit else None}
    if rival is not None:
        ends = [np.array(records[who]["vector"]) for who in ("best", rival)]
        slope = _slope(space, trials, ends[0] - ends[1])
        section |= {} if slope is None else {"slope": slope}
    return section


def coefficient_size(coef: Sequence[Any]) -> dict[str, float]:
    """Sum and maximum of |coef|, shape (K,) or (G, K); of several layer groups, the largest of each."""
    size_GK = np.abs(np.atleast_2d(np.array(coef, dtype=np.float64)))
    return {"sum_abs": float(size_GK.sum(1).max()), "max_abs": float(size_GK.max())}


def effective_rank(energy: np.ndarray) -> float:
    """exp of the entropy of the shares of `energy`, from 1 to its size; 0 for no energy at all.

    With squared singular values of X: the effective rank of X X^T (Roy and Vetterli, EUSIPCO 2007).
    """
    if not energy.sum() > 0:
        return 0.0
    share = energy[energy > 0] / energy.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def bank_shape(bank: CheckpointBank, way_P: np.ndarray | None) -> dict[str, Any]:
    """How long and how flat the cloud of checkpoints is, and how a displacement, float32, shape (P,), lies in it.

    Returns:
        `bank`: distances last to mean and last to first, effective rank of the deltas from the mean, how many of its D
        directions are `SHORT`, and `spread`, each direction's share of the squared deltas, longest first. `way`:
        length, effective rank, `along` (share of the squared length along each direction) and `outside` (the rest).
    """
    K = bank.num_checkpoints
    gram_KK, cross_K = np.zeros((K, K)), np.zeros(K)
    for part, block in delta_blocks(bank):
        gram_KK += block @ block.T
        if way_P is not None:
            cross_K += block @ way_P[part].astype(np.float64)
    energy_D, directions_KD = singular_directions(gram_KK)
    longest, total = energy_D.max(initial=0.0), float(energy_D.sum())
    first, last = gram_KK[0, 0], gram_KK[-1, -1]
    shape: dict[str, Any] = {
        "bank": {
            "last_to_mean": float(np.sqrt(last)),
            "last_to_first": float(np.sqrt(max(first + last - 2 * gram_KK[0, -1], 0.0))),
            "effective_rank": effective_rank(energy_D),
            "num_directions": K - 1,
            "num_short": int((energy_D < SHORT**2 * longest).sum()),
            "spread": (energy_D / total if total else energy_D).tolist(),
        }
    }
    length = 0.0 if way_P is None else _norm(way_P)
    if length > 0:
        kept_D = energy_D > ROUNDING**2 * longest
        along_D = np.zeros(K - 1)
        along_D[kept_D] = (directions_KD.T @ cross_K)[kept_D] ** 2 / energy_D[kept_D] / length**2
        outside = max(0.0, 1.0 - float(along_D.sum()))
        rank = effective_rank(along_D)
        shape["way"] = {"length": length, "effective_rank": rank, "along": along_D.tolist(), "outside": outside}
    return shape


def slope_shape(gradients_TZ: np.ndarray, way_Z: np.ndarray) -> dict[str, Any]:
    """Along which directions the score changes, in coordinates whose unit steps are equally long in weight space.

    Eigenvectors of the mean of g g^T (active subspaces, arXiv:1304.2070) over gradients scaled to length one: a descent
    begins where the score is steep, and its first steps would drown what matters near the winner.

    Args:
        gradients_TZ: derivatives of the score.
        way_Z: from the best baseline to the winner.

    Returns:
        `num_gradients` and `num_directions` (Z); where there are `ENOUGH` gradients also `num_carrying` (how many
        directions hold `MOST` of the squared slope), `num_flat`, `energy` (each direction's share, steepest first),
        `along` (share of the squared way) and `way_flat` (the flat directions' share of it); the last two only where
        the winner left the baseline.
    """
    length_T = np.linalg.norm(gradients_TZ, axis=1)
    unit_TZ = gradients_TZ[length_T > 0] / length_T[length_T > 0, None]
    T, Z = unit_TZ.shape
    shape: dict[str, Any] = {"num_gradients": T, "num_directions": Z}
    if T < ENOUGH * Z:
        return shape
    _, values_Z, turn_ZZ = np.linalg.svd(unit_TZ, full_matrices=False)
    energy_Z = values_Z**2 / (values_Z**2).sum()
    flat_Z = energy_Z < FLAT / Z
    shape |= {
        "num_carrying": int(np.searchsorted(np.cumsum(energy_Z), MOST)) + 1,
        "num_flat": int(flat_Z.sum()),
        "energy": energy_Z.tolist(),
    }
    size = float(way_Z @ way_Z)
    if size > 0:
        along_Z = (turn_ZZ @ way_Z) ** 2 / size
        shape |= {"along": along_Z.tolist(), "way_flat": float(along_Z[flat_Z].sum())}
    return shape


def _slope(space: SearchSpace, trials: Sequence[Record], way_Z: np.ndarray) -> dict[str, Any] | None:
    """`slope_shape` over the floats that move the weights; None without gradients."""
    gradients = [trial["gradient"] for trial in trials if trial.get("gradient") is not None]
    if not gradients or all(box.lengths is None for box in space.boxes):
        return None
    frame = right_angles(space)
    return None if frame is None else slope_shape(frame.slopes(np.array(gradients)), frame.matrix_YZ @ way_Z)


def _distances(
    bank: CheckpointBank, operator: Operator, space: SearchSpace, records: Mapping[str, Record], rival: str | None
) -> tuple[dict[str, float], np.ndarray | None] | None:
    """Distance of every record's weights from the last checkpoint's, and winner minus rival, float32, shape (P,).

    None for candidates of another shape than the checkpoints'.
    """
    found = {who: operator.apply(bank, space.to_point(np.array(r["vector"]))) for who, r in records.items()}
    if any(candidate.layout.shapes != bank.layout.shapes for candidate in found.values()):
        return None
    row_P, other_P = (torch.empty(bank.layout.num_parameters) for _ in range(2))
    bank.combine(torch.eye(bank.num_checkpoints, dtype=torch.float64)[-1], out=other_P)
    distances = {}
    for who, candidate in found.items():
        candidate.write(row_P)
        distances[who] = _norm(row_P.numpy(), other_P.numpy())
    if rival is None:
        return distances, None
    found["best"].write(row_P)
    found[rival].write(other_P)
    return distances, row_P.sub_(other_P).numpy()


def _norm(row_P: np.ndarray, other_P: np.ndarray | None = None) -> float:
    """Length of a row, or distance of two, summed in float64 block by block."""
    total, size = 0.0, 2**20
    for start in range(0, row_P.size, size):
        block = row_P[start : start + size].astype(np.float64)
        if other_P is not None:
            block -= other_P[start : start + size]
        total += float(block @ block)
    return float(np.sqrt(total))

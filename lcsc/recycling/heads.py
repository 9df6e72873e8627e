"""Key/value heads of one attention layer: turned without changing the function, grouped, and pooled.

Q = query heads, H = key/value heads, G = groups of them, M = heads of a group, d = head size, D = inputs (and 1 where
there is a bias, which is the weight of an input that is always one), P = rotary planes. All arithmetic is float64.

Which turns leave the function alone. A head's output is o_h sum_n a_n v_h x_n. For any orthogonal S (even any
invertible one) o_h v_h = (o_h S^T)(S v_h), so values turn freely with the columns of the output projection.
Attention scores are q^T T(m)^T T(n) k, where T(n) turns the plane of the coordinates i and i + P (transformers'
half-split layout) by n * frequency_i. Turns of one plane commute with one another, T(n) R = R T(n) for an R that turns
each plane by an angle of its own, so (R q)^T T(m)^T T(n) (R k) = q^T T(m)^T (R^T R) T(n) k is the same score: keys turn
by P angles together with the queries that read them. Coordinates that are not rotated (partial rotary) turn freely.
A norm of queries and keys divides by a length, which turns keep, and multiplies by gains: R commutes with those where
both gains of a plane are equal, and otherwise only as half a turn, which changes two signs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: passes of the generalised Procrustes problem, each of which brings the heads closer to their mean
MAX_ROUNDS = 20
#: passes end when no entry of a turn moves by more
SETTLED = 1e-10

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rotary:
    """Which turns of keys and queries keep the scores.

    Args:
        dims: first coordinates of a head that are rotated, even; the plane i holds the coordinates i and i + dims / 2.
        free_P: bool, shape (dims / 2,): planes that turn by any angle; the others by half a turn. None: all of them.
        rest: whether the coordinates from `dims` on turn freely; otherwise they stay.
    """

    dims: int
    free_P: Tensor | None = None
    rest: bool = True

    @classmethod
    def with_gains(cls, dims: int, gains: Sequence[Tensor]) -> Rotary:
        """The turns that commute with the gains of norms of queries and keys, each of shape (d,)."""
        if not gains:
            return cls(dims)
        half = dims // 2
        free_P = torch.stack([gain[:half] == gain[half:dims] for gain in gains]).all(0)
        return cls(dims, free_P, rest=False)


# ------------------------------------------------------------------------------------------------------ alignment


def value_turn(cross_dd: Tensor) -> Tensor:
    """The orthogonal matrix, shape (d, d), that brings a head's rows closest to a target's (Schönemann, 1966).

    Args:
        cross_dd: target_dD @ head_dD.T, all that the answer depends on.
    """
    u_dd, _, vt_dd = torch.linalg.svd(cross_dd)
    return u_dd @ vt_dd


def key_turn(cross_dd: Tensor, rotary: Rotary) -> Tensor:
    """The turn of each rotary plane that brings a head's rows closest to a target's, as a matrix, shape (d, d).

    With a plane's rows as complex numbers z and those of the target as w, |exp(i phi) z - w| is least where phi is the
    argument of sum(w conj(z)); among half turns, where it is 0 or pi by the sign of the real part.

    Args:
        cross_dd: target_dD @ head_dD.T.
        rotary: which turns keep the scores.
    """
    d, dims = len(cross_dd), rotary.dims
    i_P = torch.arange(dims // 2)
    j_P = i_P + dims // 2
    real_P, imag_P = cross_dd[i_P, i_P] + cross_dd[j_P, j_P], cross_dd[j_P, i_P] - cross_dd[i_P, j_P]
    angle_P = torch.atan2(imag_P, real_P)
    cos_P, sin_P = angle_P.cos(), angle_P.sin()
    if rotary.free_P is not None:
        cos_P = torch.where(rotary.free_P, cos_P, torch.where(real_P < 0, -1.0, 1.0).to(cos_P.dtype))
        sin_P = torch.where(rotary.free_P, sin_P, torch.zeros_like(sin_P))
    turn_dd = torch.eye(d, dtype=cross_dd.dtype)
    turn_dd[i_P, i_P] = turn_dd[j_P, j_P] = cos_P
    turn_dd[j_P, i_P], turn_dd[i_P, j_P] = sin_P, -sin_P
    if dims < d and rotary.rest:
        turn_dd[dims:, dims:] = value_turn(cross_dd[dims:, dims:])
    return turn_dd


def align(x_MdD: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Turns that bring heads closest to their common mean (generalised Procrustes), shape (M, d, d).

    It begins with the first head, so that heads that are turns of one another meet there at once. The rows themselves
    are read once: with C_nm = x_n x_m^T the mean's product with a head is sum_n R_n C_nm / M.

    Args:
        x_MdD: heads.
        turn: the best turn for a product target @ head.T, `value_turn` or `key_turn`.
    """
    cross_MMdd = torch.einsum("ndc,mec->nmde", x_MdD, x_MdD)
    turns_Mdd = torch.stack([turn(cross_dd) for cross_dd in cross_MMdd[0]])
    for _ in range(MAX_ROUNDS):
        to_mean_Mdd = torch.einsum("nde,nmef->mdf", turns_Mdd, cross_MMdd) / len(x_MdD)
        before_Mdd, turns_Mdd = turns_Mdd, torch.stack([turn(cross_dd) for cross_dd in to_mean_Mdd])
        if float((turns_Mdd - before_Mdd).abs().max()) <= SETTLED:
            break
    return turns_Mdd


# -------------------------------------------------------------------------------------------------------- pooling


def pool(x_MdD: Tensor, weights_M: Tensor, *, restore_norm: bool) -> Tensor:
    """The weighted sum of heads, shape (d, D); weights sum to one.

    Means of heads that do not point the same way are short: equal weights of M unrelated heads shrink them by sqrt(M),
    and attention becomes uniform. `restore_norm` gives the result the weighted mean of the heads' lengths.
    """
    pooled_dD = (weights_M[:, None, None] * x_MdD).sum(0)
    length = float(pooled_dD.norm())
    if not restore_norm or length == 0:
        return pooled_dD
    return pooled_dD * (float(weights_M @ x_MdD.norm(dim=(1, 2))) / length)


# ------------------------------------------------------------------------------------------------------- grouping


def by_order(num_heads: int, num_groups: int) -> Groups:
    """Neighbours together, as arXiv:2305.13245 does."""
    size = num_heads // num_groups
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(num_groups))


def similarity(k_HdD: Tensor, v_HdD: Tensor, rotary: Rotary | None) -> np.ndarray:
    """How alike heads are, the mean of keys' and values' cosine, float64, shape (H, H).

    Args:
        k_HdD: keys.
        v_HdD: values.
        rotary: takes the cosine after the best turns of each pair; None takes the heads as they are.
    """
    found = []
    for x_HdD, is_key in ((k_HdD, True), (v_HdD, False)):
        x_HdD = x_HdD / x_HdD.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x_HdD.dtype).tiny)
        if rotary is None:
            found.append(torch.einsum("adc,bdc->ab", x_HdD, x_HdD))
        elif is_key:
            found.append(_turned_keys(x_HdD, rotary))
        else:
            found.append(_turned_values(x_HdD))
    return ((found[0] + found[1]) / 2).numpy()


def _turned_values(x_HdD: Tensor) -> Tensor:
    """max over orthogonal S of <S x_a, x_b>: the sum of the singular values of x_b x_a^T, shape (H, H)."""
    rows = [torch.linalg.svdvals(torch.einsum("dc,bec->bde", x_dD, x_HdD)).sum(-1) for x_dD in x_HdD]
    return torch.stack(rows)


def _planes(x: Tensor, dims: int) -> Tensor:
    """Rotary planes as complex numbers: (..., d, D) -> (..., P, D)."""
    half = dims // 2
    return torch.complex(x[..., :half, :], x[..., half:dims, :])


def _turned_keys(x_HdD: Tensor, rotary: Rotary) -> Tensor:
    z_HPD = _planes(x_HdD, rotary.dims)
    inner_HHP = torch.einsum("apc,bpc->abp", z_HPD, z_HPD.conj())
    best_HHP = inner_HHP.abs()
    if rotary.free_P is not None:
        best_HHP = torch.where(rotary.free_P, best_HHP, inner_HHP.real.abs())
    rest_HeD = x_HdD[:, rotary.dims :]
    if not rest_HeD.shape[1]:
        return best_HHP.sum(-1)
    same = _turned_values(rest_HeD) if rotary.rest else torch.einsum("aec,bec->ab", rest_HeD, rest_HeD)
    return best_HHP.sum(-1) + same


def by_similarity(similarity_HH: np.ndarray, num_groups: int) -> Groups:
    """Equal groups of similar heads: neighbours, or a greedy start, improved by swaps until none helps.

    Groups stand in the order of their first heads. Not always the best partition, of which there are too many to try.
    """
    H = len(similarity_HH)
    size = H // num_groups
    if size == 1 or num_groups == 1:
        return by_order(H, num_groups)
    starts = [by_order(H, num_groups), _greedy(similarity_HH, size)]
    found = [_swapped(similarity_HH, start) for start in starts]
    first, second = (within(similarity_HH, groups) for groups in found)
    return found[1] if second > first + 1e-12 else found[0]


def within(similarity_HH: np.ndarray, groups: Groups) -> float:
    """Sum of the similarities of heads of one group."""
    return float(sum(similarity_HH[np.ix_(group, group)].sum() for group in groups))


def _greedy(similarity_HH: np.ndarray, size: int) -> Groups:
    left, groups = list(range(len(similarity_HH))), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            group.append(left.pop(int(np.argmax(similarity_HH[np.ix_(group, left)].sum(0)))))
        groups.append(tuple(group))
    return tuple(groups)


def _swapped(similarity_HH: np.ndarray, groups: Groups) -> Groups:
    """Exchange two heads of different groups as long as that raises `within`."""
    H = len(similarity_HH)
    group_H = np.empty(H, int)
    for g, members in enumerate(groups):
        group_H[list(members)] = g
    for _ in range(H * H):
        member_HG = group_H[:, None] == np.arange(len(groups))
        to_HG = similarity_HH @ member_HG  # of each head to each group
        own_H = to_HG[np.arange(H), group_H] - np.diag(similarity_HH)
        gain_HH = to_HG[:, group_H] - own_H[:, None]
        gain_HH = gain_HH + gain_HH.T - 2 * similarity_HH
        gain_HH[group_H[:, None] == group_H] = 0
        a, b = np.unravel_index(int(np.argmax(gain_HH)), gain_HH.shape)
        if not gain_HH[a, b] > 1e-12:
            break
        group_H[[a, b]] = group_H[[b, a]]
    return tuple(sorted(tuple(int(h) for h in np.flatnonzero(group_H == g)) for g in range(len(groups))))


# ------------------------------------------------------------------------------------------------ a whole layer


@dataclass(frozen=True)
class Pooling:
    """How the heads of a layer become fewer.

    Args:
        num_groups: heads afterwards, a divisor of the heads before.
        method: `aligned`, `mean`, `first` or `random`.
        similar: groups of similar heads instead of neighbours.
        restore_norm: see `pool`.
        copies: how often each pooled head is repeated, for configurations that know one number of heads for all layers.
        key_weights_H: positive weights within the groups of the key heads, float64; None: equal.
        value_weights_H: those of the value heads.
        fresh: for `random` the source of their numbers, as it is before it was used.
        std: their standard deviation in the network.
    """

    num_groups: int
    method: str = "aligned"
    similar: bool = False
    restore_norm: bool = True
    copies: int = 1
    key_weights_H: Tensor | None = None
    value_weights_H: Tensor | None = None
    fresh: Callable[[], np.random.Generator] | None = None
    std: float = 0.02


def regroup(
    tensors: Mapping[str, Tensor], head_size: int, rotary_dims: int, how: Pooling
) -> tuple[dict[str, Tensor], Groups]:
    """One layer's attention with fewer key/value heads.

    Args:
        tensors: by role, any float dtype: `q.weight` (Q d, D), `k.weight` and `v.weight` (H d, D), `o.weight` (D, Q d),
            biases `q.bias`, `k.bias` and `v.bias` of these lengths, gains `q_norm.weight` and `k_norm.weight` (d,).
        head_size: d.
        rotary_dims: coordinates of each head that are rotated.
        how: see `Pooling`.

    Returns:
        The same roles in their dtypes, with num_groups * copies key/value heads, and the heads of each group. Where
        there are as many groups as heads, the tensors are those given (repeated, where copies are asked for).
    """
    k_HdD, v_HdD = (_heads(tensors, role, head_size) for role in "kv")
    H = len(k_HdD)
    if how.num_groups == H:
        return _repeated(dict(tensors), head_size, how.copies), by_order(H, H)
    rotary = Rotary.with_gains(rotary_dims, [tensors[n] for n in ("q_norm.weight", "k_norm.weight") if n in tensors])
    aligned = how.method == "aligned"
    groups = by_order(H, how.num_groups)
    if how.similar:
        groups = by_similarity(similarity(k_HdD, v_HdD, rotary if aligned else None), how.num_groups)
    q_HNdD = _heads(tensors, "q", head_size).unflatten(0, (H, -1))  # N query heads read one key head
    o_DHNd = tensors["o.weight"].double().unflatten(1, (H, -1, head_size))
    order = [h for group in groups for h in group]
    turns_k, turns_v = {}, {}
    if aligned:
        for group in groups:
            rows = list(group)
            turns_k |= zip(group, align(k_HdD[rows], lambda cross_dd: key_turn(cross_dd, rotary)), strict=True)
            turns_v |= zip(group, align(v_HdD[rows], value_turn), strict=True)
        k_HdD = torch.stack([turns_k[h] @ k_HdD[h] for h in range(H)])
        v_HdD = torch.stack([turns_v[h] @ v_HdD[h] for h in range(H)])
        q_HNdD = torch.stack([turns_k[h] @ q_HNdD[h] for h in range(H)])
        o_DHNd = torch.stack([o_DHNd[:, h] @ turns_v[h].T for h in range(H)], dim=1)
    rng = how.fresh() if how.fresh else None
    made = {
        "q": q_HNdD[order].flatten(0, 1),
        "k": _pooled(k_HdD, groups, how, how.key_weights_H, rng),
        "v": _pooled(v_HdD, groups, how, how.value_weights_H, rng),
    }
    out = dict(tensors)
    for role, x in made.items():
        out |= _written(x, role, tensors)
    if how.method == "random":  # as a new layer begins
        out |= {name: torch.zeros_like(out[name]) for name in ("k.bias", "v.bias") if name in out}
    out["o.weight"] = o_DHNd[:, order].flatten(1).to(tensors["o.weight"].dtype)
    return _repeated(out, head_size, how.copies), groups


def _heads(tensors: Mapping[str, Tensor], role: str, head_size: int) -> Tensor:
    """Heads of a projection, the bias as a last column, float64, shape (heads, d, D)."""
    x = tensors[f"{role}.weight"].double()
    if (bias := tensors.get(f"{role}.bias")) is not None:
        x = torch.cat([x, bias.double()[:, None]], dim=1)
    return x.unflatten(0, (-1, head_size))


def _written(x_HdD: Tensor, role: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projection of heads, in the dtypes of `like`."""
    x, weight, bias = x_HdD.flatten(0, 1), f"{role}.weight", f"{role}.bias"
    if bias not in like:
        return {weight: x.to(like[weight].dtype)}
    return {weight: x[:, :-1].to(like[weight].dtype), bias: x[:, -1].to(like[bias].dtype)}


def _pooled(
    x_HdD: Tensor, groups: Groups, how: Pooling, weights_H: Tensor | None, rng: np.random.Generator | None
) -> Tensor:
    """Pooled heads, shape (G, d, D)."""
    if how.method == "random":
        assert rng is not None, "random heads need a source of numbers"
        return how.std * torch.from_numpy(rng.standard_normal((len(groups), *x_HdD.shape[1:])))
    pooled = []
    for group in groups:
        rows = list(group)
        if how.method == "first":
            pooled.append(x_HdD[rows[0]])
            continue
        weights_M = torch.ones(len(rows), dtype=torch.float64) if weights_H is None else weights_H[rows].double()
        pooled.append(pool(x_HdD[rows], weights_M / weights_M.sum(), restore_norm=how.restore_norm))
    return torch.stack(pooled)


def _repeated(tensors: dict[str, Tensor], head_size: int, copies: int) -> dict[str, Tensor]:
    """Each key/value head as many times, one after the other: the query heads of each copy are those they were."""
    if copies == 1:
        return tensors
    for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
        if name in tensors:
            x = tensors[name].unflatten(0, (-1, head_size))
            tensors[name] = x.repeat_interleave(copies, dim=0).flatten(0, 1)
    return tensors

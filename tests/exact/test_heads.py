"""Turns of heads keep the function, pooling is the definition, and the knapsack is the best of all choices."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from lcsc.core.errors import ConfigError
from lcsc.recycling.budget import additive_choice, cheapest_loss
from lcsc.recycling.heads import (
    Pooling,
    Rotary,
    align,
    by_order,
    by_similarity,
    key_turn,
    pool,
    regroup,
    similarity,
    value_turn,
    within,
)

Q, H, D_HEAD, D = 8, 4, 6, 20


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed=0, dims=D_HEAD, bias=False, gains=False):
    sizes = {"q": Q * D_HEAD, "k": H * D_HEAD, "v": H * D_HEAD}
    out = {f"{role}.weight": draw(n, D, seed=seed + i) for i, (role, n) in enumerate(sizes.items())}
    out["o.weight"] = draw(D, Q * D_HEAD, seed=seed + 7)
    if bias:
        out |= {f"{role}.bias": draw(n, seed=seed + 20 + i) for i, (role, n) in enumerate(sizes.items())}
    if gains:
        half = draw(D_HEAD // 2, seed=30)
        same = torch.cat([half, half])
        same[0] += 1.0  # the first plane's gains differ
        out |= {"q_norm.weight": same, "k_norm.weight": same.flip(0).roll(3)}
    return out


def rotate(x_hTd, dims):
    """Rotary embedding as the papers write it, plane by plane."""
    T, out = x_hTd.shape[1], x_hTd.clone()
    for i in range(dims // 2):
        angle_T = torch.arange(T) * 0.7 ** (i + 1)
        a, b = x_hTd[..., i], x_hTd[..., i + dims // 2]
        out[..., i] = a * angle_T.cos() - b * angle_T.sin()
        out[..., i + dims // 2] = b * angle_T.cos() + a * angle_T.sin()
    return out


def forward(tensors, x_TD, dims=D_HEAD):
    """Grouped-query attention by its definition, float64."""
    heads = {}
    for role in "qkv":
        y = x_TD @ tensors[f"{role}.weight"].T + tensors.get(f"{role}.bias", 0.0)
        heads[role] = y.unflatten(1, (-1, D_HEAD)).transpose(0, 1)
    for role in "qk":
        if f"{role}_norm.weight" in tensors:
            y = heads[role]
            heads[role] = y / y.square().mean(-1, keepdim=True).sqrt() * tensors[f"{role}_norm.weight"]
        heads[role] = rotate(heads[role], dims)
    share = Q // len(heads["k"])
    k, v = (heads[role].repeat_interleave(share, 0) for role in "kv")
    mask = torch.full((len(x_TD), len(x_TD)), -torch.inf, dtype=torch.float64).triu(1)
    weights = (heads["q"] @ k.transpose(1, 2) / D_HEAD**0.5 + mask).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1) @ tensors["o.weight"].T


def turned(tensors, dims, seed=50):
    """Every group of two key/value heads made turns of its first head; queries and outputs as they were."""
    out = {name: t.clone() for name, t in tensors.items()}
    for h in range(1, H, 2):
        here, first = slice(h * D_HEAD, (h + 1) * D_HEAD), slice((h - 1) * D_HEAD, h * D_HEAD)
        angle_P = 3 * draw(dims // 2, seed=seed + h)
        R = torch.eye(D_HEAD, dtype=torch.float64)
        for i, angle in enumerate(angle_P):
            j = i + dims // 2
            R[i, i] = R[j, j] = angle.cos()
            R[j, i], R[i, j] = angle.sin(), -angle.sin()
        R[dims:, dims:] = torch.linalg.qr(draw(D_HEAD - dims, D_HEAD - dims, seed=seed + h))[0]
        S = torch.linalg.qr(draw(D_HEAD, D_HEAD, seed=seed + 9 + h))[0]
        for role, turn in (("k", R), ("v", S)):
            for name in (f"{role}.weight", f"{role}.bias"):
                if name in out:
                    out[name][here] = turn @ out[name][first]
    return out


@pytest.mark.parametrize(("dims", "bias"), [(6, False), (6, True), (2, False), (4, True)])
@pytest.mark.parametrize("restore", [True, False])
def test_heads_that_are_turns_of_one_another_are_merged_exactly(dims, bias, restore):
    tensors, x_TD = turned(layer(bias=bias), dims), draw(9, D, seed=99)
    made, groups = regroup(tensors, D_HEAD, dims, Pooling(2, "aligned", restore_norm=restore))
    assert groups == ((0, 1), (2, 3))
    assert made["k.weight"].shape == (2 * D_HEAD, D)
    torch.testing.assert_close(forward(made, x_TD, dims), forward(tensors, x_TD, dims), rtol=0, atol=1e-10)
    plain, _ = regroup(tensors, D_HEAD, dims, Pooling(2, "mean", restore_norm=restore))
    assert (forward(plain, x_TD, dims) - forward(tensors, x_TD, dims)).abs().max() > 0.1


def test_turns_alone_keep_the_function():
    # pooling is undone: every head of a group gets the turned head back that it was
    for gains in (False, True):
        tensors, x_TD = layer(gains=gains), draw(9, D, seed=98)
        rotary = Rotary.with_gains(D_HEAD, [tensors[n] for n in ("q_norm.weight", "k_norm.weight") if gains])
        k_HdD, v_HdD = (tensors[f"{r}.weight"].unflatten(0, (H, D_HEAD)) for r in "kv")
        R = align(k_HdD, functools.partial(key_turn, rotary=rotary))
        S = align(v_HdD, value_turn)
        out = dict(tensors)
        out["k.weight"], out["v.weight"] = (R @ k_HdD).flatten(0, 1), (S @ v_HdD).flatten(0, 1)
        q = tensors["q.weight"].unflatten(0, (Q, D_HEAD))
        out["q.weight"] = (R.repeat_interleave(Q // H, 0) @ q).flatten(0, 1)
        o = tensors["o.weight"].unflatten(1, (Q, D_HEAD))
        out["o.weight"] = torch.einsum("mqd,qed->mqe", o, S.repeat_interleave(Q // H, 0)).flatten(1)
        assert (R - torch.eye(D_HEAD)).abs().max() > 0.5
        torch.testing.assert_close(forward(out, x_TD), forward(tensors, x_TD), rtol=0, atol=1e-10)
        if gains:  # planes with unequal gains only change signs: [0] in the queries, [2] in the keys
            assert rotary.free_P.tolist() == [False, True, False]
            assert set(R[:, [0, 2], [0, 2]].flatten().tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("method", ["aligned", "mean", "first"])
def test_equal_heads_are_merged_exactly(method):
    tensors, x_TD = layer(bias=True), draw(9, D, seed=97)
    for role in "kv":
        for name in (f"{role}.weight", f"{role}.bias"):
            x = tensors[name].unflatten(0, (H, D_HEAD)).clone()
            x[1], x[3] = x[0], x[2]
            tensors[name] = x.flatten(0, 1)
    made, _ = regroup(tensors, D_HEAD, D_HEAD, Pooling(2, method))
    torch.testing.assert_close(forward(made, x_TD), forward(tensors, x_TD), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["aligned", "mean", "first", "random"])
def test_as_many_groups_as_heads_change_no_bit(method):
    tensors = {name: t.to(torch.bfloat16) for name, t in layer(bias=True).items()}
    made, groups = regroup(tensors, D_HEAD, D_HEAD, Pooling(H, method, similar=True))
    assert groups == by_order(H, H)
    assert set(made) == set(tensors)
    assert all(torch.equal(made[name].view(torch.int16), t.view(torch.int16)) for name, t in tensors.items())


def test_mean_pooling_is_the_papers():
    tensors = {name: t.float() for name, t in layer().items()}
    made, _ = regroup(tensors, D_HEAD, D_HEAD, Pooling(2, "mean", restore_norm=False))
    for role in "kv":
        x = tensors[f"{role}.weight"].view(2, 2, D_HEAD, D)
        torch.testing.assert_close(made[f"{role}.weight"].view(2, D_HEAD, D), x.mean(1), rtol=1e-6, atol=1e-7)
    assert torch.equal(made["q.weight"], tensors["q.weight"])
    assert torch.equal(made["o.weight"], tensors["o.weight"])


def test_weights_and_norms():
    x_MdD = draw(3, 2, 5)
    weights_M = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    plain = pool(x_MdD, weights_M, restore_norm=False)
    torch.testing.assert_close(plain, 0.5 * x_MdD[0] + 0.3 * x_MdD[1] + 0.2 * x_MdD[2])
    restored = pool(x_MdD, weights_M, restore_norm=True)
    wanted = sum(w * x.norm() for w, x in zip(weights_M, x_MdD, strict=True))
    assert float(restored.norm()) == pytest.approx(float(wanted), rel=1e-12)
    torch.testing.assert_close(restored / restored.norm(), plain / plain.norm())
    assert not pool(x_MdD * 0, weights_M, restore_norm=True).any()


def test_turns_are_the_best_ones():
    x, y = draw(D_HEAD, D, seed=1), draw(D_HEAD, D, seed=2)
    R, _ = orthogonal_procrustes(x.T.numpy(), y.T.numpy())
    np.testing.assert_allclose(value_turn(y @ x.T).numpy(), R.T, atol=1e-12)
    found = key_turn(y @ x.T, Rotary(D_HEAD)) @ x
    for i in range(3):  # planes are apart, so each may be tried alone: no turn on a grid is closer
        rows = [i, i + 3]
        best = float((found[rows] - y[rows]).norm())
        tried = []
        for angle in np.linspace(-np.pi, np.pi, 721):
            turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            tried.append(float((turn @ x[rows] - y[rows]).norm()))
        assert best <= min(tried) <= best + 1e-3 < max(tried)


def test_similar_heads_find_each_other():
    tensors = turned(layer(), D_HEAD)  # 1 is a turn of 0, 3 of 2
    shuffled = {}
    for role in "kv":
        shuffled[role] = tensors[f"{role}.weight"].unflatten(0, (H, D_HEAD))[[0, 2, 3, 1]]
    same_HH = similarity(shuffled["k"], shuffled["v"], Rotary(D_HEAD))
    assert same_HH[0, 3] == pytest.approx(1)
    assert same_HH[1, 2] == pytest.approx(1)
    assert by_similarity(same_HH, 2) == ((0, 3), (1, 2))
    plain_HH = similarity(shuffled["k"], shuffled["v"], None)
    assert plain_HH[0, 0] == pytest.approx(1)
    assert abs(plain_HH[0, 3]) < 0.9


def test_grouping_by_similarity_moves_queries_and_outputs_along():
    tensors = turned(layer(bias=True), D_HEAD)
    order = [0, 2, 3, 1]
    mixed = dict(tensors)
    for role, heads in (("k", H), ("v", H), ("q", Q)):
        index = order if heads == H else [2 * h + i for h in order for i in (0, 1)]
        for name in (f"{role}.weight", f"{role}.bias"):
            mixed[name] = tensors[name].unflatten(0, (heads, D_HEAD))[index].flatten(0, 1)
    mixed["o.weight"] = tensors["o.weight"].unflatten(1, (Q, D_HEAD))[:, index].flatten(1)
    x_TD = draw(9, D, seed=96)
    torch.testing.assert_close(forward(mixed, x_TD), forward(tensors, x_TD))
    made, groups = regroup(mixed, D_HEAD, D_HEAD, Pooling(2, similar=True))
    assert groups == ((0, 3), (1, 2))
    torch.testing.assert_close(forward(made, x_TD), forward(tensors, x_TD), rtol=0, atol=1e-10)


def test_swaps_reach_the_best_partition_of_six_heads():
    def partitions(left):
        if not left:
            yield ()
        for pair in itertools.combinations(left[1:], 1):
            group = (left[0], *pair)
            for rest in partitions([h for h in left if h not in group]):
                yield (group, *rest)

    worse = 0
    for seed in range(20):
        x = draw(6, 8, seed=seed).numpy()
        same_HH = np.corrcoef(x)
        best = max(within(same_HH, groups) for groups in partitions(list(range(6))))
        found = by_similarity(same_HH, 3)
        worse += within(same_HH, found) < best - 1e-9
    assert worse == 0


def test_copies_serve_the_same_queries():
    tensors, x_TD = layer(bias=True), draw(9, D, seed=95)
    one, _ = regroup(tensors, D_HEAD, D_HEAD, Pooling(1))
    four, _ = regroup(tensors, D_HEAD, D_HEAD, Pooling(1, copies=4))
    assert four["k.bias"].shape == (4 * D_HEAD,)
    torch.testing.assert_close(forward(four, x_TD), forward(one, x_TD), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_is_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    losses = [{n: float(rng.normal()) for n in (1, 2, 4, 8)} for _ in range(5)]
    for budget in (5, 9, 14, 22, 40):
        fits = [c for c in itertools.product((1, 2, 4, 8), repeat=5) if sum(c) <= budget]
        best = min(fits, key=lambda c: sum(t[n] for t, n in zip(losses, c, strict=True)))
        assert cheapest_loss(losses, budget) == best
    with pytest.raises(ConfigError, match="`budget` is 4, and the cheapest choice costs 5"):
        cheapest_loss(losses, 4)


def test_the_additive_search_scores_one_layer_at_a_time():
    harm = np.random.default_rng(7).random(3)
    asked = []

    def loss(counts):
        asked.append(counts)
        return 2.0 + sum(h / n for h, n in zip(harm, counts, strict=True))

    found, predicted = additive_choice(loss, 3, (1, 2, 4), 7)
    assert len(asked) == 1 + 3 * 2
    assert all(sum(n != 4 for n in counts) <= 1 for counts in asked)
    fits = [c for c in itertools.product((1, 2, 4), repeat=3) if sum(c) <= 7]
    assert found == min(fits, key=loss)
    assert predicted == pytest.approx(loss(found), rel=1e-12)


def test_the_knapsack_spends_nothing_for_nothing():
    assert cheapest_loss([{1: 0.5, 4: 0.5}, {2: 0.1, 1: 0.2}], 8) == (1, 2)
    with pytest.raises(ConfigError, match="layer 0 has the loss nan at cost 1"):
        cheapest_loss([{1: float("nan")}], 8)
    with pytest.raises(ConfigError, match="`losses` is empty"):
        cheapest_loss([], 8)


def test_rounds_bring_heads_closer_to_their_mean():
    x_MdD = draw(5, D_HEAD, D, seed=60)
    R = align(x_MdD, value_turn)
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(D_HEAD, dtype=torch.float64).expand(5, -1, -1))
    first = torch.stack([value_turn(x_MdD[0] @ x.T) for x in x_MdD])  # where it begins
    lengths = [float((turns @ x_MdD).mean(0).norm()) for turns in (R, first)]
    assert lengths[0] > lengths[1] > float(x_MdD.mean(0).norm())
    mean_dD = (R @ x_MdD).mean(0)  # each head is as close to the mean as it can get
    best = torch.stack([value_turn(mean_dD @ x.T) for x in x_MdD])
    torch.testing.assert_close((best @ x_MdD).mean(0).norm(), mean_dD.norm(), rtol=1e-3, atol=0)

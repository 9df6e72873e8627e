"""Coefficients sum to one, baselines are the published profiles, and every baseline is a reachable point."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import build, discover
from lcsc.core.space import SearchSpace
from lcsc.operators import profiles
from lcsc.operators.base import notes_of
from lcsc.operators.linear import Linear, whitened_axes
from lcsc.searchers.base import Start, Task

STEPS = (50, 100, 200, 400, 1000)


@pytest.fixture
def bank(tiny_bank):
    return CheckpointBank.open(tiny_bank)


def test_ema_equals_torchs_own_average(bank):
    steps, decay = range(10, 60, 10), 0.7
    W_KP = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Linear(3, 1, bias=False).double()
    net.weight.data[0] = W_KP[0]
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for row in W_KP:
        net.weight.data[0] = row
        average.update_parameters(net)
    halflife = 10 * np.log(0.5) / np.log(decay)
    wanted = next(average.module.parameters())[0].detach().numpy()
    np.testing.assert_allclose(profiles.ema(steps, halflife) @ W_KP.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_ema_integrates_the_published_density(sigma_rel):
    coef_K = profiles.power_ema(STEPS, sigma_rel)
    # recover the exponent from the last interval and check the density's width, arXiv:2312.02696 App. C.1
    exponent = np.log(1 - coef_K[-1]) / np.log(STEPS[-2] / STEPS[-1]) - 1

    def density(t):
        return (exponent + 1) * t**exponent

    mean = quad(lambda t: t * density(t), 0, 1)[0]
    variance = quad(lambda t: (t - mean) ** 2 * density(t), 0, 1)[0]
    assert np.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-6)
    edges = [0, *np.array(STEPS) / STEPS[-1]]
    wanted = [quad(density, a, b)[0] for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(coef_K, wanted, rtol=1e-8)


def test_minus_sqrt_imitates_the_decay():
    coef_K = profiles.minus_sqrt(6, 4)
    # what is left of an update made before checkpoint j is the sum of the coefficients from j on
    shares = coef_K[::-1].cumsum()[::-1][2:]
    np.testing.assert_allclose(shares, 1 - np.sqrt(np.arange(4) / 4))
    assert coef_K[:2].tolist() == [0, 0]


def test_windows_and_wrong_widths():
    assert profiles.uniform(4, 2).tolist() == [0, 0, 0.5, 0.5]
    with pytest.raises(ConfigError, match="`sigma_rel` is 0.3; it must lie between 0 and 0.289"):
        profiles.power_ema(STEPS, 0.3)
    with pytest.raises(ConfigError, match="`halflife` is 0; it must be above 0"):
        profiles.ema(STEPS, 0)


@settings(max_examples=30, deadline=None)
@given(z=st.lists(st.floats(-50, 50), min_size=4, max_size=4), whitening=st.sampled_from([0.0, 0.5, 1.0]))
def test_coefficients_always_sum_to_one(shared_bank, z, whitening):
    coef_K = Linear(whitening).coefficients(shared_bank, {"z": np.array(z)})
    assert abs(coef_K.sum() - 1) < 1e-10
    np.testing.assert_allclose(Linear(whitening).point(shared_bank, coef_K)["z"], z, atol=1e-8)


@pytest.fixture(scope="module")
def shared_bank(tmp_path_factory, tiny_arch):
    from lcsc.models.network import build_network, save_network

    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(1)
    for step in STEPS:
        save_network(build_network(tiny_arch), folder / f"checkpoint-{step}" / "unet")
    return CheckpointBank.open(folder)


def test_every_baseline_is_a_reachable_point(bank):
    linear = Linear()
    baselines = linear.baselines(bank)
    assert {b.family for b in baselines} == {"last", "best_single", "ema", "power_ema", "uniform", "wsm"}
    by_label = {b.label: linear.coefficients(bank, b.point) for b in baselines}
    assert by_label["step 200"].tolist() == [0, 0, 1, 0, 0]
    np.testing.assert_allclose(by_label["mean of last 3"], [0, 0, 1 / 3, 1 / 3, 1 / 3], atol=1e-11)
    last = next(b for b in baselines if b.family == "last")
    row_P = torch.empty(bank.layout.num_parameters)
    linear.apply(bank, last.point).write(row_P)
    assert row_P.numpy().tobytes() == bank.matrix()[-1].numpy().tobytes()


def test_full_whitening_makes_unit_steps_equally_long(bank):
    W_KP = bank.matrix().double().numpy()
    lengths = np.linalg.norm(whitened_axes(bank, 1.0).axes_KZ.T @ W_KP, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-6)
    half = np.linalg.norm(whitened_axes(bank, 0.5).axes_KZ.T @ W_KP, axis=1)
    spread = whitened_axes(bank, 0.5).spread_Z
    np.testing.assert_allclose(half / half[0], np.sqrt(spread / spread[0]), rtol=1e-6)
    flat = whitened_axes(bank, 0.0).axes_KZ
    np.testing.assert_allclose(flat.T @ flat, np.eye(4) / 5, atol=1e-12)


def test_apply_is_pure_and_matches_its_recipe(bank):
    linear = Linear()
    candidate = linear.apply(bank, {"z": np.array([1.0, -2.0, 0.5, 3.0])})
    before = bank.matrix().clone()
    weights = candidate.weights()
    wanted_P = (np.array(candidate.recipe["coef"]) @ bank.matrix().double().numpy()).astype(np.float32)
    row_P = bank.layout.flatten(weights).numpy()
    np.testing.assert_allclose(row_P, wanted_P, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), candidate.weights().values(), strict=True))
    assert torch.equal(bank.matrix(), before)


def test_one_checkpoint_or_copies_are_refused(bank, tiny_bank):
    import shutil

    from lcsc.bank import Selection

    with pytest.raises(BankError, match="holds 1 checkpoint; a combination needs at least 2"):
        Linear().space(CheckpointBank.open(tiny_bank, select=Selection(last=1)))
    for step in STEPS[:-1]:
        shutil.rmtree(tiny_bank / f"checkpoint-{step}")
        shutil.copytree(tiny_bank / "checkpoint-1000", tiny_bank / f"checkpoint-{step}")
    with pytest.raises(BankError, match=r"all 5 checkpoints of .* are identical"):
        Linear().apply(CheckpointBank.open(tiny_bank), {"z": np.zeros(4)})


def test_foreign_coefficients_are_refused(bank):
    with pytest.raises(ConfigError, match="2 coefficients that sum to 2 are no combination of 5 checkpoints"):
        Linear().point(bank, np.ones(2))
    with pytest.raises(ConfigError, match=r"`operator.whitening` is 2; it must lie in \[0, 1\]"):
        Linear(whitening=2)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_point_is_the_nearest_one_in_weight_space(bank, rank):
    W_KP = bank.matrix().double().numpy()
    mean_P = W_KP.mean(0)
    _, spread_K, turn_KP = np.linalg.svd(W_KP - mean_P, full_matrices=False)
    lost = 100 * (spread_K[rank:] ** 2).sum() / (spread_K**2).sum()
    linear = Linear(rank=rank)
    assert f" hold {lost:.3g} % of" in linear.notes(bank)[0]
    coef_K = np.array([0.7, -0.4, 1.1, -0.9, 0.5])
    point = linear.point(bank, coef_K)
    assert point["z"].shape == (rank,)
    wanted_P = mean_P + turn_KP[:rank].T @ (turn_KP[:rank] @ (coef_K @ W_KP - mean_P))
    np.testing.assert_allclose(linear.coefficients(bank, point) @ W_KP, wanted_P, atol=1e-9)
    row_P = torch.empty(W_KP.shape[1])
    linear.apply(bank, point).write(row_P)
    np.testing.assert_allclose(row_P.numpy(), wanted_P, atol=1e-6)
    grad_P = torch.randn(W_KP.shape[1], generator=torch.Generator().manual_seed(3))
    full = Linear().pull_back(bank, Linear().point(bank, coef_K), grad_P)["z"]
    np.testing.assert_allclose(linear.pull_back(bank, point, grad_P)["z"], full[:rank], rtol=1e-12)


def test_baselines_of_a_truncated_space_are_the_baselines_themselves(bank):
    linear, full = Linear(rank=2), Linear()
    space = linear.space(bank)
    assert (space.size, space.lengths.tolist()) == (2, full.space(bank).lengths[:2].tolist())
    for small, exact in zip(linear.baselines(bank), full.baselines(bank), strict=True):
        wanted_K = full.coefficients(bank, exact.point)
        z = space.to_vector(small.point)
        there_and_back = (z * space.lengths) / space.lengths  # as a searcher does before it proposes the start again
        for vector in (z, there_and_back):
            found_K = linear.coefficients(bank, space.to_point(vector))
            np.testing.assert_allclose(found_K, wanted_K, atol=2e-12, err_msg=small.label)
        beside_K = linear.coefficients(bank, space.to_point(z + 1e-6))
        np.testing.assert_allclose(beside_K, whitened_axes(bank, 0.5).coefficients(z + 1e-6), atol=1e-12)
    last = next(b for b in linear.baselines(bank) if b.family == "last")
    row_P = torch.empty(bank.layout.num_parameters)
    linear.apply(bank, last.point).write(row_P)
    assert row_P.numpy().tobytes() == bank.matrix()[-1].numpy().tobytes()


def test_lbfgs_leaves_a_baseline_beside_the_plane_of_a_truncated_space(bank):
    """The goal is the baseline, moved along the plane by a little more than its distance from it.

    So the baseline is lower than all that a short first step reaches, and higher than the plane's minimum.
    """
    operator = Linear(rank=2)
    space = operator.space(bank)
    baseline = next(row for row in operator.baselines(bank) if row.family == "last")
    begin = space.to_vector(baseline.point)

    def theta(vector):
        row_P = torch.empty(bank.layout.num_parameters)
        operator.apply(bank, space.to_point(vector)).write(row_P)
        return row_P.double()

    off = float((theta(begin) - theta(begin + 1e-6)).norm())
    step_P = theta(begin + 1e-6 + np.array([1.0, 0])) - theta(begin + 1e-6)
    goal_P = theta(begin) + 1.1 * off / step_P.norm() * step_P

    def value(vector):
        return float(((theta(vector) - goal_P) ** 2).sum()) / off**2

    def slope(vector):
        grad_P = 2 / off**2 * (theta(vector) - goal_P).float()
        return space.to_vector(operator.pull_back(bank, space.to_point(vector), grad_P))

    task = Task(space, 60, 0, (Start(begin, value(begin), "last"),), no_gradient=None)
    short = 0.1 * off / float(step_P.norm()) * space.step_lengths[0]
    session, values = build("searcher", "lbfgs", step_size=short).start(task), []
    for _ in range(40):
        proposal = session.ask()
        values.append(value(proposal.vector))
        session.tell(proposal.uid, values[-1], slope(proposal.vector))
    assert values[0] == pytest.approx(1.1**2, rel=1e-4)
    assert min(values) == pytest.approx(1, rel=1e-3)  # all that is left is what the plane lacks
    assert value(session.best()) == pytest.approx(1, rel=1e-3)


def test_ranks_that_leave_nothing_out_or_ask_too_much(bank):
    assert Linear(rank=4).notes(bank) == Linear().notes(bank) == []
    z = {"z": np.array([1.0, -2.0, 0.5, 3.0])}
    assert Linear(rank=4).coefficients(bank, z).tolist() == Linear().coefficients(bank, z).tolist()
    with pytest.raises(ConfigError, match="`operator.rank` is 5, but 5 checkpoints span 4 directions"):
        Linear(rank=5).space(bank)
    with pytest.raises(ConfigError, match="`operator.rank` is 0; it must be at least 1"):
        Linear(rank=0)


def test_operators_with_notes_say_them_once(bank):
    (note,) = notes_of(Linear(rank=1), bank)
    assert note.startswith("note: operator.rank=1 searches the 1 longest of 4 directions")
    assert "`searcher.radius` counts distances within these directions, from the start's nearest point" in note
    assert notes_of(Silent(), bank) == []


class Silent:
    """An operator with nothing to say."""

    def space(self, bank):
        return SearchSpace()

    def apply(self, bank, point):
        return Linear().apply(bank, {"z": np.zeros(bank.num_checkpoints - 1)})

    def baselines(self, bank):
        return []


def test_operators_are_listed():
    assert {"linear", "linear_grouped"} <= set(discover("operator"))

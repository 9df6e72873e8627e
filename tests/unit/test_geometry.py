"""Where a winner lies: distances and ranks against plain linear algebra, flat directions against known subspaces."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from lcsc.bank import CheckpointBank, Selection
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.operators.base import Candidate
from lcsc.operators.linear import Linear
from lcsc.search.budget import Budget
from lcsc.search.geometry import ENOUGH, FLAT, bank_shape, coefficient_size, effective_rank, geometry, slope_shape
from lcsc.search.problem import Problem
from lcsc.search.run import run_search


@pytest.fixture
def bank(tiny_bank):
    return CheckpointBank.open(tiny_bank)


@dataclass
class Shifted:
    """The linear operator, and a move of one weight that no combination can make."""

    linear: Linear
    level: int = 0

    def space(self, bank):
        shift = Box("shift", 1, lengths=(1.0,), level=self.level)
        return SearchSpace((*self.linear.space(bank).boxes, shift))

    def apply(self, bank, point):
        whole = self.linear.apply(bank, {"z": point["z"]})

        def write(theta_P):
            whole.write(theta_P)
            theta_P[7] += float(point["shift"][0])

        return Candidate(whole.arch, whole.layout, write, {"operator": "shifted"})

    def baselines(self, bank):
        return []


class Moved:
    """A move of one weight of the last checkpoint."""

    def space(self, bank):
        return SearchSpace((Box("shift", 1),))

    def apply(self, bank, point):
        def write(theta_P):
            theta_P.copy_(bank.matrix()[-1])
            theta_P[7] += float(point["shift"][0])

        return Candidate(bank.arch, bank.layout, write, {"operator": "moved"})

    def baselines(self, bank):
        return []


def record(who, vector, **more):
    return {"who": who, "vector": list(map(float, vector)), **more}


def coefficients(seed, K=5):
    raw_K = np.random.default_rng(seed).normal(size=K)
    return raw_K - (raw_K.sum() - 1) / K


def test_distances_and_ranks_are_those_of_plain_linear_algebra(bank):
    linear, coefs = Linear(), {who: coefficients(seed) for seed, who in enumerate(("best", "ema"))}
    coefs["last"] = np.eye(5)[-1]
    reports = [record(who, linear.point(bank, c)["z"], coef=c.tolist()) for who, c in coefs.items()]
    found = geometry(bank, linear, reports, [], "ema")
    W_KP = bank.matrix().double().numpy()
    delta_KP = W_KP - W_KP.mean(0)
    _, length_D, axes_DP = np.linalg.svd(delta_KP, full_matrices=False)
    unit = np.linalg.norm(delta_KP[-1])
    for who, c in coefs.items():
        point, distance = found["points"][who], np.linalg.norm((c - np.eye(5)[-1]) @ W_KP)
        assert point["from_last"] == pytest.approx(distance, rel=1e-6, abs=1e-6 * unit)
        assert point["from_last_relative"] == pytest.approx(distance / unit, rel=1e-6, abs=1e-6)
        assert point["sum_abs"] == pytest.approx(np.abs(c).sum())
        assert point["max_abs"] == pytest.approx(np.abs(c).max())
    assert found["points"]["last"]["from_last"] == 0
    shape, way = found["bank"], found["way"]
    assert shape["last_to_mean"] == pytest.approx(unit)
    assert shape["last_to_first"] == pytest.approx(np.linalg.norm(W_KP[-1] - W_KP[0]))
    share_D = length_D[:4] ** 2 / (length_D[:4] ** 2).sum()
    np.testing.assert_allclose(shape["spread"], share_D, rtol=1e-9)
    assert shape["effective_rank"] == pytest.approx(np.exp(entropy(share_D)))
    assert (shape["num_directions"], shape["num_short"]) == (4, 0)
    move_P = (coefs["best"] - coefs["ema"]) @ W_KP
    along_D = (axes_DP[:4] @ move_P) ** 2 / (move_P @ move_P)
    np.testing.assert_allclose(way["along"], along_D, rtol=1e-5)
    assert way["length"] == pytest.approx(np.linalg.norm(move_P), rel=1e-6)
    assert way["effective_rank"] == pytest.approx(np.exp(entropy(along_D)), rel=1e-5)
    assert way["outside"] == pytest.approx(0, abs=1e-6)
    assert "slope" not in found  # no trial had a gradient
    json.dumps(found, allow_nan=False)


def test_a_copy_of_a_checkpoint_makes_a_short_direction(tiny_bank):
    twin = tiny_bank / "checkpoint-2000"
    twin.mkdir()
    (tiny_bank / "checkpoint-1000" / "unet").rename(twin / "unet")
    (tiny_bank / "checkpoint-1000" / "unet").symlink_to(twin / "unet")
    bank = CheckpointBank.open(tiny_bank)
    linear, coef_K = Linear(), np.array([0.0, 0, 0, 0, 3, -2])
    reports = [record("best", linear.point(bank, coef_K)["z"], coef=coef_K.tolist())]
    found = geometry(bank, linear, reports, [], None)
    assert (found["bank"]["num_directions"], found["bank"]["num_short"]) == (5, 1)
    assert found["points"]["best"]["from_last_relative"] == pytest.approx(0, abs=1e-6)  # 3 copies - 2 copies
    assert "way" not in found


def test_a_single_checkpoint_spans_no_direction(tiny_bank):
    bank = CheckpointBank.open(tiny_bank, select=Selection(last=1))
    shape = bank_shape(bank, np.ones(bank.layout.num_parameters, dtype=np.float32))
    assert (shape["bank"]["num_directions"], shape["bank"]["spread"]) == (0, [])
    assert (shape["bank"]["last_to_mean"], shape["bank"]["effective_rank"]) == (0.0, 0.0)
    assert shape["way"]["outside"] == 1.0
    reports = [record("best", [2.5]), record("last", [0.0])]
    found = geometry(bank, Moved(), reports, [], "last")
    assert list(found) == ["points"]  # nothing is said of directions that are not there
    assert found["points"]["best"]["from_last"] == pytest.approx(2.5, rel=1e-6)


def test_what_no_combination_reaches_is_outside_and_operators_without_coefficients_have_no_sizes(bank):
    operator, start = Shifted(Linear()), np.full(5, 0.1)
    end = np.array([0.1, 0.1, 0.1, 0.1, 2.6])
    found = geometry(bank, operator, [record("best", end), record("last", start)], [], "last")
    assert set(found["points"]["best"]) == {"from_last", "from_last_relative"}
    delta_KP = bank.matrix().double().numpy()
    delta_KP -= delta_KP.mean(0)
    axes_DP = np.linalg.svd(delta_KP, full_matrices=False)[2][:4]
    assert found["way"]["length"] == pytest.approx(2.5, rel=1e-6)
    assert 1 - found["way"]["outside"] == pytest.approx((axes_DP[:, 7] ** 2).sum(), rel=1e-4)


def test_candidates_of_another_shape_and_lora_factors_have_no_distances(bank):
    class Doubled(Shifted):
        def apply(self, bank, point):
            whole = super().apply(bank, point)
            entries = tuple(replace(entry, name=f"{entry.name}.new") for entry in whole.layout.entries)
            return replace(whole, layout=replace(whole.layout, entries=entries))

    reports = [record("best", np.zeros(5), coef=[0.5, 0.5]), record("last", np.ones(5), coef=[0, 1])]
    assert geometry(bank, Doubled(Linear()), reports, [], "last") == {
        "points": {"best": {"sum_abs": 1.0, "max_abs": 0.5}, "last": {"sum_abs": 1.0, "max_abs": 1.0}}
    }
    bank.kind = "lora"
    assert "bank" not in geometry(bank, Shifted(Linear()), reports, [], "last")


def test_sizes_of_layer_groups_are_those_of_the_largest():
    assert coefficient_size([0.5, -0.25, 0.75]) == {"sum_abs": 1.5, "max_abs": 0.75}
    assert coefficient_size([[2.0, -1.0], [0.5, 0.5]]) == {"sum_abs": 3.0, "max_abs": 2.0}


@pytest.mark.parametrize(("energy", "rank"), [([3, 3, 3, 0], 3), ([0, 7], 1), ([0, 0], 0), ([], 0)])
def test_effective_rank_counts_equal_directions(energy, rank):
    assert effective_rank(np.array(energy, dtype=float)) == pytest.approx(rank)


def test_effective_rank_is_the_exponential_of_the_entropy():
    energy = np.random.default_rng(0).exponential(size=9)
    assert effective_rank(energy) == pytest.approx(np.exp(entropy(energy)))


def test_gradients_of_a_known_subspace_tell_its_size_and_the_flat_share_of_a_way():
    rng, Z, R = np.random.default_rng(0), 12, 5
    basis_ZR = np.linalg.qr(rng.normal(size=(Z, Z)))[0][:, :R]
    gradients_TZ = np.tile(np.eye(R), (6, 1)) @ basis_ZR.T  # every direction of the subspace equally often
    steep_T = rng.choice([1e6, 1.0, 1e-6], size=len(gradients_TZ))  # a steep start must not hide the rest
    way_Z = rng.normal(size=Z)
    found = slope_shape(steep_T[:, None] * gradients_TZ, way_Z)
    assert (found["num_gradients"], found["num_directions"]) == (30, Z)
    assert (found["num_carrying"], found["num_flat"]) == (R, Z - R)
    np.testing.assert_allclose(found["energy"], [1 / R] * R + [0] * (Z - R), atol=1e-12)
    rest_Z = way_Z - basis_ZR @ (basis_ZR.T @ way_Z)
    assert found["way_flat"] == pytest.approx(rest_Z @ rest_Z / (way_Z @ way_Z))
    assert sum(found["along"]) == pytest.approx(1)
    assert "along" not in slope_shape(gradients_TZ, np.zeros(Z))


def test_few_gradients_and_zeros_say_nothing():
    gradients_TZ = np.vstack([np.eye(4), np.eye(4), np.zeros((9, 4))])
    assert slope_shape(gradients_TZ[1:], np.ones(4)) == {"num_gradients": 7, "num_directions": 4}
    assert slope_shape(gradients_TZ, np.ones(4))["num_carrying"] == 4


def test_noise_alone_makes_no_direction_flat_by_chance():
    """At the fewest gradients the smallest share is where Marchenko and Pastur put it."""
    Z = 200
    found = slope_shape(np.random.default_rng(0).normal(size=(ENOUGH * Z, Z)), np.ones(Z))
    assert found["num_flat"] == 0
    assert Z * found["energy"][-1] == pytest.approx((1 - np.sqrt(1 / ENOUGH)) ** 2, rel=0.15)
    assert (1 - np.sqrt(1 / ENOUGH)) ** 2 > FLAT


def test_slope_is_measured_in_equal_lengths_of_weight_space(bank):
    """The same score and way, told in two coordinates of the plane, give the same answer."""
    rng, found = np.random.default_rng(0), []
    grad_TP = torch.from_numpy(rng.normal(size=(12, bank.layout.num_parameters))).float()
    for linear in (Linear(whitening=0.0), Linear(whitening=1.0)):
        points = [linear.point(bank, coefficients(seed)) for seed in (1, 2)]
        reports = [record(who, point["z"]) for who, point in zip(("best", "ema"), points, strict=True)]
        trials = [{"gradient": linear.pull_back(bank, points[0], grad_P)["z"].tolist()} for grad_P in grad_TP]
        trials += [{"gradient": None}, {"value": 1.0}]  # a failure, and a black-box trial
        found.append(geometry(bank, linear, reports, trials, "ema")["slope"])
    assert found[0]["num_gradients"] == 12
    for key in ("energy", "along"):
        np.testing.assert_allclose(found[0][key], found[1][key], rtol=1e-4)


def test_slope_of_layer_groups_is_that_of_plain_linear_algebra(bank):
    """What the weights of each group can do, by an SVD of the checkpoints' own columns."""
    groups = {"down": "down_blocks", "up": "up_blocks"}
    operator = build("operator", "linear_grouped", groups=groups, whitening=0.7)
    space, rng = operator.space(bank), np.random.default_rng(0)
    start, end = (rng.normal(size=space.size) for _ in range(2))
    grad_TP = rng.normal(size=(40, bank.layout.num_parameters)).astype(np.float32)
    point = space.to_point(end)
    pulled = [space.to_vector(operator.pull_back(bank, point, torch.from_numpy(grad_P))) for grad_P in grad_TP]
    reports = [record("best", end), record("last", start)]
    found = geometry(bank, operator, reports, [{"gradient": row.tolist()} for row in pulled], "last")["slope"]

    names = [name for entry in bank.layout.entries for name in [entry.name] * (entry.stop - entry.start)]
    label_P = np.array([next((g for g, text in groups.items() if text in name), "rest") for name in names])
    delta_KP = bank.matrix().double().numpy()
    delta_KP -= delta_KP.mean(0)
    axes = [np.linalg.svd(delta_KP * (label_P == g), full_matrices=False)[2][:-1] for g in ("down", "up", "rest")]
    axes_YP = np.concatenate(axes)
    theta = [torch.empty(bank.layout.num_parameters) for _ in range(2)]
    for vector, row_P in zip((end, start), theta, strict=True):
        operator.apply(bank, space.to_point(vector)).write(row_P)
    wanted = slope_shape(grad_TP @ axes_YP.T, axes_YP @ (theta[0] - theta[1]).double().numpy())
    assert found["num_directions"] == len(axes_YP)
    np.testing.assert_allclose(found["energy"], wanted["energy"], rtol=1e-4)
    np.testing.assert_allclose(found["along"], wanted["along"], rtol=1e-3, atol=1e-7)


def test_coordinates_that_are_not_at_right_angles_make_no_claim(bank):
    trials = [{"gradient": row.tolist()} for row in np.random.default_rng(0).normal(size=(30, 5))]
    reports = [record("best", np.ones(5)), record("last", np.zeros(5))]
    assert "slope" in geometry(bank, Shifted(Linear()), reports, trials, "last")
    assert "slope" not in geometry(bank, Shifted(Linear(), level=1), reports, trials, "last")


def test_a_finished_search_says_where_its_winner_lies(tmp_path):
    data, net = build("dataset", {"name": "gaussian"}), {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
    model = build("model", {"name": "direct"})
    path = build("trainer", {"name": "gaussian_toy", "num_checkpoints": 4}).train(
        arch=net, model=model, dataset=data, out=tmp_path / "bank", seed=0, progress=False
    )
    objective = build(
        "objective", {"name": "sample_quality"}, model=model, dataset=data, other_metrics=(),
        sampler=build("sampler", {"name": "euler", "num_steps": 3}), metric=build("metric", {"name": "fid_pixels"}),
    )  # fmt: skip
    operator = build("operator", {"name": "linear_grouped", "groups": {"middle": "mean", "width": "std"}})
    searcher, budget = build("searcher", {"name": "gradient"}), Budget(4, 32, 2, 32, 40)
    problem = Problem(CheckpointBank.open(path), operator, searcher, objective, budget, seed=0)
    folder = run_search(problem, name="toy", runs_dir=tmp_path / "runs", quiet=True)
    summary = json.loads((folder / "summary.json").read_text())
    coefs = {name: [r["coef"] for r in summary["coefficients"] if r["group"] == name] for name in ("middle", "width")}
    assert [sum(c) for c in coefs.values()] == pytest.approx([1, 1])
    found, rival = summary["geometry"], summary["report"]["best_baseline"]
    assert set(found["points"]) == {"best", *summary["report"]["baselines"]}
    assert found["points"]["best"]["sum_abs"] == pytest.approx(max(np.abs(c).sum() for c in coefs.values()))
    assert summary["images_saved"] == 0
    assert rival in found["points"]
    assert found["slope"] == {"num_gradients": 4, "num_directions": 6}  # of both groups; too few gradients for more
    views = [problem.bank.layout.views(row) for row in problem.bank.matrix().double()]
    moved = 0.0
    for name, tensor in {"middle": "mean_CHW", "width": "std_CHW"}.items():
        rows = np.stack([view[tensor].numpy().ravel() for view in views])
        moved += np.sum((coefs[name] @ rows - rows[-1]) ** 2)
    assert found["points"]["best"]["from_last"] == pytest.approx(np.sqrt(moved), rel=1e-5)

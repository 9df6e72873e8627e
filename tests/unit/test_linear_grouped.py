"""Layer groups: every parameter in one, each combined with its own coefficients, and made again from the recipe."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from lcsc.bank import CheckpointBank
from lcsc.core.digests import canonical_json
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import build, describe
from lcsc.core.seeds import Purpose
from lcsc.export.card import model_card
from lcsc.export.folder import recipe_groups
from lcsc.export.model import export_model
from lcsc.export.verify import verify
from lcsc.export.weights import read_recipe, write_weights
from lcsc.models.network import build_network, save_network
from lcsc.operators.linear import Linear
from lcsc.operators.linear_grouped import LinearGrouped, auto_pairs
from lcsc.searchers.base import Task

PREFIXES = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks.", "time": "time_embedding."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_arch):
    """A random walk of four checkpoints."""
    folder = tmp_path_factory.mktemp("grouped")
    torch.manual_seed(0)
    net = build_network(tiny_arch)
    for step in (10, 20, 30, 50):
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    return folder


@pytest.fixture(scope="module")
def bank(folder):
    return CheckpointBank.open(folder)


def row_of(operator, bank, point):
    theta_P = torch.empty(bank.layout.num_parameters)
    operator.apply(bank, point).write(theta_P)
    return theta_P


def random_point(operator, bank, scale=1.0):
    space = operator.space(bank)
    return space.to_point(scale * np.random.default_rng(1).standard_normal(space.size))


# ------------------------------------------------------------------------------------------------------------ groups


def test_a_unets_parts_hold_every_parameter_once(bank, tiny_arch):
    parts = LinearGrouped().partition(bank)
    assert parts.names == ("down", "mid", "up", "time", "rest")
    net = build_network(tiny_arch)
    wanted = dict.fromkeys(parts.names, 0)
    for name, parameter in net.named_parameters():
        group = next((group for group, prefix in PREFIXES.items() if name.startswith(prefix)), "rest")
        wanted[group] += parameter.numel()
    assert dict(zip(parts.names, parts.sizes, strict=True)) == wanted
    assert sum(parts.sizes) == bank.layout.num_parameters
    starts = parts.columns.starts
    per_group = dict.fromkeys(parts.names, 0)
    for start, stop, g in zip(starts, starts[1:], parts.columns.groups, strict=False):
        per_group[parts.names[g]] += stop - start
    assert per_group == wanted
    note = LinearGrouped().notes(bank)[0]
    assert note == "layer groups (parameters): " + ", ".join(f"{name} {size:,}" for name, size in wanted.items())


def test_a_transformers_thirds_by_depth():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=7, sample_size=4, in_channels=1)
    pairs = auto_pairs([name for name, _ in net.named_parameters()])
    assert [group for group, _ in pairs] == ["early", "middle", "late", "time"]

    def group(name):
        return next((group for group, pattern in pairs if re.search(pattern, name)), "rest")

    depth = [group(f"transformer_blocks.{n}.attn1.to_q.weight") for n in range(7)]
    assert depth == ["early"] * 3 + ["middle"] * 2 + ["late"] * 2
    assert group("transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight") == "early"
    assert group("proj_out_1.weight") == "rest"
    # FLUX-like: the second stack follows the first, and 10 comes after 9
    names = [f"transformer_blocks.{n}.x" for n in range(3)] + [f"single_transformer_blocks.{n}.x" for n in range(12)]
    flux = auto_pairs(names)
    first = {kind: [name for name in names if re.search(pattern, name)] for kind, pattern in flux}
    assert [name for kind in ("early", "middle", "late") for name in first[kind]] == names
    assert [len(found) for found in first.values()] == [5, 5, 5]
    assert auto_pairs(["0.weight", "2.weight"]) == ()


def test_patterns_in_order_first_match_wins(bank):
    # `conv` occurs in down_blocks too, whose group comes first
    operator = LinearGrouped({"down": r"^down_blocks\.", "convs": "conv", "biases": r"\.bias$"})
    parts = operator.partition(bank)
    assert parts.names == ("down", "convs", "biases", "rest")
    wanted = dict.fromkeys(parts.names, 0)
    for entry in bank.layout.entries:
        name = entry.name
        group = "down" if name.startswith("down_blocks.") else "convs" if "conv" in name else None
        group = group or ("biases" if name.endswith(".bias") else "rest")
        wanted[group] += int(np.prod(entry.shape))
    assert dict(zip(parts.names, parts.sizes, strict=True)) == wanted
    assert len(parts.segments) > 10  # groups that interleave
    back = LinearGrouped({"biases": r"\.bias$", "convs": "conv", "down": r"^down_blocks\."}).partition(bank)
    assert dict(zip(back.names, back.sizes, strict=True)) != wanted


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"a": "conv", "nothing": "attention"}, "layer group `nothing` has no parameters: `attention` occurs in none"),
        ({"a": "conv", "b": "conv_in"}, "layer group `b` has no parameters"),
        ({"a": "(conv"}, r"layer group `a` has the pattern `\(conv`, which is no regular expression"),
        ({"all": "."}, "makes one group of all parameters"),
        ("layers", "`operator.groups` is `layers`; it must be `auto`"),
        ({}, "it must be `auto`"),
        ({"a": 3}, r"holds `\('a', 3\)`; each group is a name and a regular expression"),
        ([["a", "x"], ["a", "y"]], "names `a` twice"),
    ],
)
def test_mistakes_are_named(bank, groups, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LinearGrouped(groups).space(bank)


def test_names_of_no_known_architecture_are_refused(tmp_path):
    for step in (1, 2):
        torch.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).state_dict(), tmp_path / f"model{step:03d}.pt")
    with pytest.raises(ConfigError, match=r"makes one group of all parameters .* \(such as `0.bias`\)"):
        LinearGrouped().space(CheckpointBank.open(tmp_path))


def test_a_frozen_group_has_no_box(tmp_path):
    for step in (1, 2, 3):
        row = {"frozen": torch.ones(3), "moving": torch.randn(4, generator=torch.Generator().manual_seed(step))}
        torch.save(row, tmp_path / f"model{step:03d}.pt")
    bank, operator = CheckpointBank.open(tmp_path), LinearGrouped({"ice": "frozen"})
    assert [box.name for box in operator.space(bank).boxes] == ["z", "z_rest"]
    assert "layer group `ice` is the same in all checkpoints" in operator.notes(bank)[1]
    point = {"z": np.array([1.0, 2.0]), "z_rest": np.array([-1.0, 3.0])}
    np.testing.assert_allclose(operator.coefficients(bank, point).sum(1), 1, atol=1e-11)


def test_the_order_of_groups_survives_a_configuration():
    operator = LinearGrouped({"z": "a", "b": "c"})
    told = json.loads(canonical_json(describe("operator", operator)))
    assert build("operator", told) == operator
    assert describe("operator", LinearGrouped({"b": "c", "z": "a"})) != describe("operator", operator)
    assert describe("operator", LinearGrouped())["groups"] == "auto"


# ----------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("storage", ["resident", "streamed", "delta"])
def test_without_deviations_it_is_the_linear_operator(folder, storage):
    bank, operator = CheckpointBank.open(folder, storage=storage), LinearGrouped()
    space = operator.space(bank)
    assert [(box.name, box.size, box.level) for box in space.boxes] == [
        ("z", 3, 0),
        *((f"z_{name}", 3, 1) for name in ("down", "mid", "up", "time", "rest")),
    ]
    plain = Linear().baselines(bank)
    for grouped, baseline in zip(operator.baselines(bank), plain, strict=True):
        coef_GK = operator.coefficients(bank, space.to_point(space.to_vector(grouped.point)))
        wanted_K = Linear().coefficients(bank, baseline.point)
        assert (coef_GK == wanted_K).all(), baseline.label
        assert (grouped.family, grouped.label) == (baseline.family, baseline.label)
    for grouped, baseline in list(zip(operator.baselines(bank), plain, strict=True))[::9]:
        assert torch.equal(row_of(operator, bank, grouped.point), row_of(Linear(), bank, baseline.point))
    z = np.random.default_rng(0).standard_normal(3)
    zeros = {box.name: np.zeros(3) for box in space.boxes[1:]}
    assert torch.equal(row_of(operator, bank, {"z": z, **zeros}), row_of(Linear(), bank, {"z": z}))


@pytest.mark.parametrize("storage", ["resident", "streamed", "delta"])
def test_each_group_is_combined_with_its_own_coefficients(folder, bank, storage):
    stored, operator = CheckpointBank.open(folder, storage=storage), LinearGrouped({"w": r"weight$", "c": "conv"})
    point = random_point(operator, stored)
    coef_GK = operator.coefficients(stored, point)
    assert np.abs(coef_GK - coef_GK[0]).max() > 0.1
    np.testing.assert_allclose(coef_GK.sum(1), 1, atol=1e-11)
    views = [bank.layout.views(row.double()) for row in bank.matrix()]
    found = bank.layout.views(row_of(operator, stored, point))
    for entry in bank.layout.entries:
        g = 0 if entry.name.endswith("weight") else 1 if "conv" in entry.name else 2
        wanted = sum(c * view[entry.name].numpy() for c, view in zip(coef_GK[g], views, strict=True))
        tolerance = 1e-6 if storage != "delta" else 5e-3  # bfloat16 differences
        np.testing.assert_allclose(found[entry.name].numpy(), wanted, atol=tolerance, err_msg=entry.name)


def test_deviations_live_in_their_groups_own_singular_directions(bank):
    operator = LinearGrouped(whitening=1.0)
    W_KP, parts = bank.matrix().double().numpy(), operator.partition(bank)
    W_KP = W_KP - W_KP.mean(0)
    unit = np.exp(np.log(np.linalg.svd(W_KP, compute_uv=False)[:3]).mean()) / 2  # steps are 1/sqrt(K) of the spread
    for g, name in enumerate(parts.names):
        columns = np.concatenate(
            [
                np.arange(a, b)
                for a, b, h in zip(parts.columns.starts, parts.columns.starts[1:], parts.columns.groups, strict=False)
                if h == g
            ]
        )
        spread = np.linalg.svd(W_KP[:, columns], compute_uv=False)[:3]
        box = next(box for box in operator.space(bank).boxes if box.name == f"z_{name}")
        moves = np.linalg.norm(box.natural.axes.T @ W_KP[:, columns], axis=1)
        np.testing.assert_allclose(moves, np.exp(np.log(spread).mean()) / 2, rtol=1e-6)  # all steps equally long
        np.testing.assert_allclose(box.lengths, moves / unit, rtol=1e-6)
        np.testing.assert_allclose(box.natural.axes.sum(0), 0, atol=1e-12)


def test_natural_coefficients_there_and_back(bank):
    space = LinearGrouped().space(bank)
    vector = np.random.default_rng(2).standard_normal(space.size)
    natural = space.to_natural(vector)
    np.testing.assert_allclose([part.sum() for part in natural], [1, 0, 0, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(space.from_natural(natural), vector, atol=1e-9)
    np.testing.assert_allclose(space.from_natural([part + 0.1 for part in natural]), vector, atol=1e-9)


@pytest.mark.parametrize("storage", ["resident", "streamed"])
def test_pull_back_against_central_differences(folder, storage):
    bank, operator = CheckpointBank.open(folder, storage=storage), LinearGrouped()
    space, P = operator.space(bank), bank.layout.num_parameters
    weight_P = torch.randn(P, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / P**0.5

    def smooth(vector):
        theta_P = row_of(operator, bank, space.to_point(vector)).double().requires_grad_()
        value = torch.sin(theta_P) @ weight_P + (theta_P**2).sum() / 2
        (grad_P,) = torch.autograd.grad(value, theta_P)
        return value.item(), grad_P

    at, step = 0.3 * np.random.default_rng(4).standard_normal(space.size), 1e-3
    found = space.to_vector(operator.pull_back(bank, space.to_point(at), smooth(at)[1].float()))
    wanted = [(smooth(at + step * e)[0] - smooth(at - step * e)[0]) / (2 * step) for e in np.eye(space.size)]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_searchers_descend_in_it(bank):
    """Adam on an exact quadratic reaches a target that no shared coefficients express."""
    operator = LinearGrouped()
    space = operator.space(bank)
    goal_P = row_of(operator, bank, random_point(operator, bank, 0.5))
    session = build("searcher", "gradient").start(Task(space, 150, 0, no_gradient=None))
    values = []
    for _ in range(150):
        proposal = session.ask()
        away_P = row_of(operator, bank, space.to_point(proposal.vector)) - goal_P
        values.append(float((away_P.double() ** 2).sum()))
        slope = operator.pull_back(bank, space.to_point(proposal.vector), 2 * away_P)
        session.tell(proposal.uid, values[-1], space.to_vector(slope))
    W_KP = bank.matrix().double().numpy()
    fit = np.linalg.lstsq((W_KP[1:] - W_KP[0]).T, goal_P.double().numpy() - W_KP[0], rcond=None)[1]
    assert min(values) < 0.05 * float(fit[0])  # the best that any shared coefficients could do


# ------------------------------------------------------------------------------------------------------------ export


def write(operator, bank, to, point):
    candidate = operator.apply(bank, point)
    recipe = {**candidate.recipe, "parents": [dict(parent) for parent in bank.parents], "bank": dict(bank.config)}
    to.mkdir()
    write_weights(candidate.weights(), candidate.arch, recipe, to, max_shard_size="20KB")


@pytest.mark.parametrize("how", [{}, {"storage": "delta"}, {"dtype": "bfloat16"}])
def test_models_of_other_groups_are_verified_together(folder, tmp_path, how):
    bank = CheckpointBank.open(folder, **how)
    for name, groups in (("auto", "auto"), ("mixed", {"w": r"weight$", "c": "conv"})):
        operator = LinearGrouped(groups)
        write(operator, bank, tmp_path / name, random_point(operator, bank))
    write(Linear(), bank, tmp_path / "plain", {"z": np.array([1.0, -2.0, 0.5])})
    assert [checked.path.name for checked in verify(tmp_path)] == ["auto", "mixed", "plain"]
    file = sorted((tmp_path / "mixed").glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(BankError, match="is not what the recipe gives, and the checkpoints are unchanged"):
        verify(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("groups", None, "is none that lcsc writes"),
        ("groups", {"names": ["a"], "segments": [["conv_in.bias", 1]]}, "is none that lcsc writes"),
        ("groups", {"names": ["a"], "segments": []}, "do not cover the tensors in order"),
        ("groups", {"names": ["a"], "segments": [["conv_in.weight", 0]]}, "do not cover the tensors in order"),
        ("groups", {"names": ["a"], "segments": [["nowhere", 0]]}, "begins at `nowhere`, which the checkpoints lack"),
        ("coef", [[1.0, 0, 0]], "is none that lcsc writes"),
        ("coef", [1.0, 0, 0, 0], "is none that lcsc writes"),
    ],
)
def test_recipes_of_strangers(bank, tmp_path, key, value, sentence):
    operator = LinearGrouped()
    candidate = operator.apply(bank, random_point(operator, bank))
    recipe = {**candidate.recipe, "parents": [], "bank": dict(bank.config)}
    if key == "groups":
        recipe["coef"] = [[1.0, 0, 0, 0]]
    write_weights(candidate.weights(), candidate.arch, {**recipe, key: value}, tmp_path)
    with pytest.raises(BankError, match=sentence):
        verify(tmp_path)


def test_a_winner_is_exported_scored_again_and_verified(folder, tmp_path):
    bank, operator = CheckpointBank.open(folder), LinearGrouped()
    objective = build(
        "objective",
        "sample_quality",
        model=build("model", "edm"),
        sampler=build("sampler", "euler", num_steps=1),
        metric=build("metric", "fid_pixels"),
        dataset=build("dataset", "digits"),
        device="cpu",
    )
    point = random_point(operator, bank, 0.2)
    score = objective(operator.apply(bank, point), seed=0, purpose=Purpose.REPORT, images=range(70))
    versions = {"lcsc": "0"}
    info = {
        **{"name": "x", "run_id": "r", "metric": objective.name, "nfe": 1, "command": "lcsc search"},
        "fingerprints": {"evaluator": objective.circumstances(), "versions": versions},
        "bank": {"steps": list(bank.steps)},
    }
    best = {"value": score.value, "se": 0.1, "label": "trial 1", "num_images": 70}
    report = {"best": best, "baselines": {}}
    to = tmp_path / "best"
    assert export_model(
        **{"bank": bank, "operator": operator, "objective": objective, "seed": 0, "point": point},
        **{"expected": best, "info": info, "report": report, "to": to},
    ) == pytest.approx(score.value)
    assert [checked.num_parents for checked in verify(to)] == [4]
    recipe = read_recipe(to)
    assert recipe["coef"] == operator.coefficients(bank, point).tolist()
    assert recipe_groups(recipe, bank.layout) == operator.partition(bank).columns
    card = (to / "README.md").read_text()
    assert "| step | `down` | `mid` | `up` | `time` | `rest` |\n|---|---|---|---|---|---|\n| 10 | " in card
    flat = {**recipe, "operator": "linear", "coef": recipe["coef"][0]}
    del flat["groups"]
    assert "| step | coefficient |\n|---|---|\n| 10 | " in model_card(info, flat, report, "")
    assert "copied" not in card
    assert "\n\n1 tensor is copied.\n\n| step |" in model_card(
        info, {**flat, "copied": "1 tensor is copied"}, report, ""
    )
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert model_card(info, {**flat, "arch": None}, report, "").startswith("---\nlibrary_name: pytorch\n")

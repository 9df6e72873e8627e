"""The operator that chooses bits: groups, what a point means, and the bytes that it tells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import build
from lcsc.models.network import build_network, save_network
from lcsc.operators.compress import WIDTHS, Compress
from lcsc.search.evaluate import head_of
from lcsc.search.rows import numbers
from lcsc.searchers.base import Start, Task

ARCH = {
    "class": "LlamaForCausalLM",
    "config": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Six checkpoints of a random walk."""
    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(0)
    net = build_network(ARCH)
    for step in range(10, 70, 10):
        with torch.no_grad():
            for p in net.parameters():
                p += 0.01 * torch.randn_like(p) * p.std()
        save_network(net, folder / f"checkpoint-{step}")
    return CheckpointBank.open(folder)


def test_groups_hold_about_as_many_numbers(bank):
    operator = Compress(num_groups=4)
    groups = operator.groups(bank)
    shapes = bank.layout.shapes
    sizes = [sum(int(np.prod(shapes[name])) for name in group) for group in groups]
    assert len(groups) == 4
    assert max(sizes) < 1.6 * min(sizes)
    assert {name for group in groups for name in group} == {n for n, s in shapes.items() if np.prod(s) >= 1024}


def test_more_bits_are_nearer_and_take_more_bytes(bank):
    operator = Compress(num_groups=4)
    exact = bank.matrix()[-1]
    errors, sizes = [], []
    for baseline in operator.baselines(bank):
        made = operator.apply(bank, baseline.point)
        theta_P = torch.empty(bank.layout.num_parameters)
        made.write(theta_P)
        errors.append(float((theta_P - exact).norm()))
        sizes.append(made.recipe["file_bytes"])
        assert made.recipe["steps"] == [20, 30, 40, 50, 60]
        assert made.recipe["ratio"] == pytest.approx(4 * bank.layout.num_parameters / sizes[-1], rel=1e-3)
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    moved = float((bank.matrix()[-2] - exact).norm())
    assert errors[0] < 0.6 * moved
    assert errors[-1] < 0.01 * moved


def test_a_mean_is_kept_and_what_it_names_is_taken(bank):
    operator = Compress(num_groups=4, mean_bits=4, tau=None, anchor_every=None)
    space = operator.space(bank)
    assert [box.name for box in space.boxes] == ["bits", "tau", "anchor"]
    point = space.to_point(np.array([0.99, 0.0, 0.5, 0.2, 1.5, 0.3]))
    recipe = operator.apply(bank, point).recipe
    assert sum(recipe["bits"]) <= 16
    assert recipe["bits"][0] == 8
    assert (recipe["tau"], recipe["anchor_every"], recipe["steps"]) == (1.5, 3, [40, 50, 60])
    longest = space.to_point(np.array([0.99, 0.0, 0.5, 0.2, 1.5, 0.99]))
    assert operator.apply(bank, longest).recipe["anchor_every"] == 5  # of 10, which six checkpoints are too few for
    named = np.array([1 + (WIDTHS.index(width) + 0.5) / len(WIDTHS) for width in (8, 8, 5, 2)])
    assert operator.apply(bank, {**point, "bits": named}).recipe["bits"] == [8, 8, 5, 2]
    assert [b.label for b in operator.baselines(bank)] == [f"{n} bits everywhere" for n in (2, 3, 4)]
    plan = Compress(num_groups=4, mean_bits=3).plan(bank)
    assert plan.recipe["bits"] == [3, 3, 3, 3]


def test_the_same_point_gives_the_same_bits(bank):
    operator = Compress(num_groups=4)
    point = operator.baselines(bank)[2].point
    one, two = operator.apply(bank, point), operator.apply(bank, point)
    assert one.recipe == two.recipe
    assert "encode_seconds" not in one.recipe  # no two machines take the same
    assert 0 < one.measured["encode_seconds"] < 60
    assert head_of(one) == {
        "bits": one.recipe["bits"],
        "tau": 0.0,
        "anchor_every": 5,
        "file_bytes": one.recipe["file_bytes"],
        "encode_seconds": one.measured["encode_seconds"],
    }
    assert all(torch.equal(a, b) for a, b in zip(one.weights().values(), two.weights().values(), strict=True))


def test_bytes_loss_and_seconds_are_one_front(bank):
    operator, exact = Compress(num_groups=4, tau=None, anchor_every=None), bank.matrix()[-1]
    space = operator.space(bank)

    def scored(vector):
        made, theta_P = operator.apply(bank, space.to_point(vector)), torch.empty(bank.layout.num_parameters)
        made.write(theta_P)
        return float((theta_P - exact).norm()), numbers(head_of(made))

    starts = []
    for baseline in operator.baselines(bank):
        vector = space.to_vector(baseline.point)
        value, told = scored(vector)
        starts.append(Start(vector, value, "uniform", baseline.label, told))
    searcher = build("searcher", "pareto", second="file_bytes", third="encode_seconds")
    session = searcher.start(Task(space, 12, 0, tuple(starts)))
    assert session.weighed == ("file_bytes", "encode_seconds")
    seen = []
    for _ in range(12):
        proposal = session.ask()
        value, told = scored(proposal.vector)
        session.weigh(proposal.uid, (told["file_bytes"], told["encode_seconds"]))
        session.tell(proposal.uid, value)
        seen.append((value, told["file_bytes"], told["encode_seconds"]))
    named = session.finalists(12)
    assert all(", file_bytes " in label and ", encode_seconds " in label for label, _ in named)
    quickest = min(range(12), key=lambda uid: seen[uid][2])
    assert any(label.startswith(f"trial {quickest},") for label, _ in named)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_groups": 0}, "`operator.num_groups` is 0"),
        ({"mean_bits": 9}, "`operator.mean_bits` is 9"),
        ({"anchor_every": 1}, "`operator.anchor_every` is 1; it must be at least 2"),
        ({"tau": 3.0}, "`operator.tau` is 3.0"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Compress(**settings)


def test_a_chain_needs_checkpoints_before(bank):
    with pytest.raises(
        BankError, match="has 1 checkpoints before it, and a chain of `operator.anchor_every` 5 needs 4"
    ):
        Compress(step=20).plan(bank)

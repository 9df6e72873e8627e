"""Weights that a network writes: tokens, permutations, identity at the start, sampling, training that goes on."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lcsc.core.errors import BankError, ConfigError
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.digits import Digits
from lcsc.models.many_classifiers import Many
from lcsc.models.parameter_dit import ParameterDiT
from lcsc.models.parameter_sampling import alphas_bar, propose, updated
from lcsc.models.parameter_tokens import cut_tokens
from lcsc.models.weight_runs import read_runs
from lcsc.recycling.neurons import aligning, hidden_layers, matched_distances, shuffled, undone
from lcsc.training.parameter_dit import ParameterDiTTrainer
from lcsc.training.weight_fit import FitSettings, Pairs, fit_generator, new_generator, noised
from lcsc.training.weight_runs import RunSettings, make_runs, parts_of

ARCH = {"class": "SmallClassifier", "config": {"hidden": [6]}}
DEEP = {"class": "SmallClassifier", "config": {"hidden": [6, 5]}}
SIZES = {"chunk": 17, "width": 8, "num_layers": 1, "num_heads": 2, "freqs": 4, "max_log2": 3.0}
RUNS = RunSettings(10, 2, 12, 5, "log", 0.5, 8, "own")
FIT = FitSettings(6, 4, 1e-3, 0.0, 2, 0.75, 0.999, permute=False)


@pytest.fixture(scope="module")
def many():
    return Many(ARCH)


@pytest.fixture(scope="module")
def parts(many):
    return parts_of(Digits(), many)


@pytest.fixture(scope="module")
def runs(many, parts):
    return make_runs(RUNS, many, parts, 0)


def generator(runs, **changes):
    return new_generator(runs, {"tokens": "chunks", **SIZES, **changes}, "loss", False, SeedRange(0, Purpose.TRAIN))


@pytest.mark.parametrize("arch", [ARCH, DEEP], ids=["one", "two"])
def test_a_permutation_of_hidden_units_keeps_the_function_and_is_undone(arch):
    many = Many(arch)
    x_NF = torch.rand(20, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    theta_MP, layers = many.drawn(3, [1, 2, 3]), hidden_layers(many.layout.shapes)
    places_MP = torch.from_numpy(shuffled(layers, 3, theta_MP.shape[1], np.random.default_rng(0)))
    mixed_MP = theta_MP.gather(1, places_MP)
    assert not torch.equal(mixed_MP, theta_MP)
    torch.testing.assert_close(many.logits(mixed_MP, x_NF), many.logits(theta_MP, x_NF), atol=1e-6, rtol=0)
    assert torch.equal(mixed_MP.gather(1, torch.from_numpy(undone(places_MP.numpy()))), theta_MP)
    # matching finds the way back, so the distance is none
    back_MP = np.take_along_axis(mixed_MP.numpy(), aligning(layers, mixed_MP.numpy(), theta_MP[0].numpy()), 1)
    assert np.array_equal(back_MP[0], theta_MP[0].numpy())
    assert matched_distances(layers, theta_MP[0].numpy(), mixed_MP.numpy())[0] == 0


def test_what_is_no_chain_of_linear_layers_has_no_hidden_units():
    assert hidden_layers({"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 5)}) == ()
    assert hidden_layers({"a.weight": (4, 3), "b.weight": (2, 4), "norm": (4,)}) == ()
    ten = {f"layers.{i}.weight": (4, 4) for i in range(11)}
    assert len(hidden_layers(dict(sorted(ten.items())))) == 10


@pytest.mark.parametrize("kind", ["chunks", "neurons"])
def test_tokens_hold_every_number_once(many, kind):
    tokens = cut_tokens(many.layout.shapes, kind, 17)
    theta_NP = torch.randn(2, tokens.size)
    assert torch.equal(tokens.joined(tokens.cut(theta_NP)), theta_NP)
    places = tokens.places_TC[tokens.places_TC < tokens.size]
    assert sorted(places.tolist()) == list(range(tokens.size))
    # 6 units with 16 + 1 + 10 numbers and the 10 biases; or 6 rows, their biases, 5 pairs of... whole rows of 6
    assert len(tokens.kinds_T) == (7 if kind == "neurons" else 6 + 1 + 5 + 1)


def test_neurons_as_tokens_need_one_hidden_layer():
    with pytest.raises(ConfigError, match="2 hidden layers"):
        cut_tokens(Many(DEEP).layout.shapes, "neurons", 17)


@pytest.mark.parametrize("kind", ["chunks", "neurons"])
def test_an_untrained_generator_returns_where_it_starts(runs, kind):
    net = generator(runs, tokens=kind)
    theta_NP = runs.theta_RKP[:3, 0]
    out_NP = net(torch.randn(theta_NP.shape), torch.full((3,), 7), torch.ones(3), torch.ones(3), theta_NP)
    assert torch.equal(out_NP, theta_NP)
    assert net.num_tokens == 2 * len(cut_tokens(runs.shapes, kind, 17).kinds_T) + 4
    proposed_NP = propose(net, theta_NP, torch.ones(3), torch.ones(3), torch.randn(theta_NP.shape), 3)
    torch.testing.assert_close(proposed_NP, theta_NP, atol=1e-6, rtol=0)


class Oracle(ParameterDiT):
    """Knows the answer."""

    def forward(self, x_NP, t_N, goal_N, now_N, theta_NP):
        return self.answer_NP


def test_ddim_with_an_oracle_returns_the_answer(runs):
    net = Oracle({name: list(shape) for name, shape in runs.shapes.items()}, **SIZES)
    net.answer_NP = runs.theta_RKP[:2, -1].double()
    start_NP, noise_NP = runs.theta_RKP[:2, 0].double(), torch.randn(2, net.reference.numel(), dtype=torch.float64)
    out_NP = propose(net, start_NP, torch.ones(2), torch.ones(2), noise_NP, 7)
    torch.testing.assert_close(out_NP, net.answer_NP, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", [{"tokens": "neurons"}, {"align": True}], ids=["neurons", "aligned"])
def test_the_order_of_hidden_units_is_no_matter(runs, many, changes):
    """Trained or not: a start in another order of its units gives the same network in that order."""
    torch.manual_seed(0)
    net = ParameterDiT({name: list(s) for name, s in runs.shapes.items()}, **SIZES, **changes).double()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    net.reference.copy_(runs.theta_RKP[0, -1])
    theta_1P, noise_1P = runs.theta_RKP[3:4, 0].double(), torch.randn(1, net.reference.numel(), dtype=torch.float64)
    layers = hidden_layers(runs.shapes)
    places_1P = torch.from_numpy(shuffled(layers, 1, theta_1P.shape[1], np.random.default_rng(5)))
    mixed_noise_1P = noise_1P.gather(1, places_1P) if "tokens" in changes else noise_1P
    now = torch.ones(1, dtype=torch.float64)
    plain_1P = propose(net, theta_1P, now, 0.5 * now, noise_1P, 3)
    mixed_1P = propose(net, theta_1P.gather(1, places_1P), now, 0.5 * now, mixed_noise_1P, 3)
    torch.testing.assert_close(mixed_1P, plain_1P.gather(1, places_1P), atol=1e-10, rtol=0)
    assert (plain_1P - theta_1P).abs().max() > 1e-3


def test_noise_has_the_variance_of_the_schedule():
    assert float(1 - alphas_bar()[0]) == pytest.approx(1e-4, rel=1e-12)
    zeros, noise = torch.zeros(2, 50_000), torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    x = noised(zeros, noise, torch.tensor([0, 999]))
    assert float(x[0].var()) == pytest.approx(1e-4, rel=0.03)
    assert float(x[1].var()) == pytest.approx(1, rel=0.03)


def test_recursive_updates_are_told_what_was_asked_for_or_what_was_measured(runs):
    net, told = generator(runs), []
    real = net.forward
    net.forward = lambda x, t, goal, now, theta: (told.append(float(now[0])), real(x, t, goal, now, theta))[1]
    theta_1P, goals = runs.theta_RKP[:1, 0], [torch.tensor([2.0]), torch.tensor([1.0])]
    noise = np.zeros((2, 1, theta_1P.shape[1]), np.float32)
    updated(net, theta_1P, torch.tensor([3.0]), goals, noise, 1)
    updated(net, theta_1P, torch.tensor([3.0]), goals, noise, 1, measure=lambda theta_NP: torch.tensor([2.5]))
    assert told == [3.0, 2.0, 3.0, 2.5]


def test_pairs_are_of_one_run_and_the_target_is_not_earlier(runs):
    net = generator(runs)
    drawn = Pairs(runs, net, FIT, SeedRange(0, Purpose.TRAIN)).draw(3)
    flat, metric = runs.theta_RKP * net.scale, runs.metric("loss")
    for theta_P, target_P, now, goal in zip(
        drawn["theta"], drawn["target"], drawn["now"], drawn["goal"], strict=True
    ):  # fmt: skip
        (run, early), (same, late) = ((flat == row_P).all(-1).nonzero()[0].tolist() for row_P in (theta_P, target_P))
        assert run == same
        assert early <= late
        assert (metric[run, early], metric[run, late]) == (now, goal)


@pytest.mark.parametrize("rising", [False, True])
def test_pairs_that_are_drawn_as_prompts_are_spread_evenly_over_the_metric(runs, rising):
    """Of 41 checkpoints the first 31 hardly differ in their metric."""
    falls_K = torch.cat([torch.linspace(2.0, 1.9, 31), torch.linspace(1.8, 0.9, 10)])
    metric_RK = (-falls_K if rising else falls_K).expand(10, -1)
    theta_RKP = torch.arange(410.0).reshape(10, 41, 1).expand(-1, -1, runs.theta_RKP.shape[2]).clone()
    many = replace(runs, theta_RKP=theta_RKP, metrics={"loss": metric_RK})
    net = generator(many)
    net.rising, net.scale = rising, 1.0
    # shares of pairs that start at the first checkpoint, and of those that hardly go anywhere: with spacings the sums
    # of 1 / (41 - spacing) over their spacings; as prompts from 2.0 half-way to 1.8, of the way to 0.9
    for pairs, firsts, near in (("spacing", 0.105, 0.319), ("prompts", 0.512, 0.15 / 1.1)):
        settings = replace(FIT, batch_size=8000, pairs=pairs)
        drawn = Pairs(many, net, settings, SeedRange(0, Purpose.TRAIN)).draw(1)
        early, late = (drawn[name][:, 0].long() for name in ("theta", "target"))
        assert torch.equal(early // 41, late // 41)
        assert (early <= late).all()
        first = early % 41 == 0
        assert first.float().mean().item() == pytest.approx(firsts, abs=0.02)
        assert (drawn["goal"].abs()[first] >= 1.9).float().mean().item() == pytest.approx(near, abs=0.04)


def test_saves_are_spaced_in_the_logarithm_and_start_at_the_beginning(runs):
    assert RUNS.steps().tolist() == [0, 1, 2, 5, 12]
    assert RunSettings(10, 2, 12, 4, "uniform", 0.5, 8, "own").steps().tolist() == [0, 4, 8, 12]
    assert float(runs.metric("loss")[:, -1].mean()) < float(runs.metric("loss")[:, 0].mean()) - 0.05


def test_the_average_follows_the_network_from_the_start(runs):
    """A rate of 0.999 from the first step on would keep the untrained network."""
    net = generator(runs)
    average = fit_generator(net, runs, FIT, SeedRange(0, Purpose.TRAIN), progress=False)
    assert not torch.equal(average.decode, torch.zeros_like(average.decode))
    moved = (average.decode - net.decode).norm() / net.decode.norm()
    assert moved.item() < 0.7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"saves": "linear"}, "`trainer.saves` is `linear`"),
        ({"init": "same"}, "`trainer.init` is `same`"),
        ({"num_held_out": 300}, "`trainer.num_held_out` is 300 of 300 runs"),
        ({"num_saves": 2}, "at least 3"),
        ({"metric": "return"}, "`trainer.metric` is `return`"),
        ({"tokens": "rows"}, "`tokens` is `rows`"),
        ({"pairs": "even"}, "`trainer.pairs` is `even`"),
        ({"width": 10, "num_heads": 4}, "no multiple"),
        ({"ema": 1.0}, r"\[0, 1\)"),
        ({"learning_rate": 0.0}, "above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ParameterDiTTrainer(**settings)


def test_runs_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    told = {f"run-{i}": {"loss": [2.0, 1.0]} for i in (0, 1)}
    for name in told:
        (tmp_path / "runs" / name).mkdir(parents=True)
        for step in (1, 2):
            save_file({"a": torch.ones(3)}, tmp_path / "runs" / name / f"model-{step}.safetensors")
    (tmp_path / "runs" / "metrics.json").write_text(json.dumps(told))
    for settings, said in (
        ({}, "holds networks of the tensors {'a': (3,)}, and `network` makes a `SmallClassifier`"),
        ({"num_held_out": 2}, "`trainer.num_held_out` is 2 of 2 runs"),
        ({"metric": "return"}, "the runs have no metric `return`"),
    ):
        trainer = ParameterDiTTrainer(**{"runs": str(tmp_path / "runs"), "num_held_out": 1, **settings})
        with pytest.raises(ConfigError, match=re.escape(said)):
            trainer.train(arch=ARCH, model=None, dataset=Digits(), out=tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_without_metrics_is_refused(tmp_path):
    with pytest.raises(BankError, match="cannot be read"):
        read_runs(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"run-0": {"loss": [1.0]}}))
    with pytest.raises(BankError, match="none of the 1 runs"):
        read_runs(tmp_path)
    (tmp_path / "run-0").mkdir()
    for step in (1, 2):
        save_file({"a": torch.ones(3)}, tmp_path / "run-0" / f"model-{step}.safetensors")
    for told, said in (
        ([], "cannot be read"),
        ({"run-0": [1.0, 2.0]}, "a run has no metrics"),
        ({"run-0": {"loss": [1.0]}}, "does not hold 2 finite numbers of `loss`"),
        ({"run-0": {"loss": [1.0, "low"]}}, "does not hold 2 finite numbers of `loss`"),
        ({"run-0": {"loss": 1.0}}, "does not hold 2 finite numbers of `loss`"),
    ):
        (tmp_path / "metrics.json").write_text(json.dumps(told))
        with pytest.raises(BankError, match=said):
            read_runs(tmp_path)

"""The engine computes what lcsc/reference.py says."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from lcsc import reference
from lcsc.bank import CheckpointBank
from lcsc.core.registry import build
from lcsc.kernels import combine
from lcsc.operators import profiles
from lcsc.operators.linear import Linear, whitened_axes


def test_reference_is_short_and_stands_alone():
    path = Path(reference.__file__)
    assert len(path.read_text().splitlines()) <= 120
    imported = {node.names[0].name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)}
    assert imported == {"numpy"}


def test_combine_and_profiles():
    rng = np.random.default_rng(0)
    W_KP, coef_K = rng.standard_normal((6, 50)).astype(np.float32), rng.standard_normal(6)
    engine = combine(torch.from_numpy(coef_K), torch.from_numpy(W_KP)).numpy()
    np.testing.assert_allclose(engine, reference.combine(coef_K, W_KP), atol=1e-5)
    np.testing.assert_allclose(profiles.ema([5, 10, 40], 7.0), reference.ema([5, 10, 40], 7.0), rtol=1e-12)


def test_axes_span_the_same_moves(tiny_bank):
    bank = CheckpointBank.open(tiny_bank)
    W_KP = bank.matrix().double().numpy()
    engine, plain = whitened_axes(bank, 0.5).axes_KZ, reference.whitened_axes(W_KP)
    # equal up to order and sign of the axes, so compare what does not depend on either
    np.testing.assert_allclose(engine @ engine.T, plain @ plain.T, rtol=1e-4, atol=1e-7)
    coef_K = Linear().coefficients(bank, {"z": np.ones(4)})
    np.testing.assert_allclose(reference.sum_to_one(coef_K), coef_K, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 5, 18])
def test_euler_and_schedule(num_steps):
    noise = np.random.default_rng(1).standard_normal((3, 1, 2, 2))

    def denoise(x, sigma, labels=None):
        return 0.3 + 0.04 / (0.04 + sigma**2) * (x - 0.3)

    engine = build("sampler", "euler", num_steps=num_steps)(denoise, torch.from_numpy(noise), None)
    np.testing.assert_allclose(engine.numpy(), reference.euler(denoise, noise, num_steps), atol=1e-6)


def test_frechet():
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((5, 5))
    a_ND, b_ND = rng.standard_normal((400, 5)), 0.3 + rng.standard_normal((300, 5)) @ mixing
    metric = build("metric", "fid_pixels")
    state_a, state_b = (metric.update(metric.zeros(), torch.from_numpy(x)) for x in (a_ND, b_ND))
    engine = metric.compute(state_a, metric.reference(state_b))
    assert engine == pytest.approx(reference.frechet(a_ND, b_ND), rel=1e-8)


def test_the_reference_search_beats_every_average_on_its_toy():
    W_KP, score, steps = reference.toy()
    best_ema = min((reference.ema(steps, h) for h in (5, 10, 25, 50, 100)), key=lambda coef_K: score(coef_K, 0))
    found = reference.search(W_KP, score, best_ema, 600, np.random.default_rng(0))
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert score(found, 2) < 0.5 * score(best_ema, 2)
    assert score(found, 2) < 0.5 * score(np.eye(12)[-1], 2)

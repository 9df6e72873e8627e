"""Derivatives of the metrics against differences of their own values, and of Fréchet against torch's autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc.core.registry import build


def setting(name, N, D=6, seed=0):
    rng = np.random.default_rng(seed)
    real_MD = torch.from_numpy(rng.normal(size=(80, D)) @ rng.normal(size=(D, D)) + 1)
    made_ND = torch.from_numpy(rng.normal(size=(N, D)) @ rng.normal(size=(D, D)))
    metric = build("metric", name)
    return metric, metric.reference(metric.update(metric.zeros(), real_MD)), made_ND


@pytest.mark.parametrize("name", ["fid_pixels", "kid_pixels"])
def test_against_central_differences(name):
    metric, reference, made_ND = setting(name, 30)

    def value(features_ND):
        return metric.compute(metric.update(metric.zeros(), features_ND), reference)

    grad_ND = metric.gradient(metric.update(metric.zeros(), made_ND), reference)(made_ND)
    assert grad_ND.dtype == torch.float64
    for i, d in [(0, 0), (7, 3), (29, 5)]:
        step = torch.zeros_like(made_ND)
        step[i, d] = 1e-5
        wanted = (value(made_ND + step) - value(made_ND - step)) / 2e-5
        assert float(grad_ND[i, d]) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_frechet_against_autograd_through_the_symmetric_root():
    metric, reference, made_ND = setting("fid_pixels", 40)
    x_ND = made_ND.clone().requires_grad_()
    cov_DD, root_DD = torch.cov(x_ND.T), reference.root_DD
    values_D = torch.linalg.eigvalsh(root_DD.T @ cov_DD @ root_DD)
    gap = (x_ND.mean(0) - reference.mean_D).square().sum()
    (gap + reference.trace + cov_DD.trace() - 2 * values_D.sqrt().sum()).backward()
    found_ND = metric.gradient(metric.update(metric.zeros(), made_ND), reference)(made_ND)
    torch.testing.assert_close(found_ND, x_ND.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["fid_pixels", "kid_pixels"])
def test_images_in_batches_give_the_same_derivative(name):
    metric, reference, made_ND = setting(name, 30)
    state = metric.merge(metric.update(metric.zeros(), made_ND[:11]), metric.update(metric.zeros(), made_ND[11:]))
    at = metric.gradient(state, reference)
    torch.testing.assert_close(torch.cat([at(made_ND[:11]), at(made_ND[11:])]), at(made_ND), rtol=1e-10, atol=1e-13)


def test_fewer_images_than_features_stay_finite():
    metric, reference, made_ND = setting("fid_pixels", 4)
    grad_ND = metric.gradient(metric.update(metric.zeros(), made_ND), reference)(made_ND)
    assert torch.isfinite(grad_ND).all()
    down_ND = made_ND - 1e-3 * grad_ND
    before, after = (metric.compute(metric.update(metric.zeros(), x), reference) for x in (made_ND, down_ND))
    assert after < before

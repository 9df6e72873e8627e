"""The objective `classification`: its numbers, its parts of the images, its derivative."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc.bank.layout import Layout
from lcsc.core.errors import ConfigError
from lcsc.core.seeds import Purpose
from lcsc.datasets.digits import Digits
from lcsc.datasets.gaussian import Gaussian
from lcsc.datasets.split import split_three
from lcsc.models.small_classifier import SmallClassifier
from lcsc.objectives.classification import Classification
from lcsc.operators.base import Candidate


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SmallClassifier(hidden=[4])


@pytest.fixture(scope="module")
def candidate(net):
    layout = Layout.of({name: tensor.shape for name, tensor in net.state_dict().items()})
    arch = {"class": "SmallClassifier", "config": net.settings}
    return Candidate(arch, layout, lambda out_P: layout.flatten(net.state_dict(), out_P), {})


def test_the_three_parts_are_all_images_once_and_hold_every_class_alike():
    labels_N = Digits().labels().numpy()
    parts = split_three(len(labels_N), 0, labels_N)
    assert [len(part) for part in parts] == [898, 449, 450]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    counts = np.stack([np.bincount(labels_N[part]) for part in parts])
    assert (np.abs(counts[1] - counts[2]) <= 1).all()
    with pytest.raises(ConfigError, match="at least 4"):
        split_three(3, 0)


@pytest.mark.parametrize("purpose", [Purpose.SEARCH, Purpose.REPORT])
def test_loss_and_error_are_those_of_the_images_of_the_part(net, candidate, purpose):
    data, scorer = Digits(), Classification(Digits(), batch_size=100, device="cpu")
    labels_N = data.labels()
    rows = torch.from_numpy(split_three(1797, 0, labels_N.numpy())[1 + (purpose is Purpose.REPORT)])
    with torch.no_grad():
        logits_NC = net(data.images()[rows]).logits
    score = scorer(candidate, seed=0, purpose=purpose, images=range(len(rows)), full=True)
    loss = torch.nn.functional.cross_entropy(logits_NC.double(), labels_N[rows])
    wrong = (logits_NC.argmax(1) != labels_N[rows]).double()
    assert score.value == pytest.approx(loss.item(), abs=1e-6)
    assert score.others["classification_error"]["value"] == pytest.approx(wrong.mean().item(), abs=1e-12)
    assert score.others["classification_error"]["se"] == pytest.approx(wrong.std().item() / len(rows) ** 0.5, abs=1e-9)
    other = Classification(Digits(), score="error", device="cpu")
    assert other(candidate, seed=0, purpose=purpose, images=range(len(rows))).value == pytest.approx(
        wrong.mean().item()
    )
    assert other.name == "classification_error"
    assert other.no_gradient is not None


def test_the_derivative_is_autograd_s(net, candidate):
    scorer = Classification(Digits(), device="cpu")
    slope = scorer.slope(candidate, seed=0, purpose=Purpose.SEARCH, images=range(449))
    data = Digits()
    rows = torch.from_numpy(scorer.half(Purpose.SEARCH))
    loss = torch.nn.functional.cross_entropy(net(data.images()[rows]).logits, data.labels()[rows])
    grads = torch.autograd.grad(loss, list(net.parameters()))
    named = dict(zip(dict(net.named_parameters()), grads, strict=True))
    torch.testing.assert_close(slope.grad_P, candidate.layout.flatten(named), atol=1e-6, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="no labels"):
        Classification(Gaussian())
    with pytest.raises(ConfigError, match="`objective.score` is `accuracy`"):
        Classification(Digits(), score="accuracy")
    with pytest.raises(ConfigError, match="batch_size"):
        Classification(Digits(), batch_size=0)

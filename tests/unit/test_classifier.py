"""The detector `classifier`: its file, its refusals, its derivative, and the script that trains it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from helpers_cli import load_script
from sklearn.datasets import load_digits

from lcsc.core.digests import file_sha256
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.datasets.digits import Digits
from lcsc.metrics import classifier
from lcsc.metrics.classifier import (
    HEADER_KEY,
    ClassifierArch,
    ClassifierNet,
    load_classifier,
    pack_classifier,
)

ARCH = ClassifierArch((1, 8, 8), (4, 6), 5, 3)
SMALL = ["num_steps=80", "batch_size=64", "learning_rate=0.01", "widths=8,16", "num_features=16", "shift=0"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("train_detector")


@pytest.fixture(scope="module")
def trained(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of scikit-learn's digits, made by the script's command line."""
    path = tmp_path_factory.mktemp("detector") / "digits.safetensors"
    deterministic = torch.are_deterministic_algorithms_enabled()
    assert script.main(["dataset=digits", *SMALL, f"to={path}"]) == 0
    torch.use_deterministic_algorithms(deterministic)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An untrained classifier whose batch statistics are not the initial ones."""
    torch.manual_seed(0)
    net = ClassifierNet(ARCH).train()
    net(torch.randn(16, *ARCH.image_shape))
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack_classifier(net, ARCH, {"script": "none"}))
    return path


# --- the file ---------------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_network_and_its_digest(weights: Path) -> None:
    torch.manual_seed(0)
    net = ClassifierNet(ARCH).train()
    net(torch.randn(16, *ARCH.image_shape))
    images = torch.rand(7, 1, 8, 8) * 2 - 1
    detector = build("detector", "classifier", weights_path=str(weights))
    assert torch.equal(detector.features(images), net.eval().features(images))
    assert detector.features(images).shape == (7, detector.num_features) == (7, 5)
    assert detector.digest == file_sha256(weights)
    loaded = load_classifier(str(weights), detector.digest[:8])
    assert (loaded.arch, loaded.made) == (ARCH, {"script": "none"})
    assert not loaded.net.training


def test_features_are_the_layer_before_the_last_and_do_not_depend_on_the_batch(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "CHUNK", 4)
    detector, net = build("detector", "classifier", weights_path=str(weights)), load_classifier(str(weights)).net
    images = torch.rand(7, 1, 8, 8) * 3 - 1.5
    features = detector.features(images)
    torch.testing.assert_close(net.out(features), net(images.clamp(-1, 1)))
    torch.testing.assert_close(features[-3:], detector.features(images[-3:]))
    assert float(features.min()) == 0.0


def test_features_have_the_derivative_of_finite_differences(weights: Path) -> None:
    net = load_classifier(str(weights)).net.double()
    torch.manual_seed(3)
    images, along = torch.rand(4, 1, 8, 8).double() - 0.5, torch.randn(4, 1, 8, 8).double()
    weight, step = torch.randn(4, 5).double(), 1e-7  # small: the rectifiers have kinks
    images.requires_grad_()
    (net.features(images) * weight).sum().backward()
    with torch.no_grad():
        ends = [(net.features(images + sign * step * along) * weight).sum() for sign in (1, -1)]
    assert float((images.grad * along).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-5)
    detector, single = build("detector", "classifier", weights_path=str(weights)), torch.zeros(2, 1, 8, 8)
    detector.features(single.requires_grad_()).sum().backward()
    assert single.grad is not None
    assert float(single.grad.abs().sum()) > 0


@pytest.mark.parametrize("family", ["fid", "kid"])
def test_metrics_say_which_detector_they_rest_on(family: str, weights: Path) -> None:
    metric = build("metric", f"{family}_classifier", weights_path=str(weights))
    assert metric.name == f"{family}_classifier"
    assert metric.load_detector().digest == file_sha256(weights)
    state = metric.update(metric.zeros(), metric.load_detector().features(torch.rand(9, 1, 8, 8)))
    assert np.isfinite(metric.compute(state, metric.reference(state)))


# --- refusals ---------------------------------------------------------------------------------------------------


def test_without_a_file_it_says_how_to_make_one() -> None:
    for path, start in (
        (None, "`metric.weights_path` is not set"),
        ("/no/w", "`metric.weights_path` is `/no/w`, which"),
    ):
        with pytest.raises(ConfigError, match=r"python scripts/train_detector\.py dataset=\.\.\. to=FILE") as caught:
            _ = build("metric", "fid_classifier", weights_path=path).load_detector().digest
        assert str(caught.value).startswith(start)


def test_another_digest_is_refused(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"with SHA-256 [0-9a-f]{64}, which does not start with 00000000"):
        load_classifier(str(weights), "00000000")
    with pytest.raises(ConfigError, match="`metric.weights_digest` is `abc`; give at least the first 8 hex digits"):
        load_classifier(str(weights), "abc")


def header(weights: Path) -> dict:
    with safetensors.safe_open(weights, "pt") as file:
        return json.loads(file.metadata()[HEADER_KEY])


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ({"num_features": 6}, "size mismatch"),
        ({"widths": [4, 6, 8]}, "Missing key"),
        ({"widths": [4, 10**9]}, "all sizes are whole numbers in"),
        ({"image_shape": [1, 8]}, "cannot be built"),
        ({"widths": [4] * 9}, "cannot be halved 8 times"),
        ({"num_classes": "many"}, "all sizes are whole numbers in"),
        ({"num_classes": None}, "all sizes are whole numbers in"),
    ],
)
def test_headers_that_do_not_fit_the_tensors(weights: Path, arch: dict, message: str) -> None:
    tensors, head = safetensors.torch.load_file(weights), header(weights)
    head["arch"] |= arch
    safetensors.torch.save_file(tensors, weights, {HEADER_KEY: json.dumps(head)})
    with pytest.raises(ConfigError, match=message):
        load_classifier(str(weights))


def test_files_that_hold_no_classifier(tmp_path: Path, weights: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    for contents in (other.read_bytes(), b"", b"no safetensors at all", weights.read_bytes()[:-8]):
        other.write_bytes(contents)
        with pytest.raises(ConfigError, match="`metric.weights_path` is .*, which holds no classifier of lcsc"):
            load_classifier(str(other))


def test_other_shapes_and_broken_pixels_are_refused(weights: Path) -> None:
    detector = build("detector", "classifier", weights_path=str(weights))
    with pytest.raises(EvaluationError, match=r"`classifier` wants images of shape \(N, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        detector.features(torch.zeros(2, 3, 8, 8))
    broken = torch.zeros(2, 1, 8, 8)
    broken[0, 0, 1, 1] = torch.inf  # clamping would have hidden it
    with pytest.raises(EvaluationError, match=r"^1 of 128 pixels are NaN or Inf"):
        detector.features(broken)


# --- the script -------------------------------------------------------------------------------------------------


def test_the_script_learns_the_digits_and_says_how_well(trained: Path, script: ModuleType) -> None:
    data, made = Digits(), header(trained)["made"]
    rows, held = script.held_out_rows(data.labels(), 0.1, 0)
    loaded = load_classifier(str(trained))
    right = loaded.net(data.images()[held]).argmax(1) == data.labels()[held]
    assert made["held_out_accuracy"] == round(float(right.double().mean()), 4)
    assert made["num_held_out"] == len(held)
    assert made["held_out_accuracy"] > 0.9
    assert float(loaded.net.features(data.images()[rows]).double().square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert (made["training"]["widths"], made["dataset"]["num_images"]) == ([8, 16], 1797)


def test_same_words_same_file(script: ModuleType) -> None:
    small = {"num_steps": 3, "widths": (4,), "num_features": 3}
    first, again, other = (script.make(Digits(), script.Training(seed=s, **small))[0] for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_rows_are_held_out_of_every_class_alike(script: ModuleType) -> None:
    labels = Digits().labels()
    rows, held = script.held_out_rows(labels, 0.25, 5)
    assert sorted([*rows.tolist(), *held.tolist()]) == list(range(1797))
    target = load_digits().target
    np.testing.assert_array_equal(np.bincount(target[held]), np.ceil(0.25 * np.bincount(target)))
    assert not torch.equal(held, script.held_out_rows(labels, 0.25, 6)[1])


def test_scaling_the_features_leaves_the_logits(script: ModuleType) -> None:
    torch.manual_seed(1)
    net, images = ClassifierNet(ARCH).eval().requires_grad_(False), torch.rand(20, 1, 8, 8)
    before = net(images)
    script.normalise(net, images)
    assert float(net.features(images).square().mean()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(net(images), before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=digits"], "`to` is not set. Give it as to=..."),
        (["dataset=gaussian", "to=w"], "dataset `gaussian` has no labels, and a classifier needs them."),
        (["dataset=digits", "to=w", "step=3"], "no setting named `step`."),
        (["dataset=digits", "to=w", "num_steps=many"], "`num_steps` is `many`; give a whole number."),
        (["dataset=digits", "to=w", "widths=8;16"], "`widths` is `8;16`; give whole numbers with commas."),
        (["dataset=digits", "to=w", "flip=maybe"], "`flip` is `maybe`; give true or false."),
        (["dataset=digits", "to=w", "held_out=1"], "`held_out`, `shift`, `noise` are 1.0, 2, 0.1;"),
        (["dataset=digits", "to=w", "widths=4,4,4,4,4"], "images of (8, 8) pixels cannot be halved 4 times"),
        (["dataset=digit", "to=w"], "no dataset named `digit`. Did you mean `digits`?"),
    ],
)
def test_mistakes_are_one_sentence(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.torch, "use_deterministic_algorithms", lambda mode: None)
    assert script.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"train_detector: {message}")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(script: ModuleType, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["dataset=digits", f"to={trained}"]) == 2
    assert "exists already. Nothing is overwritten" in capsys.readouterr().err

"""Detectors: shipped weights, input conventions, and what is said when something is missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import torch
from helpers_cli import load_script
from torchmetrics.image import fid
from torchmetrics.image.fid import NoTrainInceptionV3

from lcsc.core.digests import file_sha256
from lcsc.core.errors import ConfigError, EvaluationError, MissingExtraError, UnknownPart
from lcsc.core.registry import build, discover
from lcsc.metrics import inception
from lcsc.metrics.digits import WEIGHTS_PATH, WEIGHTS_SHA256, load_digits_net

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_digits_detector")


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, str]:
    """Path and digest of a file of tensors that stands for the Inception weights."""
    path = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    return str(path), file_sha256(path)


class FakeInception(torch.nn.Module):
    """Stands for torchmetrics' network: keeps what it was made with and what it was shown."""

    seen: dict[str, Any] = {}

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        self.seen.update(name=name, features_list=features_list, path=feature_extractor_weights_path)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        self.seen["images"] = images_NCHW
        return images_NCHW.double().flatten(1).mean(1, keepdim=True).expand(-1, 2048)


def test_all_are_registered() -> None:
    assert {"digits", "inception", "pixels"} <= set(discover("detector"))
    assert {"fid", "fid_digits", "fid_pixels", "kid", "kid_digits", "kid_pixels"} <= set(discover("metric"))


def test_digits_classifies_held_out_digits(script: ModuleType) -> None:
    train_images, _, images, labels = script.digits_split(torch.Generator().manual_seed(script.SEED))
    net = load_digits_net()
    assert (len(train_images), len(images)) == (1400, 397)
    assert script.accuracy(net, images, labels) >= 0.98
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert sum(parameter.numel() for parameter in net.parameters()) == 22_954


def test_digits_weights_are_the_ones_announced(script: ModuleType) -> None:
    assert file_sha256(WEIGHTS_PATH) == WEIGHTS_SHA256 == build("detector", "digits").digest
    assert WEIGHTS_PATH.stat().st_size < 100_000
    with safetensors.safe_open(WEIGHTS_PATH, "pt") as file:
        made = json.loads(file.metadata()["made"])
    assert (ROOT / made["script"]).samefile(script.__file__)
    assert made["test_accuracy"] >= 0.98
    assert made["sklearn"]
    assert made["torch"]


def test_digits_altered_or_absent_weights_are_refused(tmp_path: Path) -> None:
    altered = bytearray(WEIGHTS_PATH.read_bytes())
    altered[-1] ^= 1
    copy = tmp_path / "digits.safetensors"
    copy.write_bytes(altered)
    with pytest.raises(ConfigError, match=f"have SHA-256 [0-9a-f]{{64}}, not {WEIGHTS_SHA256}: the file was altered"):
        load_digits_net(copy)
    with pytest.raises(ConfigError, match=r"absent.absent` are absent; they ship with lcsc"):
        load_digits_net(tmp_path / "absent.absent")


def test_digits_features(script: ModuleType) -> None:
    _, _, images, _ = script.digits_split(torch.Generator().manual_seed(script.SEED))
    detector = build("detector", "digits")
    features = detector.features(images)
    assert features.shape == (397, detector.num_features)
    assert features.dtype == torch.float32
    assert float(features.min()) == 0.0  # rectified
    net = load_digits_net()
    assert torch.equal(net.out(features), net(images))
    torch.testing.assert_close(detector.features(images[:5]), features[:5])
    torch.testing.assert_close(detector.features(images * 3), detector.features((images * 3).clamp(-1, 1)))


def test_digits_features_have_gradients() -> None:
    images = torch.zeros(2, 1, 8, 8, requires_grad=True)
    build("detector", "digits").features(images).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 28, 28), (1, 8, 8)])
def test_digits_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EvaluationError, match=r"detector `digits` wants images of shape \(N, 1, 8, 8\), got \("):
        build("detector", "digits").features(torch.zeros(shape))


@pytest.mark.parametrize("name", ["digits", "pixels"])
def test_non_finite_pixels_are_refused(name: str) -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, 0, 0], images[1, 0, 3, 3] = torch.inf, torch.nan  # clamping would have hidden the first
    with pytest.raises(EvaluationError, match=r"^2 of 128 pixels are NaN or Inf"):
        build("detector", name).features(images)


def test_pixels_are_the_images() -> None:
    images = torch.arange(24.0).reshape(2, 3, 2, 2)
    detector = build("detector", "pixels")
    assert torch.equal(detector.features(images), torch.arange(24.0).reshape(2, 12))
    assert detector.digest == hashlib.sha256(b"pixels").hexdigest()


def test_metric_keeps_its_detector() -> None:
    metric = build("metric", "fid_digits")
    assert metric.load_detector() is metric.load_detector()
    assert metric.load_detector().name == "digits"


def test_unknown_detector_and_ignored_settings() -> None:
    with pytest.raises(UnknownPart, match=r"no detector named `digit`. Did you mean `digits`\?"):
        build("metric", "fid", detector="digit").load_detector()
    with pytest.raises(
        ConfigError, match=r"^`metric.weights_path` is `w.pth`, but detector `digits` reads no weights file"
    ):
        build("metric", "fid_digits", weights_path="w.pth").load_detector()


@pytest.mark.parametrize("metric", ["fid", "kid"])
@pytest.mark.parametrize(
    ("path", "start"),
    [
        (None, "`metric.weights_path` is not set"),
        ("/nowhere/w.pth", "`metric.weights_path` is `/nowhere/w.pth`, which is no file"),
    ],
)
def test_inception_without_its_file(metric: str, path: str | None, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is asked for before the extra, so that one is not installed in vain."""
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    detector = build("metric", metric, weights_path=path).load_detector()
    for attempt in (lambda: detector.features(torch.zeros(2, 3, 8, 8)), lambda: detector.digest):
        with pytest.raises(ConfigError) as caught:
            attempt()
        message = str(caught.value)
        assert message.startswith(start)
        for wanted in (
            "weights-inception-2015-12-05-6726825d.pth",
            "SHA-256 starts with 6726825d",
            "pt_inception-2015-12-05-6726825d.pth",
            "metric.weights_path=",
        ):
            assert wanted in message
        assert "\n" not in message


def test_inception_checks_the_digest_before_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"not the weights")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled an unchecked file"))
    with pytest.raises(ConfigError, match=r"does not start with 6726825d. Wanted: `weights-inception"):
        build("detector", "inception", weights_path=str(path)).features(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("digest", ["", "6726", "6726825g"])
def test_inception_digest_must_mean_something(weights: tuple[str, str], digest: str) -> None:
    with pytest.raises(ConfigError, match="give at least the first 8 hex digits"):
        assert build("metric", "fid", weights_path=weights[0], weights_digest=digest).load_detector().digest


@pytest.mark.parametrize("absent", ["torch_fidelity", "torchvision"])
def test_inception_without_the_extra(weights: tuple[str, str], absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda name: None if name == absent else object())
    detector = build("metric", "fid", weights_path=weights[0], weights_digest=weights[1][:8]).load_detector()
    with pytest.raises(
        MissingExtraError,
        match=rf"`{absent}`, which is not installed; .*`pip install 'lcsc\[fidelity\]'`\.$",
    ):
        detector.features(torch.zeros(1, 3, 8, 8))
    assert detector.digest == weights[1]


def test_inception_file_that_is_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({"run": print}, path)  # a reference to code, which an unlimited unpickler would follow
    monkeypatch.setattr(inception, "inception_class", lambda: FakeInception)
    detector = build("detector", "inception", weights_path=str(path), weights_digest=file_sha256(path))
    with pytest.raises(ConfigError, match="no plain file of tensors"):
        detector.features(torch.zeros(1, 3, 8, 8))


def test_inception_input_convention(weights: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """[-1, 1] -> uint8 by truncation, grey repeated three times, layer 2048 of the compatible network."""
    monkeypatch.setattr(inception, "inception_class", lambda: FakeInception)
    detector = build("detector", "inception", weights_path=weights[0], weights_digest=weights[1][:12])
    grey = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 5.0]).reshape(1, 1, 2, 3)
    features = detector.features(grey)
    assert features.shape == (1, detector.num_features)
    assert features.dtype == torch.float32
    shown = FakeInception.seen["images"]
    assert shown.dtype == torch.uint8
    assert shown.shape == (1, 3, 2, 3)
    assert shown[0].flatten(1).tolist() == [[0, 0, 127, 254, 255, 255]] * 3
    assert {key: FakeInception.seen[key] for key in ("name", "features_list", "path")} == {
        "name": "inception-v3-compat",
        "features_list": ["2048"],
        "path": weights[0],
    }
    with pytest.raises(EvaluationError, match=r"wants images of shape \(N, 1 or 3, H, W\)"):
        detector.features(torch.zeros(1, 2, 8, 8))
    broken = torch.zeros(1, 3, 8, 8)
    broken[0, 1, 2, 3] = torch.nan  # uint8 would have made it a plain 0
    with pytest.raises(EvaluationError, match=r"^1 of 192 pixels are NaN"):
        detector.features(broken)


class SmallInception(NoTrainInceptionV3):
    """torchmetrics' class with its own forward pass, the size and layers of a toy and random smooth weights."""

    INPUT_IMAGE_SIZE = 13

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        torch.nn.Module.__init__(self)
        self.features_list, self.use_antialias = features_list, True
        generator = torch.Generator().manual_seed(0)
        for layer in ("2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"):
            setattr(self, f"Conv2d_{layer}", torch.nn.Identity())
        for layer in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b"):
            setattr(self, f"Mixed_{layer}", torch.nn.Identity())
        self.MaxPool_1 = self.MaxPool_2 = torch.nn.Identity()
        self.Conv2d_1a_3x3 = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Tanh())
        self.Mixed_7c = torch.nn.Sequential(torch.nn.Conv2d(8, 2048, 3), torch.nn.Softplus())
        self.AvgPool = torch.nn.AdaptiveAvgPool2d((1, 1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


@pytest.fixture
def small(weights: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Detector `inception` with the network above; `vassert` is torch-fidelity's, which may be absent."""

    def vassert(condition: bool, message: str) -> None:
        assert condition, message

    monkeypatch.setattr(fid, "vassert", vassert)
    monkeypatch.setattr(inception, "inception_class", lambda: SmallInception)
    return build("detector", "inception", weights_path=weights[0], weights_digest=weights[1][:12])


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 20, 7)])
def test_inception_features_are_the_same_bits_with_a_derivative(small: Any, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2.2 - 1.1
    with torch.no_grad():
        plain = small.features(images)
        assert torch.equal(small.features(images.requires_grad_(True)), plain)  # nothing wants a derivative here
    features = small.features(images)
    assert features.requires_grad
    assert torch.equal(features, plain)
    assert float(plain.std()) > 0.01
    features.sum().backward()
    assert images.grad is not None
    outside = images.detach().abs() > 1
    assert torch.equal(images.grad[outside], torch.zeros(int(outside.sum())))
    assert float(images.grad[~outside].abs().min()) > 0
    assert not small._net.Conv2d_1a_3x3._forward_pre_hooks
    assert all(parameter.grad is None for parameter in small._net.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 3, 4), (1, 1, 17, 4)])
def test_inception_derivative_is_that_of_the_float_path(
    small: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against central differences of torchmetrics' forward pass in float64, its demand for uint8 switched off."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 1.9 - 0.95
    weights_ND = torch.randn(shape[0], 2048, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images.requires_grad_(True)
    (small.features(images) * weights_ND).sum().backward()
    monkeypatch.setattr(fid, "vassert", lambda condition, message: None)
    net = small._net.double()
    net._dtype = torch.float64
    at = inception.to_uint8(images.detach()).double()[:, : shape[1]]
    step, wanted = 1e-3, torch.empty(shape, dtype=torch.float64)
    for place in range(at.numel()):
        sides = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[place] += sign * step
            sides.append((net(moved.expand(-1, 3, -1, -1)) * weights_ND).sum())
        wanted.view(-1)[place] = (sides[0] - sides[1]) / (2 * step) * 127.5  # pixels are twice as wide as bytes / 255
    torch.testing.assert_close(images.grad.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_fid_can_descend(weights: tuple[str, str]) -> None:
    scorer = build(
        "objective",
        "sample_quality",
        model=build("model", "edm"),
        sampler=build("sampler", "euler"),
        metric=build("metric", "fid", weights_path=weights[0], weights_digest=weights[1][:12]),
        dataset=build("dataset", "digits"),
    )
    assert scorer.name == "fid"
    assert scorer.no_gradient is None
    assert build("detector", "inception").differentiable is True

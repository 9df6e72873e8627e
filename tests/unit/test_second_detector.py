"""Other metrics with detectors of their own: the same images, the same numbers as alone, and nothing more to trials."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.metrics.digits import DigitsDetector
from lcsc.metrics.pixels import PixelDetector
from lcsc.models.network import build_network, save_network
from lcsc.operators.linear import Linear

WHERE = {"seed": 0, "purpose": Purpose.SELECT, "images": range(20, 100)}
OTHERS = ("kid_digits", "kid_pixels", "fid_pixels")


@pytest.fixture(scope="module")
def candidate(tmp_path_factory, tiny_arch):
    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    net = build_network(tiny_arch)
    for step in range(1, 4):
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    return Linear().apply(CheckpointBank.open(folder), {"z": np.array([0.3, -0.2])})


def objective(metric="fid_digits", others=(), name="sample_quality", **settings):
    kinds = {"model": "edm", "dataset": "digits"}
    return build(
        "objective",
        name,
        **{kind: build(kind, part) for kind, part in kinds.items()},
        sampler=build("sampler", "euler", num_steps=2, sigma_max=5.0),
        metric=build("metric", metric),
        other_metrics=tuple(build("metric", other) for other in others),
        batch_size=32,
        device="cpu",
        **settings,
    )


@pytest.fixture
def seen(monkeypatch):
    """Sizes of the batches that each detector was given."""
    sizes = {"digits": [], "pixels": []}
    for cls in (DigitsDetector, PixelDetector):

        def features(self, images_NCHW, real=cls.features):
            sizes[self.name].append(len(images_NCHW))
            return real(self, images_NCHW)

        monkeypatch.setattr(cls, "features", features)
    return sizes


def test_each_metric_is_what_it_is_alone_on_images_sampled_once(candidate, seen):
    scorer = objective(others=OTHERS)
    scorer(candidate, **WHERE, full=True)  # the reference's features
    seen["digits"].clear()
    seen["pixels"].clear()
    score = scorer(candidate, **WHERE, full=True)
    assert seen == {"digits": [32, 32, 16], "pixels": [32, 32, 16]}  # one look each, a batch at a time
    assert score.image_forwards == 80 * 2
    for name in ("fid_digits", *OTHERS):
        alone = objective(name)(candidate, **WHERE, full=True)
        mine = score.others.get(name, {"value": score.value, "se": score.se})
        assert (mine["value"], mine["se"]) == (alone.value, alone.se)


def test_trials_and_slopes_never_meet_another_detector(candidate, seen):
    scorer, plain = objective(others=OTHERS), objective()
    assert scorer(candidate, **WHERE).value == plain(candidate, **WHERE).value
    blocks = scorer.block_states(candidate, **WHERE, num_blocks=4)
    assert scorer.value_of(blocks.states, Purpose.SELECT) == pytest.approx(plain(candidate, **WHERE).value, rel=1e-12)
    slope, wanted = (one.slope(candidate, **WHERE) for one in (scorer, plain))
    assert torch.equal(slope.grad_P, wanted.grad_P)
    assert scorer.floor() == plain.floor()
    assert seen["pixels"] == []


def test_several_nfes_are_scored_by_each_detector(candidate):
    score = objective(others=("kid_pixels",), name="fid_nfe", nfe=[1, 2])(candidate, **WHERE, full=True)
    for nfe in (1, 2):
        sampler = build("sampler", "euler", num_steps=nfe, sigma_max=5.0)
        for name in ("fid_digits", "kid_pixels"):
            alone = replace(objective(name), sampler=sampler)(candidate, **WHERE, full=True)
            assert score.others[f"{name}@{nfe}"] == {"value": alone.value, "se": alone.se}


@pytest.mark.parametrize("name", ["sample_quality", "fid_nfe"])
def test_circumstances_name_every_detector(name):
    told = objective(others=("kid_pixels",), name=name).circumstances()
    assert (told["detector"], told["detector_digest"]) == ("digits", build("detector", "digits").digest)
    assert told["other_metrics"] == {
        "kid_pixels": {"detector": "pixels", "detector_digest": build("detector", "pixels").digest}
    }
    assert "other_metrics" not in objective(name=name).circumstances()


@dataclass
class Shell:
    """The name of a metric with another detector behind it."""

    name: str = "fid_digits"
    higher_is_better: bool = False

    def load_detector(self):
        return build("detector", "pixels")


def test_one_name_cannot_stand_for_two_detectors():
    plain = objective()
    with pytest.raises(ConfigError, match=r"`fid_digits` is scored with two weights files .* a name stands for one"):
        replace(plain, other_metrics=(Shell(),))
    assert replace(plain, other_metrics=(build("metric", "fid_digits"),)).name == "fid_digits"  # the same twice is one

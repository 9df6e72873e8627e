"""Features of a classifier that was trained on the user's own labelled images."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.metrics.base import require_images

#: Key of the header under which `scripts/train_detector.py` writes what the file is.
HEADER_KEY = "lcsc_classifier"
#: Images a network call; a reference of 50,000 images must not be held as activations at once.
CHUNK = 500
MAKE_ONE = "Make one with `python scripts/train_detector.py dataset=... to=FILE` and pass `metric.weights_path=FILE`."


@dataclass(frozen=True)
class ClassifierArch:
    """Sizes of a `ClassifierNet`.

    Args:
        image_shape: C, H, W of the images.
        widths: channels of the stages; each but the first halves the side.
        num_features: D, numbers of the layer before the last.
        num_classes: outputs.
    """

    image_shape: tuple[int, int, int]
    widths: tuple[int, ...]
    num_features: int
    num_classes: int

    def __post_init__(self) -> None:
        sizes = (*self.image_shape, *self.widths, self.num_features, self.num_classes)
        if len(self.image_shape) != 3 or not self.widths or not all(type(s) is int and 1 <= s <= 4096 for s in sizes):
            raise ConfigError(
                f"a classifier of {asdict(self)} cannot be built; all sizes are whole numbers in [1, 4096]."
            )
        if min(self.image_shape[1:]) < 2 ** (len(self.widths) - 1):
            raise ConfigError(
                f"images of {self.image_shape[1:]} pixels cannot be halved {len(self.widths) - 1} times; "
                "give fewer `widths`."
            )

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> ClassifierArch:
        """From the plain mapping in a file's header; raises what a wrong mapping raises."""
        shape, widths = tuple(value["image_shape"]), tuple(value["widths"])
        return cls(shape, widths, value["num_features"], value["num_classes"])


class ClassifierNet(nn.Module):
    """A small residual CNN with D rectified features before the last layer."""

    def __init__(self, arch: ClassifierArch) -> None:
        super().__init__()
        into = (arch.image_shape[0], *arch.widths)
        self.down = nn.ModuleList(
            _conv(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(itertools.pairwise(into))
        )
        self.same = nn.ModuleList(_conv(width, width, stride=1) for width in arch.widths)
        self.hidden = nn.Linear(arch.widths[-1], arch.num_features)
        self.out = nn.Linear(arch.num_features, arch.num_classes)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Features, shape (N, D), at least 0, of images in [-1, 1]."""
        x = images_NCHW
        for down, same in zip(self.down, self.same, strict=True):
            x = F.relu(down(x))
            x = x + F.relu(same(x))
        return F.relu(self.hidden(x.mean((2, 3))))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits, shape (N, num_classes)."""
        logits: Tensor = self.out(self.features(images_NCHW))
        return logits


def _conv(num_in: int, num_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out))


def pack_classifier(net: ClassifierNet, arch: ClassifierArch, made: Mapping[str, Any]) -> bytes:
    """A weights file: the tensors, and in the header the architecture and how the classifier was made."""
    header = json.dumps({"schema": 1, "arch": asdict(arch), "made": dict(made)}, sort_keys=True)
    # One key only: safetensors writes several in no fixed order, and the digest would change from run to run.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    return safetensors.torch.save(tensors, {HEADER_KEY: header})


@dataclass(frozen=True, eq=False)
class Classifier:
    """What a weights file holds: the frozen network, its sizes, how it was made, the file's SHA-256."""

    net: ClassifierNet
    arch: ClassifierArch
    made: dict[str, Any]
    digest: str


def load_classifier(path: str | None, digest: str | None = None) -> Classifier:
    """Read a weights file of `pack_classifier`; the network is in evaluation mode on the CPU.

    Args:
        path: the file.
        digest: first hex digits, at least 8, that its SHA-256 must have; None takes any.

    Raises:
        ConfigError: no path or file, another digest, or a file that holds no classifier.
    """
    if path is None:
        raise ConfigError(
            f"`metric.weights_path` is not set, and detector `classifier` needs its weights file. {MAKE_ONE}"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"`metric.weights_path` is `{path}`, which is no file. {MAKE_ONE}")
    if digest is not None and (len(digest) < 8 or set(digest.lower()) - set("0123456789abcdef")):
        raise ConfigError(
            f"`metric.weights_digest` is `{digest}`; give at least the first 8 hex digits of the file's SHA-256, or "
            "null."
        )
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if digest is not None and not found.startswith(digest.lower()):
        raise ConfigError(
            f"`metric.weights_path` is `{path}` with SHA-256 {found}, which does not start with {digest}. "
            "Scores from other weights do not compare: give the file that they were made with."
        )
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER_KEY])
        arch = ClassifierArch.read(header["arch"])
        with torch.device("meta"):  # sizes are checked against the tensors before any memory is taken for them
            net = ClassifierNet(arch)
        net.load_state_dict(tensors, assign=True)
        made = dict(header["made"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"`metric.weights_path` is `{path}`, which holds no classifier of lcsc: {_one_line(error)} {MAKE_ONE}"
        ) from error
    return Classifier(net.float().eval().requires_grad_(False), arch, made, found)


@register("detector", "classifier", source="lcsc, scripts/train_detector.py; features as in arXiv:1706.08500")
@dataclass(frozen=True)
class ClassifierDetector:
    """The last features of a CNN trained on your own labelled images; scores compare for one weights file only.

    Args:
        weights_path: the file that `scripts/train_detector.py` wrote.
        weights_digest: first hex digits, at least 8, that the file's SHA-256 must have; None takes any.
    """

    weights_path: str | None = None
    weights_digest: str | None = None

    name: ClassVar[str] = "classifier"
    differentiable: ClassVar[bool] = True

    @functools.cached_property
    def _loaded(self) -> Classifier:
        return load_classifier(self.weights_path, self.weights_digest)

    @property
    def num_features(self) -> int:
        """D, from the file's header. Raises ConfigError as `features` does."""
        return self._loaded.arch.num_features

    @property
    def digest(self) -> str:
        """SHA-256 of the weights file. Raises ConfigError as `features` does."""
        return self._loaded.digest

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Shape (N, D), float32; images are clamped to [-1, 1] first, as writing them to a file would.

        Raises:
            EvaluationError: images of another shape than the classifier was trained on, or NaN or Inf in them.
            ConfigError: no weights file, another digest, or a file that holds no classifier.
        """
        shape = self._loaded.arch.image_shape
        wanted = f"(N, {', '.join(map(str, shape))})"
        require_images(images_NCHW, self.name, wanted, tuple(images_NCHW.shape[1:]) == shape)
        net = self._loaded.net.to(images_NCHW.device)
        chunks = images_NCHW.float().clamp(-1, 1).split(CHUNK)
        return torch.cat([net.features(chunk) for chunk in chunks])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Inception-v3 features by the conventions of torchmetrics; never downloads anything."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lcsc.core.digests import file_sha256
from lcsc.core.errors import ConfigError, not_installed
from lcsc.core.registry import register
from lcsc.metrics.base import require_images

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_ALIAS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_DIGEST = "6726825d"
WANTED = (
    f"`{WEIGHTS_NAME}` (SHA-256 starts with {WEIGHTS_DIGEST}; also known as `{WEIGHTS_ALIAS}`). "
    "lcsc downloads nothing: fetch that file and pass `metric.weights_path=/path/to/it`."
)


@register(
    "detector", "inception", source="arXiv:1512.00567; weights and layout of torch-fidelity, input of torchmetrics"
)
@dataclass(frozen=True)
class InceptionDetector:
    """The 2048 pool features of Inception-v3 that FID is defined on; needs its weights file and `lcsc[fidelity]`.

    Its input is rounded to uint8, which has no derivative. Where one is wanted it is passed straight through
    (arXiv:1308.3432): the features are those of the rounded images to the last bit, the derivative is that of
    the network at the rounded images, as if nothing had been rounded.

    Args:
        weights_path: the weights file.
        weights_digest: first hex digits, at least 8, of the file's SHA-256; checked before the file is unpickled.
    """

    weights_path: str | None = None
    weights_digest: str = WEIGHTS_DIGEST

    name: ClassVar[str] = "inception"
    differentiable: ClassVar[bool] = True
    num_features: ClassVar[int] = 2048

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights file. Raises ConfigError as `features` does."""
        return checked_weights(self.weights_path, self.weights_digest)

    @functools.cached_property
    def _net(self) -> Any:
        checked_weights(self.weights_path, self.weights_digest)  # before anything is unpickled
        path = str(self.weights_path)
        network_class = inception_class()
        try:  # torch-fidelity unpickles without limits; a file that only holds tensors is safe there
            torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ConfigError(
                f"`metric.weights_path` is `{path}`, which is no plain file of tensors. Wanted: {WANTED}"
            ) from error
        net = network_class("inception-v3-compat", ["2048"], path)
        return net.requires_grad_(False)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Shape (N, 2048), float32, of images with 1 or 3 channels of any size (grey is repeated).

        Raises:
            EvaluationError: not (N, 1 or 3, H, W), or NaN or Inf among the pixels.
            ConfigError: no weights file, or one with another digest.
            MissingExtraError: torch-fidelity is not installed.
        """
        fits = images_NCHW.ndim == 4 and images_NCHW.shape[1] in (1, 3)
        require_images(images_NCHW, self.name, "(N, 1 or 3, H, W)", fits)
        net = self._net.to(images_NCHW.device)
        shown_NCHW = to_uint8(images_NCHW)
        if torch.is_grad_enabled() and images_NCHW.requires_grad:
            with straight_through(net, to_bytes(images_NCHW)):
                return net(shown_NCHW).float()  # type: ignore[no-any-return]
        features: Tensor = net(shown_NCHW).float()
        return features


def to_bytes(images_NCHW: Tensor) -> Tensor:
    """[-1, 1] -> [0, 255] as float32, differentiable, same shape."""
    unit = (images_NCHW.float().clamp(-1, 1) + 1) / 2
    return unit * 255


def to_uint8(images_NCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 RGB, shape (N, 3, H, W), truncated as torchmetrics does with normalize=True."""
    return to_bytes(images_NCHW).byte().expand(-1, 3, -1, -1)


@contextlib.contextmanager
def straight_through(net: Any, bytes_NCHW: Tensor) -> Iterator[None]:
    """Inside, what `net` makes of the images rounded passes its derivative on to `bytes_NCHW`.

    The network insists on uint8 and goes from there to its first convolution by a resize and a scaling, both linear. So
    the library's own forward pass runs as it is, and a term that is exactly zero, with the derivative of these two
    steps, is added in front of that convolution.

    Args:
        net: torchmetrics' NoTrainInceptionV3 with its default, antialiased resize.
        bytes_NCHW: the images before rounding, in [0, 255], 1 or 3 channels.
    """

    def add_path(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (scaled_NCHW,) = inputs
        bytes_N3HW = bytes_NCHW.to(scaled_NCHW.dtype).expand(-1, 3, -1, -1)
        size = scaled_NCHW.shape[-2:]
        path_NCHW = interpolate(bytes_N3HW, size=size, mode="bilinear", align_corners=False, antialias=True) / 128
        return (scaled_NCHW + (path_NCHW - path_NCHW.detach()),)

    handle = net.Conv2d_1a_3x3.register_forward_pre_hook(add_path)
    try:
        yield
    finally:
        handle.remove()


def checked_weights(path: str | None, digest: str) -> str:
    """SHA-256 of the Inception weights file, once it is there and fits `digest`.

    Raises:
        ConfigError: no path, no file, a digest too short to mean anything, or a file that does not fit it.
    """
    if path is None:
        raise ConfigError(f"`metric.weights_path` is not set, and detector `inception` needs its weights file {WANTED}")
    if not Path(path).is_file():
        raise ConfigError(f"`metric.weights_path` is `{path}`, which is no file. Detector `inception` needs {WANTED}")
    if len(digest) < 8 or set(digest.lower()) - set("0123456789abcdef"):
        raise ConfigError(
            f"`metric.weights_digest` is `{digest}`; give at least the first 8 hex digits of the file's SHA-256."
        )
    found = file_sha256(path)
    if not found.startswith(digest.lower()):
        raise ConfigError(
            f"`metric.weights_path` is `{path}` with SHA-256 {found}, which does not start with {digest}. "
            f"Wanted: {WANTED}"
        )
    return found


def inception_class() -> Any:
    """torchmetrics' NoTrainInceptionV3; raises MissingExtraError where torch-fidelity or torchvision is absent."""
    for package in ("torch_fidelity", "torchvision", "torchmetrics"):
        if find_spec(package) is None:
            raise not_installed("detector `inception`", package, "fidelity")
    _import_torchvision()
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3


def _import_torchvision() -> None:
    """Import torchvision even where its binary is a CUDA build and torch is not.

    Such a binary does not load and leaves its operators undefined, which the import then trips over. Declaring
    the ones it looks for is enough: nothing here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or torch.version.cuda is not None:
            raise
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")

"""What a metric and a detector are: features of images, sums of features, one number.

Shape letters: N images, D features, R bootstrap resamples, B blocks of images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build, part

State = TypeVar("State")
Reference = TypeVar("Reference")


@runtime_checkable
class Detector(Protocol):
    """Turns images into the features that a metric compares."""

    @property
    def name(self) -> str:
        """The name it is registered under."""

    @property
    def num_features(self) -> int:
        """D; 0 when it depends on the image size and is known only once images have been seen."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the weights, or of the name when there are none: part of a score's fingerprint."""

    @property
    def differentiable(self) -> bool:
        """Whether features have a derivative by the pixels."""

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Features, shape (N, D), float32, on the device of the images.

        Images are float32 in [-1, 1]. Raises EvaluationError for non-finite or misshapen images.
        """


class Metric(Protocol[State, Reference]):
    """A score of a set of images against a reference set, computed from mergeable float64 states.

    `merge(update(zeros(), a), update(zeros(), b))` equals `update(zeros(), concat(a, b))` up to rounding, so
    features may come in any chunks, from any worker. States are values: no method changes its argument.
    """

    @property
    def name(self) -> str:
        """The name of the score; says which detector it rests on."""

    @property
    def detector(self) -> str:
        """Registered name of the detector."""

    @property
    def higher_is_better(self) -> bool:
        """Direction of improvement."""

    @property
    def min_samples(self) -> int:
        """Fewest images for which the score is defined; fewer raise EvaluationError."""

    def load_detector(self) -> Detector:
        """The detector, made once and kept."""

    def zeros(self) -> State:
        """The state of no images."""

    def update(self, state: State, features_ND: Tensor) -> State:
        """The state with N more images. Raises EvaluationError for non-finite features."""

    def merge(self, a: State, b: State) -> State:
        """The state of both sets together."""

    def reference(self, state: State) -> Reference:
        """What `compute` needs of the reference images, factored once."""

    def compute(self, state: State, reference: Reference) -> float:
        """The score. Raises EvaluationError for fewer than `min_samples` images or a non-finite result."""


@runtime_checkable
class DifferentiableMetric(Protocol):
    """What a metric offers beside `Metric` when its score has a derivative by the features."""

    def gradient(self, state: Any, reference: Any) -> Callable[[Tensor], Tensor]:
        """The derivative of `compute(state, reference)` by the features of any of the images in `state`.

        The function takes features, shape (n, D), of images that `state` has seen, and gives float64, shape (n, D).
        """


@runtime_checkable
class MixableMetric(Protocol):
    """What a metric offers beside `DifferentiableMetric` when images may count more or less than one another."""

    def mixed(self, states: Sequence[Any], weights: Sequence[float]) -> Any:
        """The state of all images together where each image of `states[i]` counts `weights[i]` > 0.

        `compute` and `gradient` take it; equal weights give what `merge` gives. With weights, `gradient` is the
        derivative by an image that counts as one of the state's `count`.
        """


def make_detector(name: str, weights_path: str | None, weights_digest: str | None) -> Detector:
    """The detector `name` with the weights settings of its metric.

    Raises:
        UnknownPart: no such detector.
        ConfigError: weights settings for a detector that takes none (they would be ignored).
    """
    known = {field for field, _, _ in part("detector", name).fields()}
    given = {"weights_path": weights_path, "weights_digest": weights_digest}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(
                f"`metric.{key}` is `{value}`, but detector `{name}` reads no weights file. "
                "Drop the setting, or choose metric `fid` or `kid` (detector `inception`)."
            )
    detector: Detector = build("detector", name, **given)
    return detector


def require_finite(values: Tensor, what: str) -> None:
    """Raise EvaluationError when a tensor holds NaN or Inf, naming how many."""
    num_bad = int((~torch.isfinite(values)).sum())
    if num_bad:
        raise EvaluationError(
            f"{num_bad} of {values.numel()} {what} are NaN or Inf; a score needs finite numbers. "
            "The candidate has diverged: treat it as failed."
        )


def require_images(images_NCHW: Tensor, detector: str, shapes_CHW: str, fits: bool) -> None:
    """Raise EvaluationError unless `fits` and the images are finite (clamping would hide an Inf)."""
    if not fits:
        raise EvaluationError(
            f"detector `{detector}` wants images of shape {shapes_CHW}, got {tuple(images_NCHW.shape)}. "
            "Choose another metric for this dataset."
        )
    require_finite(images_NCHW, "pixels")


def checked_features(features_ND: Tensor, num_features: int | None) -> Tensor:
    """The features as finite float64, shape (N, D); D must equal `num_features` unless that is None.

    Raises:
        EvaluationError: not a matrix, another D than before, or NaN or Inf among the features.
    """
    if features_ND.ndim != 2 or (num_features is not None and features_ND.shape[1] != num_features):
        wanted = "D" if num_features is None else str(num_features)
        raise EvaluationError(f"features have shape {tuple(features_ND.shape)}; want (N, {wanted}), one row per image.")
    require_finite(features_ND, "features")
    return features_ND.to(torch.float64)


def require_samples(metric: str, count: int, least: int) -> None:
    """Raise EvaluationError when a metric has fewer images than it is defined for."""
    if count < least:
        raise EvaluationError(f"`{metric}` needs at least {least} images, got {count}. Raise the number of images.")


def require_finite_score(metric: str, value: float) -> float:
    """`value`, or EvaluationError when it is NaN or Inf: such a score must not reach a searcher."""
    if value != value or value in (float("inf"), float("-inf")):
        raise EvaluationError(
            f"`{metric}` came out as {value}: the features overflow float64. Treat the candidate as failed."
        )
    return value


@dataclasses.dataclass(frozen=True)
class FeatureMetric:
    """What metrics on a detector's features share; a subclass adds the five steps of `Metric`.

    Args:
        detector: registered name of the detector.
        weights_path: weights file of the detector, for detectors that read one (`inception`).
        weights_digest: first hex digits of that file's SHA-256; None takes the detector's default.
    """

    detector: str
    weights_path: str | None = None
    weights_digest: str | None = None

    #: name of the score on Inception features; other features give other numbers and another name
    family: ClassVar[str]
    higher_is_better: ClassVar[bool] = False
    min_samples: ClassVar[int] = 2

    @property
    def name(self) -> str:
        """`fid` for Inception features only, `fid_<detector>` for any other."""
        return self.family if self.detector == "inception" else f"{self.family}_{self.detector}"

    @functools.cached_property
    def _detector(self) -> Detector:
        return make_detector(self.detector, self.weights_path, self.weights_digest)

    def load_detector(self) -> Detector:
        """The detector, made once and kept."""
        return self._detector


def state_width(tensor_D: Tensor) -> int | None:
    """D of a state's last axis; None for the scalar zero of a state that has seen no image."""
    return None if tensor_D.ndim == 0 else int(tensor_D.shape[-1])


def require_same_width(a: int | None, b: int | None) -> None:
    """Raise EvaluationError when two states hold features of different width."""
    if a is not None and b is not None and a != b:
        raise EvaluationError(f"states hold {a} and {b} features; only states of one detector can be put together.")


def as_plain_counts(counts_RB: Any, num_blocks: int) -> Tensor:
    """Resampling multiplicities as float64, shape (R, B)."""
    counts = torch.as_tensor(counts_RB, dtype=torch.float64)
    assert counts.ndim == 2
    assert counts.shape[1] == num_blocks
    return counts

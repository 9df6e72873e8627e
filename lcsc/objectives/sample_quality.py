"""Quality of sampled images: network -> images -> features -> distance to the reference."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import register
from lcsc.core.seeds import ImageNoise, Purpose, SeedRange
from lcsc.core.space import Point, SearchSpace
from lcsc.datasets.base import Dataset, need_images
from lcsc.datasets.content import data_digest
from lcsc.metrics.base import DifferentiableMetric, Metric, MixableMetric
from lcsc.metrics.bootstrap import bootstrap
from lcsc.metrics.paired import paired_scores
from lcsc.models.base import Model
from lcsc.models.compiled import check_compile
from lcsc.models.flat import LiveModel
from lcsc.objectives.base import Blocks, Score, Slope, spending
from lcsc.objectives.shared import KeptLive, choose_device, halves_of
from lcsc.operators.base import Candidate
from lcsc.samplers.base import Sampler
from lcsc.samplers.times import Retimed, times_box

#: Blocks of images that the bootstrap resamples.
NUM_BLOCKS = 20

SOURCE = "LCSC, arXiv:2404.02241; protocol in docs/honest_numbers.md"


@register("objective", "sample_quality", source=SOURCE)
@register("objective", "sample_quality_small", source=SOURCE, recompute=False)  # for networks that take little memory
@dataclass(frozen=True)
class SampleQuality:
    """Distance between generated images and real ones.

    The reference images are cut into a search half and a report half; `Purpose.REPORT` is scored against the report
    half, everything else against the search half. The noise of image i depends on (seed, purpose, i) alone, so all
    candidates of a purpose share it.

    Args:
        model: how the network becomes a denoiser.
        sampler: how noise becomes images.
        metric: the distance.
        dataset: the real images.
        other_metrics: scored beside `metric` in full evaluations, on the same images; with whatever detectors.
        batch_size: images per network call.
        split_seed: of the cut of the reference.
        device: torch device; `auto` takes the GPU where there is one.
        recompute: whether a derivative computes each network call again instead of keeping its activations: the memory
            of one call instead of `nfe` of them, for a third more time.
        compile: `no`, or a backend of torch.compile, usually `inductor`, for the network's calls; each size of batch is
            compiled once, and scores are the same up to rounding.
    """

    model: Model = field(metadata={"internal": True})
    sampler: Sampler = field(metadata={"internal": True})
    metric: Metric = field(metadata={"internal": True})
    dataset: Dataset = field(metadata={"internal": True})
    other_metrics: tuple[Metric, ...] = field(default=(), metadata={"internal": True})
    batch_size: int = 500
    split_seed: int = 0
    device: str = "auto"
    recompute: bool = True
    compile: str = "no"

    def __post_init__(self) -> None:
        need_images(self.dataset, "objective `sample_quality`")
        check_compile(self.compile)
        if self.batch_size < 1:
            raise ConfigError(f"`objective.batch_size` is {self.batch_size}; it must be at least 1.")
        if self.metric.higher_is_better:
            raise ConfigError(
                f"`metric` is `{self.metric.name}`, which is better when higher; an objective is minimised. "
                "List it under `other_metrics`, and in `search.guards` if it should veto winners."
            )
        self.__dict__["_caches"] = {"reference": {}, "live": KeptLive()}  # shared by copies with another sampler
        digests: dict[str, str] = {}
        for metric in (self.metric, *self.other_metrics):
            digest = metric.load_detector().digest  # a missing weights file shows up here, before anything is done
            if digests.setdefault(metric.name, digest) != digest:
                raise ConfigError(
                    f"`{metric.name}` is scored with two weights files of its detector, {digests[metric.name][:12]} "
                    f"and {digest[:12]}; a name stands for one number. Drop one from `metric` and `other_metrics`."
                )

    @property
    def name(self) -> str:
        """The metric's name."""
        return self.metric.name

    @property
    def min_images(self) -> int:
        """The metric's minimum."""
        return self.metric.min_samples

    @torch.no_grad()
    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`."""
        metrics = (self.metric, *self.other_metrics) if full else (self.metric,)
        features = self._sampled(candidate, seed, purpose, images, metrics)
        with spending(len(images) * self.sampler.nfe()):
            rows = {m.name: self._measure(m, features[_digest(m)], _half(purpose), full) for m in metrics}
        value, se, _ = rows.pop(self.metric.name)
        others = {name: {"value": other, "se": error} for name, (other, error, _) in rows.items() if error is not None}
        resamples = {name: drawn for name, (*_, drawn) in rows.items()}
        return Score(value, len(images), self.sampler.nfe(), se, others, resamples)

    @torch.no_grad()
    def block_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int
    ) -> Blocks:
        """See `Raceable.block_states`."""
        features_ND = self._sampled(candidate, seed, purpose, images, (self.metric,))[_digest(self.metric)]
        return Blocks(tuple(_blocks(self.metric, features_ND, num_blocks)), len(images) * self.sampler.nfe())

    def merge_states(self, states: Sequence[Any]) -> Any:
        """See `Raceable.merge_states`."""
        return functools.reduce(self.metric.merge, states)

    def value_of(self, states: Sequence[Any], purpose: Purpose) -> float:
        """See `Raceable.value_of`."""
        return self.metric.compute(self.merge_states(states), self._reference(self.metric, _half(purpose)))

    def resampled(self, states: Sequence[Any], purpose: Purpose) -> np.ndarray:
        """See `Raceable.resampled`; the Fréchet distance is resampled to first order (`lcsc.metrics.paired`)."""
        return paired_scores(self.metric, states, self._reference(self.metric, _half(purpose)))

    @torch.no_grad()
    def images(self, candidate: Candidate, *, seed: int, purpose: Purpose, num_images: int) -> Tensor:
        """The candidate's images, float32 NCHW in [-1, 1], on the CPU."""
        live = self._live(candidate)
        return torch.cat([batch.cpu() for batch in self._batches(live, seed, purpose, range(num_images))])

    def floor(self) -> float:
        """Search half scored against the report half: what real images reach."""
        features_ND = self._reference_features(self.metric, "search")
        return self._measure(self.metric, features_ND, "report", full=False)[0]

    def circumstances(self) -> dict[str, Any]:
        """Metric, detectors, reference and sampler."""
        detector = self.metric.load_detector()
        others = {other.name: other.load_detector() for other in self.other_metrics}
        told = {name: {"detector": found.name, "detector_digest": found.digest} for name, found in others.items()}
        return {
            "metric": self.metric.name,
            "detector": detector.name,
            "detector_digest": detector.digest,
            "nfe": self.sampler.nfe(),
            "sampler": repr(self.sampler),
            "model": repr(self.model),
            "dataset": repr(self.dataset),
            "data_digest": self._data_digest,
            "split_seed": self.split_seed,
            **({"other_metrics": told} if told else {}),
        }

    def space(self) -> SearchSpace:
        """See `Tunable.space`: offsets of the sampler's levels where `sampler.search_times` asks for them."""
        box = times_box(self.sampler)
        return SearchSpace(() if box is None else (box,))

    def at(self, point: Point) -> SampleQuality:
        """See `Tunable.at`."""
        return with_sampler(self, Retimed(self.sampler, point["times"])) if self.space().boxes else self

    @functools.cached_property
    def _data_digest(self) -> str:
        return data_digest(self.dataset)

    @functools.cached_property
    def torch_device(self) -> torch.device:
        """Where the networks run."""
        return choose_device(self.device)

    @property
    def no_gradient(self) -> str | None:
        """See `Differentiable.no_gradient`."""
        if not isinstance(self.metric, DifferentiableMetric):
            return f"metric `{self.metric.name}` has no derivative"
        if not self.metric.load_detector().differentiable:
            return f"detector `{self.metric.detector}` rounds its images"
        return None

    @property
    def no_memory(self) -> str | None:
        """See `Remembering.no_memory`."""
        if isinstance(self.metric, MixableMetric):
            return None
        return f"metric `{self.metric.name}` weighs all images alike"

    @torch.enable_grad()
    def seen(self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range) -> Tensor:
        """See `Remembering.seen`: features, shape (N, D), by the very calls that `slope` makes."""
        live = self._live(candidate)
        with self._collecting(live):
            return torch.cat([part.detach() for part in self._watched(live, seed, purpose, images)])

    def slope(
        self,
        candidate: Candidate,
        *,
        seed: int,
        purpose: Purpose,
        images: range,
        earlier: Sequence[tuple[Tensor, float]] = (),
    ) -> Slope:
        """Backward through detector and sampler; with `recompute` each network call is computed again when needed.

        Between the calls only images are then kept, so memory is that of one call on one batch, and the images in
        between: `nfe` of them for each image. Cost: one forward pass, one more when recomputing, one backward pass.
        `earlier` features count in mean and covariance, see `Remembering.slope`; the derivative goes backward through
        the new images alone and is divided by their share.

        Raises:
            EvaluationError: the candidate diverged or collapsed, or the derivative is not finite.
        """
        live = self._live(candidate)
        reference = self._reference(self.metric, _half(purpose))
        with self._collecting(live) as (grad_P, grad_T):
            batches = list(self._watched(live, seed, purpose, images))
            state = self.metric.zeros()
            with spending(len(images) * self.sampler.nfe()):
                for batch in batches:
                    state = self.metric.update(state, batch.detach())
                state, scale = self._mixed(state, earlier, len(images))
                value = self.metric.compute(state, reference)
                derivative = self.metric.gradient(state, reference)  # type: ignore[attr-defined]
            for batch in batches:
                batch.backward((derivative(batch.detach()) * scale).to(batch.dtype))
        cost = (4 if self.recompute else 3) * len(images) * self.sampler.nfe()
        with spending(cost):
            if not torch.isfinite(grad_P).all():
                raise EvaluationError("the derivative of the score is not finite; the candidate diverged.")
        own = {} if grad_T is None else {"times": grad_T}
        return Slope(value, grad_P, cost, own, torch.cat([batch.detach() for batch in batches]))

    @contextlib.contextmanager
    def _collecting(self, live: LiveModel) -> Iterator[tuple[Tensor, np.ndarray | None]]:
        """Inside, backward passes add up in the network's flat row and, where times are searched, in theirs."""
        moved = self.sampler if isinstance(self.sampler, Retimed) else None
        with live.collecting() as grad_P, moved.collecting() if moved else contextlib.nullcontext() as grad_T:
            yield grad_P, grad_T

    def _watched(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """Features that a derivative goes back through, batch by batch, shape (n, D)."""
        features = self.metric.load_detector().features
        for batch in self._batches(live, seed, purpose, images, self.recompute):
            yield checkpoint(features, batch, use_reentrant=False)

    def _mixed(self, state: Any, earlier: Sequence[tuple[Tensor, float]], num: int) -> tuple[Any, float]:
        """The state with earlier features in it, and what the derivative by one of its `num` images is multiplied by.

        It is one over the share of the new images, times the weight of one among them: count / num.
        """
        if not earlier:
            return state, 1.0
        states = [self.metric.update(self.metric.zeros(), features) for features, _ in earlier]
        mixed = self.metric.mixed([state, *states], [1.0, *(weight for _, weight in earlier)])  # type: ignore[attr-defined]
        return mixed, float(mixed.count) / num

    def _sampled(
        self, candidate: Candidate, seed: int, purpose: Purpose, images: range, metrics: Sequence[Metric]
    ) -> dict[str, Tensor]:
        """Features of the candidate's images, shape (N, D), by the digest of each detector of `metrics`.

        The images are sampled once and each detector sees them once, batch by batch.
        """
        live = self._live(candidate)
        detectors = {_digest(metric): metric.load_detector() for metric in metrics}
        parts: dict[str, list[Tensor]] = {digest: [] for digest in detectors}
        for batch in self._batches(live, seed, purpose, images):
            for digest, detector in detectors.items():
                parts[digest].append(detector.features(batch))
        return {digest: torch.cat(batches) for digest, batches in parts.items()}

    def _batches(
        self, live: LiveModel, seed: int, purpose: Purpose, images: range, recompute: bool = False
    ) -> Iterator[Tensor]:
        """Batches of images; with `recompute`, differentiable ones that hold no activations of the network."""
        denoise = functools.partial(self.model.denoise, live.network(self.compile))
        if recompute:
            denoise = functools.partial(checkpoint, denoise, use_reentrant=False, preserve_rng_state=False)
        seeds = SeedRange(seed, purpose)
        noise_NCHW = _initial_noise(seeds, images, tuple(self.dataset.image_shape))
        for start in range(0, len(images), self.batch_size):
            rows = images[start : start + self.batch_size]
            noise = noise_NCHW[start : start + len(rows)].to(self.torch_device)
            batch = self.sampler(denoise, noise, None, rng=ImageNoise(seeds, rows))
            with spending((start + len(rows)) * self.sampler.nfe()):
                batch = _checked(batch, start == 0)
            yield batch

    def _live(self, candidate: Candidate) -> LiveModel:
        live: LiveModel = self.__dict__["_caches"]["live"].filled(candidate, self.torch_device)
        return live

    @torch.no_grad()
    def _reference_features(self, metric: Metric, half: str) -> Tensor:
        return metric.load_detector().features(self._reference_images(half).to(self.torch_device))

    def _reference_images(self, half: str) -> Tensor:
        search, report = halves_of(self.dataset, self.split_seed)
        return self.dataset.images()[torch.from_numpy(search if half == "search" else report)]

    def _reference(self, metric: Metric, half: str) -> Any:
        cache = self.__dict__["_caches"]["reference"]
        if (metric.name, half) not in cache:
            features_ND = self._reference_features(metric, half)
            cache[metric.name, half] = metric.reference(metric.update(metric.zeros(), features_ND))
        return cache[metric.name, half]

    def _measure(
        self, metric: Metric, features_ND: Tensor, half: str, full: bool
    ) -> tuple[float, float | None, list[float]]:
        """The score; where a full one is asked for, its standard error and the scores of the resamples too."""
        reference = self._reference(metric, half)
        blocks = _blocks(metric, features_ND, NUM_BLOCKS)
        value = metric.compute(functools.reduce(metric.merge, blocks), reference)
        if not full:
            return value, None, []
        rng = SeedRange(0, Purpose.BOOTSTRAP).generator()
        return value, *bootstrap(metric, blocks, reference, rng=rng)


def with_sampler(quality: SampleQuality, sampler: Sampler) -> SampleQuality:
    """The same with another sampler; the live network and the reference's features are shared, not made again."""
    other = copy.copy(quality)
    other.__dict__["sampler"] = sampler
    return other


def _digest(metric: Metric) -> str:
    digest: str = metric.load_detector().digest
    return digest


def _checked(batch_NCHW: Tensor, first: bool) -> Tensor:
    """Images clamped to [-1, 1]; raises EvaluationError where they diverged, or in the first batch are all equal."""
    if not torch.isfinite(batch_NCHW).all():
        num = int((~torch.isfinite(batch_NCHW)).sum())
        raise EvaluationError(f"{num} sampled pixels are NaN or Inf; the candidate diverged.")
    batch_NCHW = batch_NCHW.clamp(-1, 1)
    if first and len(batch_NCHW) > 1 and torch.equal(batch_NCHW, batch_NCHW[:1].expand_as(batch_NCHW)):
        raise EvaluationError("all sampled images are equal; the candidate collapsed.")
    return batch_NCHW


def _half(purpose: Purpose) -> str:
    return "report" if purpose is Purpose.REPORT else "search"


def _blocks(metric: Metric, features_ND: Tensor, num_blocks: int) -> list[Any]:
    """One state for each block of images; the blocks are of nearly equal size."""
    blocks = features_ND.tensor_split(min(num_blocks, len(features_ND)))
    return [metric.update(metric.zeros(), block) for block in blocks]


@functools.lru_cache(maxsize=8)
def _initial_noise(seeds: SeedRange, images: range, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(seeds.normal(images, shape))

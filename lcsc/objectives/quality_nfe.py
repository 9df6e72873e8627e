"""Quality of sampled images at several numbers of network calls: one candidate that is to do well at all of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose
from lcsc.core.space import Point, SearchSpace
from lcsc.datasets.base import Dataset
from lcsc.metrics.base import Metric
from lcsc.models.base import Model
from lcsc.objectives.base import Blocks, Score, Slope, spending
from lcsc.objectives.sample_quality import SampleQuality, with_sampler
from lcsc.operators.base import Candidate
from lcsc.samplers.base import Sampler, with_nfe

COMBINE = ("log_mean", "mean")


@register("objective", "fid_nfe", source="lcsc")
@dataclass(frozen=True)
class QualityNFE:
    """One score for several numbers of network calls (NFE): the geometric mean of the scores at each.

    At each NFE the configured sampler runs with as many steps as that takes, on the same noise. The geometric mean has
    no scale: halving the score at one NFE counts as much as halving it at another, however far apart they lie.

    Args:
        model, sampler, metric, dataset, other_metrics: as in `sample_quality`; the sampler's own NFE is replaced.
        nfe: the numbers of network calls, each once.
        combine: `log_mean`, the geometric mean, for scores above 0; or `mean`.
        weights: of the NFEs in the mean, above 0, scaled to sum 1; none means equal.
        batch_size, split_seed, device, recompute, compile: as in `sample_quality`.
    """

    model: Model = field(metadata={"internal": True})
    sampler: Sampler = field(metadata={"internal": True})
    metric: Metric = field(metadata={"internal": True})
    dataset: Dataset = field(metadata={"internal": True})
    other_metrics: tuple[Metric, ...] = field(default=(), metadata={"internal": True})
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4])
    combine: str = "log_mean"
    weights: list[float] = field(default_factory=list)
    batch_size: int = 500
    split_seed: int = 0
    device: str = "auto"
    recompute: bool = True
    compile: str = "no"

    def __post_init__(self) -> None:
        if not self.nfe or len(set(self.nfe)) != len(self.nfe) or min(self.nfe) < 1:
            raise ConfigError(
                f"`objective.nfe` is {list(self.nfe)}; give numbers of at least 1, each once, as [1,2,4]."
            )
        if self.combine not in COMBINE:
            raise ConfigError(f"`objective.combine` is `{self.combine}`; it must be one of {', '.join(COMBINE)}.")
        if self.weights and (
            len(self.weights) != len(self.nfe) or not all(0 < weight < math.inf for weight in self.weights)
        ):
            raise ConfigError(
                f"`objective.weights` is {list(self.weights)} for {len(self.nfe)} numbers in `objective.nfe`; "
                "give one for each, above 0, or none."
            )
        _ = self.members  # a number of calls that the sampler cannot do shows up here

    @functools.cached_property
    def members(self) -> tuple[SampleQuality, ...]:
        """The scores at each NFE, in the order of `nfe`.

        Raises:
            ConfigError: the sampler cannot make images with one of the numbers of calls.
        """
        own = ("batch_size", "split_seed", "device", "recompute", "compile")
        settings = {name: getattr(self, name) for name in own}
        first = SampleQuality(
            self.model,
            with_nfe(self.sampler, self.nfe[0]),
            self.metric,
            self.dataset,
            self.other_metrics,
            **settings,
        )
        return (first, *(with_sampler(first, with_nfe(self.sampler, nfe)) for nfe in self.nfe[1:]))

    @property
    def name(self) -> str:
        """The metric's name and the NFEs, such as `fid_digits@1+2+4`."""
        return f"{self.metric.name}@{self._calls}"

    @property
    def min_images(self) -> int:
        """The metric's minimum."""
        return self.members[0].min_images

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`; full scores hold those at each NFE among the others, as `fid_digits@2`.

        The standard error is the sum of the members' ones times the derivative of the mean by each: members share their
        noise, so their errors go together, and this is the most that any correlation can make of them.
        """
        shared = self._written(candidate)
        scores = []
        for nfe, member in zip(self.nfe, self.members, strict=True):
            with _naming(nfe), spending(sum(score.image_forwards for score in scores)):
                scores.append(member(shared, seed=seed, purpose=purpose, images=images, full=full))
        with spending(sum(score.image_forwards for score in scores)):
            value, shares = self._mean([score.value for score in scores])
        errors = [share * score.se for share, score in zip(shares, scores, strict=True) if score.se is not None]
        others: dict[str, Any] = {}
        resamples: dict[str, Sequence[float]] = {}
        for nfe, score in zip(self.nfe, scores, strict=True):
            if score.se is not None:
                others[f"{self.metric.name}@{nfe}"] = {"value": score.value, "se": score.se}
            others |= {f"{name}@{nfe}": other for name, other in score.others.items()}
            resamples |= {f"{name}@{nfe}": drawn for name, drawn in score.resamples.items()}
        se = sum(errors) if len(errors) == len(scores) else None
        return Score(value, len(images), sum(self.nfe), se, others, resamples)

    @torch.no_grad()
    def block_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int
    ) -> Blocks:
        """See `Raceable.block_states`; the state of a block holds the members' states, in the order of `nfe`."""
        shared, found = self._written(candidate), []
        where: dict[str, Any] = {"seed": seed, "purpose": purpose, "images": images, "num_blocks": num_blocks}
        for nfe, member in zip(self.nfe, self.members, strict=True):
            with _naming(nfe), spending(sum(blocks.image_forwards for blocks in found)):
                found.append(member.block_states(shared, **where))
        states = tuple(zip(*(blocks.states for blocks in found), strict=True))
        return Blocks(states, sum(blocks.image_forwards for blocks in found))

    def merge_states(self, states: Sequence[Any]) -> Any:
        """See `Raceable.merge_states`."""
        rows = zip(self.members, zip(*states, strict=True), strict=True)
        return tuple(member.merge_states(own) for member, own in rows)

    def value_of(self, states: Sequence[Any], purpose: Purpose) -> float:
        """See `Raceable.value_of`."""
        return self._mean(self._values_of(states, purpose))[0]

    def resampled(self, states: Sequence[Any], purpose: Purpose) -> np.ndarray:
        """See `Raceable.resampled`; to first order in the members, whose resamples may lie below 0."""
        values = self._values_of(states, purpose)
        value, shares = self._mean(values)
        rows = zip(self.members, shares, values, zip(*states, strict=True), strict=True)
        moves = [share * (member.resampled(own, purpose) - at) for member, share, at, own in rows]
        return value + np.sum(moves, axis=0)  # type: ignore[no-any-return]

    def floor(self) -> float:
        """Real images against real ones; the same at each NFE, and so their mean."""
        return self.members[0].floor()

    def circumstances(self) -> dict[str, Any]:
        """Those of `sample_quality`, with all NFEs and samplers and how they are put together."""
        return {
            **self.members[0].circumstances(),
            "nfe": self._calls,
            "sampler": [repr(member.sampler) for member in self.members],
            "combine": self.combine,
            "weights": self._weights,
        }

    @property
    def no_gradient(self) -> str | None:
        """See `Differentiable.no_gradient`."""
        return self.members[0].no_gradient

    def slope(self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range) -> Slope:
        """See `Differentiable.slope`: by the chain rule over the members' slopes, one NFE after the other."""
        shared = self._written(candidate)
        slopes = []
        for nfe, member in zip(self.nfe, self.members, strict=True):
            with _naming(nfe), spending(sum(slope.image_forwards for slope in slopes)):
                slopes.append(member.slope(shared, seed=seed, purpose=purpose, images=images))
        cost = sum(slope.image_forwards for slope in slopes)
        with spending(cost):
            value, shares = self._mean([slope.value for slope in slopes])
        grad_P = torch.zeros_like(slopes[0].grad_P)
        for share, slope in zip(shares, slopes, strict=True):
            grad_P.add_(slope.grad_P, alpha=share)
        rows = zip(self.nfe, shares, slopes, strict=True)
        own = {f"{name}@{nfe}": share * grad for nfe, share, slope in rows for name, grad in slope.own.items()}
        return Slope(value, grad_P, cost, own)

    def space(self) -> SearchSpace:
        """See `Tunable.space`: the members' boxes, `times@4` for the times at 4 network calls."""
        rows = zip(self.nfe, self.members, strict=True)
        return SearchSpace(
            tuple(replace(box, name=f"{box.name}@{nfe}") for nfe, member in rows for box in member.space().boxes)
        )

    def at(self, point: Point) -> QualityNFE:
        """See `Tunable.at`."""
        other, rows = copy.copy(self), zip(self.nfe, self.members, strict=True)
        own = [{box.name: point[f"{box.name}@{nfe}"] for box in member.space().boxes} for nfe, member in rows]
        other.__dict__["members"] = tuple(m.at(part) for m, part in zip(self.members, own, strict=True))
        return other

    @torch.no_grad()
    def images(self, candidate: Candidate, *, seed: int, purpose: Purpose, num_images: int) -> Tensor:
        """The candidate's images at the first NFE, float32 NCHW in [-1, 1], on the CPU."""
        return self.members[0].images(candidate, seed=seed, purpose=purpose, num_images=num_images)

    @property
    def _calls(self) -> str:
        return "+".join(str(nfe) for nfe in self.nfe)

    @property
    def _weights(self) -> list[float]:
        """Of the members, with sum 1."""
        weights = self.weights or [1.0] * len(self.nfe)
        return [weight / sum(weights) for weight in weights]

    def _values_of(self, states: Sequence[Any], purpose: Purpose) -> list[float]:
        """The members' scores of all blocks together."""
        values = []
        for nfe, member, own in zip(self.nfe, self.members, zip(*states, strict=True), strict=True):
            with _naming(nfe):
                values.append(member.value_of(own, purpose))
        return values

    def _mean(self, values: Sequence[float]) -> tuple[float, list[float]]:
        """The mean of the members' values and its derivative by each of them."""
        weights = self._weights
        if self.combine == "mean":
            return sum(weight * value for weight, value in zip(weights, values, strict=True)), weights
        for nfe, value in zip(self.nfe, values, strict=True):
            if value <= 0:
                raise EvaluationError(
                    f"at {nfe} network calls the score is {value:g}; a geometric mean needs scores above 0. "
                    "Set `objective.combine` to mean."
                )
        mean = math.exp(sum(weight * math.log(value) for weight, value in zip(weights, values, strict=True)))
        return mean, [weight * mean / value for weight, value in zip(weights, values, strict=True)]

    def _written(self, candidate: Candidate) -> Candidate:
        """The same candidate with its weights computed once for all members."""
        theta_P = torch.empty(candidate.layout.num_parameters, device=self.members[0].torch_device)
        candidate.write(theta_P)

        def write(out_P: Tensor) -> None:
            out_P.copy_(theta_P)

        return replace(candidate, write=write)


@contextlib.contextmanager
def _naming(nfe: int) -> Iterator[None]:
    """Say in a failure at which NFE it happened."""
    try:
        yield
    except EvaluationError as error:
        named = EvaluationError(f"at {nfe} network calls: {error}")
        named.image_forwards = error.image_forwards
        raise named from error

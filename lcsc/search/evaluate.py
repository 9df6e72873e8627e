"""One candidate scored: a plain row for the journal, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.core.errors import EvaluationError
from lcsc.core.seeds import Purpose
from lcsc.core.space import SearchSpace
from lcsc.objectives.base import Objective, tuned
from lcsc.operators.base import Candidate, Operator

Row = dict[str, Any]

#: Why a candidate failed: no possible score, its code raised, no memory, too slow, its process was killed, or died.
CAUSES = ("invalid", "error", "oom", "timeout", "killed", "crashed")


#: What a row tells of a candidate's recipe.
TOLD = (
    *("coef", "num_kv_heads", "cache_bytes_per_token", "bits", "tau", "anchor_every", "file_bytes"),
    *("encoder_step", "decoder_step", "encoder_layers", "decoder_layers", "share", "cross_attention"),
    *("proposal", "prompted_metric", "start_metric", "goals", "extrapolation", "nearest", "moved", "combined"),
)


#: Vector and images of an earlier evaluation, and how much one of its images counts beside a new one.
EarlierImages = tuple[tuple[float, ...], tuple[int, int], float]


@dataclass(frozen=True)
class Evaluator:
    """Scores points of a space. A failure is a row like any other: it has a reason and no value."""

    bank: CheckpointBank
    operator: Operator
    objective: Objective
    space: SearchSpace
    seed: int
    #: what the last derivatives left for later ones (`Remembering`)
    _seen: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def candidate(self, vector: np.ndarray) -> Candidate:
        """The candidate at a point, shape (size,)."""
        return self.operator.apply(self.bank, self.space.to_point(vector))

    def score(
        self, vector: np.ndarray, purpose: Purpose, images: range, full: bool = False, resamples: bool = False
    ) -> Row:
        """Value; `full` adds the standard error and the other metrics, `resamples` their scores by resample too."""
        candidate = self.candidate(vector)
        head = head_of(candidate)
        try:
            score = tuned(self.objective, self.space.to_point(vector))(
                candidate, seed=self.seed, purpose=purpose, images=images, full=full
            )
        except EvaluationError as error:
            return failed_row(head, str(error), error.image_forwards)
        if not math.isfinite(score.value):
            return failed_row(head, f"the score is {score.value}", score.image_forwards)
        tail: Row = {}
        if full:
            tail = {"se": score.se, "others": dict(score.others), "num_images": score.num_images}
        if resamples:
            tail["resamples"] = {name: list(drawn) for name, drawn in score.resamples.items()}
        return done_row(head, score.value, score.image_forwards, tail)

    def slope(self, vector: np.ndarray, purpose: Purpose, images: range, earlier: Sequence[EarlierImages] = ()) -> Row:
        """Value and derivative with respect to the vector, under `gradient`.

        Args:
            vector, purpose, images: what is scored.
            earlier: whose images count in the statistics, of the same purpose; needs a `Remembering` objective.
                Those that were not seen here are sampled once more. That is in no row, as it depends on who saw them.
        """
        candidate = self.candidate(vector)
        head = head_of(candidate)
        try:
            remembered = self._remembered(purpose, earlier)
            given = {"earlier": remembered} if remembered else {}
            slope = tuned(self.objective, self.space.to_point(vector)).slope(  # type: ignore[attr-defined]
                candidate, seed=self.seed, purpose=purpose, images=images, **given
            )
            self._seen[tuple(vector.tolist()), purpose, (images.start, images.stop)] = slope.seen
            pulled = self.operator.pull_back(  # type: ignore[attr-defined]
                self.bank, self.space.to_point(vector), slope.grad_P
            )
        except EvaluationError as error:
            return failed_row(head, str(error), error.image_forwards, gradient=None)
        gradient = self.space.to_vector({**pulled, **slope.own})
        if not math.isfinite(slope.value) or not np.isfinite(gradient).all():
            reason = f"the score is {slope.value}, its derivative reaches {np.abs(gradient).max()}"
            return failed_row(head, reason, slope.image_forwards, gradient=None)
        return done_row(head, slope.value, slope.image_forwards, {"gradient": gradient.tolist()})

    def _remembered(self, purpose: Purpose, earlier: Sequence[EarlierImages]) -> list[tuple[Any, float]]:
        """What these left, with their weights; everything else is forgotten."""
        kept = {}
        for at, span, _ in earlier:
            key, vector = (at, purpose, span), np.array(at)
            kept[key] = self._seen.get(key)
            if kept[key] is None:
                kept[key] = tuned(self.objective, self.space.to_point(vector)).seen(  # type: ignore[attr-defined]
                    self.candidate(vector), seed=self.seed, purpose=purpose, images=range(*span)
                )
        self._seen.clear()
        self._seen.update(kept)
        return [(kept[at, purpose, span], weight) for at, span, weight in earlier]


def head_of(candidate: Candidate) -> Row:
    """What a row says of the candidate itself."""
    return {key: candidate.recipe[key] for key in TOLD if key in candidate.recipe} | dict(candidate.measured)


def failed_row(head: Row, reason: str, cost: int, cause: str = "invalid", **tail: Any) -> Row:
    """The row of a candidate that could not be scored; `cause` is one of `CAUSES`."""
    assert cause in CAUSES
    failed = {"value": None, "status": "failed", "cause": cause, "reason": reason, "image_forwards": cost}
    return {**head, **failed, **tail}


def done_row(head: Row, value: float, cost: int, tail: Row) -> Row:
    """The row of a scored candidate."""
    return {**head, "value": value, "status": "ok", "reason": None, "image_forwards": cost, **tail}

"""Racing: score a candidate on a few images first, and go on only while it may still be the best.

Prefixes are nested ranges of the same images, so nothing is sampled twice and all candidates meet the same noise. An
objective that trains its candidates can be raced over training steps instead, on all images each time: training goes on
where it was, and all candidates see the same data in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.seeds import Purpose
from lcsc.metrics.paired import chance_better
from lcsc.objectives.base import Objective, Raceable, RaceableBySteps, tuned
from lcsc.search.evaluate import Evaluator, Row, done_row, failed_row, head_of

#: Blocks of images at every size; the bootstrap resamples them.
NUM_BLOCKS = 20

#: Vector and full score of the candidate to beat.
Incumbent = tuple[tuple[float, ...], float]


def check_race(objective: Objective, prefixes: Sequence[int], race_steps: Sequence[int], num_images: int) -> None:
    """Raise ConfigError when an objective cannot be raced over `prefixes`, or over `race_steps`."""
    if race_steps:
        _check_steps(objective, race_steps, num_images)
    if not prefixes:
        return
    if not isinstance(objective, Raceable):
        raise ConfigError(
            f"`search.prefixes` is {list(prefixes)}, but objective `{objective.name}` cannot score a part of its "
            "images. Leave the setting out."
        )
    least = max(NUM_BLOCKS, objective.min_images)
    if prefixes[0] < least:
        raise ConfigError(f"`search.prefixes` begins with {prefixes[0]}; a race needs at least {least} images.")


def _check_steps(objective: Objective, race_steps: Sequence[int], num_images: int) -> None:
    if not isinstance(objective, RaceableBySteps):
        raise ConfigError(
            f"`search.race_steps` is {list(race_steps)}, but objective `{objective.name}` trains no candidates. Leave "
            "the setting out, or choose one that does, such as objective=uptrained_loss."
        )
    if race_steps[-1] >= objective.num_steps:
        raise ConfigError(
            f"`search.race_steps` is {list(race_steps)}; all must be below `objective.num_steps`, which is "
            f"{objective.num_steps}."
        )
    if num_images < NUM_BLOCKS:
        raise ConfigError(f"`search.num_images` is {num_images}; a race needs at least {NUM_BLOCKS} images.")


class Racer:
    """Scores candidates in one and the same way, whether they are dropped or not.

    A candidate that is worse than the incumbent on the first images is dropped when it would be better in less than
    `drop_level` of the paired bootstrap resamples of these images. Images of the incumbent that are sampled once more,
    because another candidate or an interruption came between, are in no row: rows are the same whether a race was
    interrupted or not, and whoever runs it.

    Args:
        evaluator: makes candidates; its objective is `Raceable`.
        sizes: numbers of images, increasing; the last one is the full size, and with `steps` all are.
        drop_level: share of resamples.
        steps: of training at each stage, increasing, of a `RaceableBySteps`; empty for a race over images.
    """

    def __init__(
        self, evaluator: Evaluator, sizes: Sequence[int], drop_level: float, steps: Sequence[int] = ()
    ) -> None:
        self._evaluator, self._sizes, self._level, self._steps = evaluator, tuple(sizes), drop_level, tuple(steps)
        self._rival: _Course | None = None
        self._last: _Course | None = None

    def full(self, vector: np.ndarray) -> Row:
        """The row of a candidate on all images, whatever its rank."""
        return self._score(vector, None)

    def race(self, vector: np.ndarray, incumbent: Incumbent | None) -> Row:
        """The row of a candidate on all images, or up to where it was dropped.

        A dropped candidate's value is an estimate of its full score: the incumbent's, plus the difference on the
        images both have seen (many scores depend on the number of images, so the prefix score itself misleads).
        """
        return self._score(vector, incumbent)

    def _score(self, vector: np.ndarray, incumbent: Incumbent | None) -> Row:
        rival = self._course_of(incumbent) if incumbent else None
        course = self._last = _Course(self._evaluator, vector, self._sizes, self._steps)
        for stage in range(len(self._sizes)):
            try:
                value = course.reach(stage)
            except EvaluationError as error:
                spent = course.image_forwards + error.image_forwards
                return self._row(course, stage, failed_row(course.head, str(error), spent))
            if not math.isfinite(value):
                row = failed_row(course.head, f"the score is {value}", course.image_forwards)
                return self._row(course, stage, row)
            estimate = None
            if rival and incumbent and stage < len(self._sizes) - 1:
                estimate = self._beaten(course, rival, incumbent[1], stage)
            if estimate is not None:
                tail = {"dropped_at": self._sizes[stage], "prefix_value": value}
                tail |= {"dropped_after": self._steps[stage]} if self._steps else {}
                return self._row(course, stage, done_row(course.head, estimate, course.image_forwards, tail))
        return self._row(course, len(self._sizes) - 1, done_row(course.head, value, course.image_forwards, {}))

    def _row(self, course: _Course, stage: int, row: Row) -> Row:
        return {**row, "images": self._sizes[stage]}

    def _course_of(self, incumbent: Incumbent) -> _Course:
        """The incumbent's course, kept from its own race or from the last one against it."""
        vector = np.array(incumbent[0])
        known = [c for c in (self._rival, self._last) if c is not None and np.array_equal(c.vector, vector)]
        self._rival = known[0] if known else _Course(self._evaluator, vector, self._sizes, self._steps)
        return self._rival

    def _beaten(self, course: _Course, rival: _Course, full: float, stage: int) -> float | None:
        """The estimate of the full score of a candidate to be dropped, None while it may go on."""
        behind = course.values[stage] - rival.reach(stage)
        if behind <= 0 or chance_better(course.resamples[stage], rival.resamples[stage]) >= self._level:
            return None
        return full + behind


class _Course:
    """One candidate on the way from size to size.

    Every size has the same number of blocks: the old ones are merged to about the size of the new, so memory does not
    grow with the images, and equal stages are cut alike for all candidates.
    """

    def __init__(self, evaluator: Evaluator, vector: np.ndarray, sizes: Sequence[int], steps: Sequence[int]) -> None:
        self._candidate, self.vector = evaluator.candidate(vector), vector
        self._evaluator, self._sizes, self._steps = evaluator, sizes, steps
        self._states: tuple[Any, ...] = ()
        self.head = head_of(self._candidate)
        self.image_forwards = 0
        self.values: list[float] = []
        self.resamples: list[np.ndarray] = []

    def reach(self, stage: int) -> float:
        """The score on the first `sizes[stage]` images."""
        while len(self.values) <= stage:
            self._extend(len(self.values))
        return self.values[stage]

    def _extend(self, stage: int) -> None:
        objective = tuned(self._evaluator.objective, self._evaluator.space.to_point(self.vector))
        purpose = Purpose.SEARCH
        assert isinstance(objective, Raceable)
        begin, end = self._sizes[stage - 1] if stage and not self._steps else 0, self._sizes[stage]
        kept = min(max(round(NUM_BLOCKS * begin / end), 1), NUM_BLOCKS - 1) if begin else 0
        given: dict[str, Any] = {"seed": self._evaluator.seed, "purpose": purpose, "images": range(begin, end)}
        if self._steps:
            assert isinstance(objective, RaceableBySteps)
            leg = range(self._steps[stage - 1] if stage else 0, self._steps[stage])
            new = objective.leg_states(self._candidate, **given, num_blocks=NUM_BLOCKS, steps=leg)
        else:
            new = objective.block_states(self._candidate, **given, num_blocks=NUM_BLOCKS - kept)
        self.image_forwards += new.image_forwards
        old = [objective.merge_states(self._states[a:b]) for a, b in _groups(len(self._states), kept)]
        self._states = (*old, *new.states)
        value = objective.value_of(self._states, purpose)
        if stage < len(self._sizes) - 1:
            self.resamples.append(objective.resampled(self._states, purpose))
        else:
            self._states = ()
        self.values.append(value)


def _groups(num: int, num_groups: int) -> list[tuple[int, int]]:
    """`num` neighbours as `num_groups` runs of nearly equal length: their first places and those behind their last."""
    edges = [num * group // num_groups for group in range(num_groups + 1)] if num_groups else []
    return list(itertools.pairwise(edges))

"""When stages of a pipeline die, and what that costs in time: the cost model of CheckFree. S = stages.

The paper's training time is (iterations to a loss) x (seconds of an iteration), arXiv:2506.15461, Table 2. Here it
is written for four ways to live with failures; all times are in one unit, seconds say.

    no recovery by weights:  redundant computation trains as if nothing failed, in longer iterations
    recovery by neighbours:  more iterations, because each failure sets the model back, none of them longer
    checkpoints:             the model of the last save, so that iterations are done again
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.seeds import Purpose, SeedRange

#: stream of the failures among those of a training
FAILURES = 4


@dataclass(frozen=True, order=True)
class Failure:
    """A stage that dies before the first micro-batch of a step; steps count from 0."""

    step: int
    stage: int


def per_step(hourly: float, step_seconds: float) -> float:
    """Probability that a stage dies in a step, from that of an hour: 1 - (1 - p)^(seconds / 3600)."""
    if not 0 <= hourly < 1 or not step_seconds > 0:
        raise ConfigError(
            f"failures an hour are {hourly}, seconds a step {step_seconds}; give a share below 1, above 0 s."
        )
    return float(-math.expm1(step_seconds / 3600 * math.log1p(-hourly)))


def draw_failures(probability: float, num_steps: int, num_stages: int, seed: int) -> tuple[Failure, ...]:
    """Each stage dies in each step but the first with one probability; of several in a step the first counts.

    The draws of a seed are the same for every probability, so that a higher one adds failures.
    """
    draws_TS = SeedRange(seed, Purpose.TRAIN).generator(0, FAILURES).random((num_steps, num_stages))
    dead_TS = draws_TS < probability
    return tuple(Failure(int(t), int(np.argmax(dead_TS[t]))) for t in range(1, num_steps) if dead_TS[t].any())


# ------------------------------------------------------------------------------------------------- checkpointing


def replayed(failures: Sequence[Failure], num_steps: int, period: int) -> np.ndarray:
    """Progress of a training with checkpoints after each real step, int64 (num_steps,).

    A checkpoint is taken after every `period` real steps. A failure before step t sets the progress back to what it was
    at the last one (nothing before the first), and the step is done from there. It is the authors' simulation but for
    one detail: theirs takes a failure right at a checkpoint back to the one before.

    Raises:
        ConfigError: a period below 1.
    """
    if period < 1:
        raise ConfigError(f"the period of checkpoints is {period} steps; it must be at least 1.")
    dead = {failure.step for failure in failures}
    progress, saved, made = 0, 0, np.zeros(num_steps, np.int64)
    for t in range(num_steps):
        if t in dead:
            progress = saved
        progress += 1
        made[t] = progress
        if (t + 1) % period == 0:
            saved = progress
    return made


def steps_to_reach(progress: int, failures: Sequence[Failure], num_steps: int, period: int) -> int | None:
    """Real steps until a training with checkpoints has made `progress`; None where it does not within `num_steps`."""
    there = np.flatnonzero(replayed(failures, num_steps, period) >= progress)
    return int(there[0]) + 1 if len(there) else None


def young_daly(save_seconds: float, between_failures_seconds: float) -> float:
    """Period of checkpoints that costs least to first order, sqrt(2 C M) (Young 1974; Daly 2006 refines it)."""
    if not (save_seconds > 0 and between_failures_seconds > 0):
        raise ConfigError(
            f"a save takes {save_seconds} s and failures lie {between_failures_seconds} s apart; give > 0."
        )
    return math.sqrt(2 * save_seconds * between_failures_seconds)


def expected_overhead(
    period: int, *, step_seconds: float, save_seconds: float, failure_probability: float, restart_seconds: float
) -> float:
    """Expected seconds for a step of progress, over those of a step without failures or saves.

    Exact for failures that are independent from step to step with one probability q, before each of which the progress
    since the last save is lost: a stretch of n steps takes ((1 - q)^-n - 1) / q tries of a step, each q-th of which
    begins with a restart, and one save.
    """
    q, n = failure_probability, period
    tries = n if q == 0 else math.expm1(-n * math.log1p(-q)) / q
    seconds = tries * (step_seconds + q * restart_seconds) + save_seconds
    return seconds / (n * step_seconds)


def best_period(
    *, step_seconds: float, save_seconds: float, failure_probability: float, restart_seconds: float, most: int = 10_000
) -> int:
    """The period with the least `expected_overhead`, found among all from 1 to `most`."""
    costs = {
        "step_seconds": step_seconds,
        "save_seconds": save_seconds,
        "failure_probability": failure_probability,
        "restart_seconds": restart_seconds,
    }
    return min(range(1, most + 1), key=lambda period: _finite(period, costs))


def _finite(period: int, costs: dict[str, float]) -> float:
    try:
        return expected_overhead(period, **costs)
    except OverflowError:
        return math.inf


# ------------------------------------------------------------------------------------------------------ wall-clock


@dataclass(frozen=True)
class Parts:
    """Measured seconds of the parts of a training.

    Args:
        step: an iteration.
        redundant_step: one in which every machine also computes its successor's stage.
        save: a checkpoint, as far as training waits for it.
        restart: from a failure until training goes on from the last checkpoint.
        recover: the same where the stage is rebuilt from what its neighbours hold.
        swapped_step: an iteration with half of the micro-batches in swapped order; None: as `step`.
    """

    step: float
    redundant_step: float
    save: float = 0.0
    restart: float = 0.0
    recover: float = 0.0
    swapped_step: float | None = None


#: seconds of Table 2 by failures an hour; recovery and saves are part of its mean seconds of an iteration
PAPER_STEP = {
    "checkpointing": {5: 91.35, 10: 91.35, 16: 92.14},
    "redundant": {5: 151.04, 10: 151.04, 16: 151.04},
    "checkfree": {5: 91.32, 10: 91.32, 16: 92.12},
    "checkfree_plus": {5: 91.32, 10: 91.32, 16: 92.12},
}
#: and iterations until its loss of 2.85, which follow from its hours
PAPER_STEPS = {
    "checkpointing": {5: 22_000, 10: 24_500, 16: 25_000},
    "redundant": {5: 10_000, 10: 10_000, 16: 10_000},
    "checkfree": {5: 14_500, 10: 16_000, 16: 22_000},
    "checkfree_plus": {5: 14_000, 10: 14_500, 16: 18_000},
}


def train_hours(num_steps: int, step_seconds: float) -> float:
    """Training time of the paper's table."""
    return num_steps * step_seconds / 3600


def train_seconds(method: str, parts: Parts, num_steps: int, num_failures: int, period: int | None = None) -> float:
    """Seconds of `num_steps` real steps with `num_failures` failures among them.

    Args:
        method: `checkpointing` (with its `period`), `redundant`, `checkfree` or `checkfree_plus`.
        parts: see `Parts`.
        num_steps: steps that were done, those done again included.
        num_failures: failures in them.
        period: of checkpoints, in steps.

    Raises:
        ConfigError: an unknown method, or checkpointing without a period.
    """
    if method == "checkpointing":
        if period is None:
            raise ConfigError("`checkpointing` has no period; give the steps between checkpoints.")
        return num_steps * parts.step + num_steps // period * parts.save + num_failures * parts.restart
    steps = {
        "redundant": parts.redundant_step,
        "checkfree": parts.step,
        "checkfree_plus": parts.step if parts.swapped_step is None else parts.swapped_step,
    }
    if method not in steps:
        raise ConfigError(
            f"no way to live with failures is called `{method}`. Known: checkpointing, {', '.join(steps)}."
        )
    return num_steps * steps[method] + num_failures * parts.recover

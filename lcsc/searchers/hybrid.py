"""Descent along the derivative until it stalls, then a black-box search around where it got to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.searchers.base import Proposal, Session, Start, Task
from lcsc.searchers.gradient import Gradient, GradientSession, need_gradient
from lcsc.searchers.nevergrad import Nevergrad, NevergradSession


def fall_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """One-sided p-value of Welch's t test (Biometrika 34, 1947) that the mean of `after` lies below that of `before`.

    Small means that the values fell; two constants fell for certain or not at all.
    """
    from scipy.special import stdtr

    errors = [float(np.var(part, ddof=1)) / len(part) for part in (before, after)]
    fall = float(np.mean(before) - np.mean(after))
    if not sum(errors) > 0:
        return 0.0 if fall > 0 else 1.0
    parts = zip(errors, (before, after), strict=True)
    freedom = sum(errors) ** 2 / sum(error**2 / (len(part) - 1) for error, part in parts)
    return float(stdtr(freedom, -fall / math.sqrt(sum(errors))))


class _Session:
    """Two sessions, one after the other; the second begins with the first one's average, on the common noise."""

    def __init__(self, settings: Hybrid, task: Task, begin: np.ndarray) -> None:
        self._settings, self._task = settings, task
        self._share = max(1, round(settings.most * task.num_trials))
        self._descent = GradientSession(settings, replace(task, num_trials=self._share), begin)
        self._values: list[float] = []  # of the descent
        self._black_box: NevergradSession | None = None
        self._offset = self._asked = 0
        self._open: dict[int, np.ndarray] = {}
        self._trials: list[tuple[float, int, np.ndarray]] = []  # of the black box

    def ask(self) -> Proposal:
        self._asked += 1
        if self._black_box is None and (self._asked > self._share or self._stalled()):
            self._switch()
        if self._black_box is None:
            return self._descent.ask()
        proposal = self._black_box.ask()
        uid, vector = proposal.uid + self._offset, proposal.vector
        if proposal.uid == 0:
            vector = self._descent.best()  # as suggested, without the rounding of the scale
        elif self._settings.radius is not None:
            region = self._descent.region
            vector = region.vector(region.nearest(vector * region.lengths))
        self._open[uid] = vector
        return Proposal(uid, vector, num_images=self._settings.num_images)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        if self._black_box is not None:
            self._black_box.tell(uid - self._offset, value)
            self._trials.append((float(value), uid, self._open.pop(uid)))
            return
        self._descent.tell(uid, value, gradient)
        if gradient is not None:  # a failure's value is another one's
            self._values.append(float(value))

    def best(self) -> np.ndarray:
        """The best black-box trial, which may be the descent's average; before there are any, that average."""
        return min(self._trials, key=_rank)[2] if self._trials else self._descent.best()

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The best black-box trials for one half, averages of the descent for the other; either fills up for both."""
        ranked = [(uid, vector) for _, uid, vector in sorted(self._trials, key=_rank)]
        names = {self._offset: "descent's average"}
        trials = [(names.get(uid, f"black-box trial {uid}"), vector) for uid, vector in ranked]
        means = self._descent.finalists(count)
        trials = trials[: max((count + 1) // 2, count - len(means))]
        known = {vector.tobytes() for _, vector in trials}
        return (trials + [mean for mean in means if mean[1].tobytes() not in known])[:count]

    def _stalled(self) -> bool:
        """Whether the last `patience` values lie no lower than those before; looked at once for every `patience`."""
        size, values = self._settings.patience, self._values
        if len(values) < 2 * size or len(values) % size:
            return False
        return fall_p_value(values[-2 * size : -size], values[-size:]) > self._settings.level

    def _switch(self) -> None:
        settings, task = self._settings, self._task
        self._offset, average = self._asked - 1, self._descent.best()
        left = max(1, task.num_trials - self._offset)
        start = Start(average, math.nan, "descent's average")  # its values were of other noise
        self._black_box = settings.black_box().session(replace(task, num_trials=left, starts=(start,)))
        self._black_box.suggest(average)


def _rank(trial: tuple[float, int, np.ndarray]) -> tuple[float, int]:
    return trial[0], trial[1]


@register("searcher", "hybrid", source="lcsc: searcher=gradient, then an optimizer of nevergrad; see docs/methods.md")
@dataclass(frozen=True)
class Hybrid(Gradient):
    """The descent of `gradient` until its values no longer fall, then a black-box search around its average.

    The descent's values are of new noise at every step; the black box compares values, and gets those of the noise that
    all trials share. Its first proposal is the descent's average.

    Args, beside those of `gradient`:
        optimizer: of nevergrad, for the second part.
        sigma0: length of its first moves, in units of the boxes' scale.
        num_images: images of one of its trials; None takes the budget's.
        patience: the means of so many successive values are compared by Welch's t test.
        level: the descent goes on while the fall's one-sided p-value is at most this.
        most: largest share of the budget that the descent may take; its steps shrink towards this end.
    """

    optimizer: str = "CMA"
    sigma0: float = 0.1
    num_images: int | None = None
    patience: int = 20
    level: float = 0.05
    most: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.black_box()
        if self.num_images is not None and self.num_images < 1:
            raise ConfigError(f"`searcher.num_images` is {self.num_images}; it must be at least 1, or null.")
        if self.reach:
            raise ConfigError(
                f"`searcher.reach` is {self.reach}, but `hybrid` compares values, and needs images of their own for "
                "each. Set it to 0, or use searcher=gradient."
            )
        if self.patience < 2:
            raise ConfigError(f"`searcher.patience` is {self.patience}; a variance needs at least 2 values.")
        if not 0 < self.level < 1 or not 0 < self.most <= 1:
            raise ConfigError(
                f"`searcher.level` is {self.level} and `most` {self.most}; the first must lie between 0 and 1, "
                "the second be above 0 and at most 1."
            )

    def black_box(self) -> Nevergrad:
        """The searcher of the second part."""
        return Nevergrad(self.optimizer, self.sigma0, warm_start=False)  # its start has no value on the common noise

    def start(self, task: Task) -> Session:
        """Begin at the best start; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, the problem has no gradient, the optimizer cannot work on it, too few
                images, or a radius that would be no distance.
        """
        begin = task.begin()
        task.need_images("num_images", self.num_images)
        task.need_images("step_images", self.step_images)
        need_gradient("hybrid", task)
        self.black_box().check(task)
        return _Session(self, task, begin)

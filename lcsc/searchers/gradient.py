"""Descent along the exact derivative of the score with respect to the coordinates."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.searchers.base import Earlier, Proposal, Session, Task, check_told
from lcsc.searchers.region import Region

SOURCE = "Adam, arXiv:1412.6980, on the exact derivative; see docs/methods.md"
NOISES = ("fresh", "rotating", "common")
#: Averages over this share of the last iterates are candidates for the winner: noise averages out, drift does not.
TAILS = (0.0, 1 / 8, 1 / 4, 1 / 2)
#: The searcher's own recommendation is the average over this share.
BEST_TAIL = 1 / 4
#: Images that count less than this share of a new one are left out, and those of more steps ago forgotten.
LEAST, MOST_REMEMBERED = 0.01, 64
FIRST_MOMENT, SECOND_MOMENT, EPSILON = 0.9, 0.99, 1e-12


class GradientSession:
    """Adam (arXiv:1412.6980) in coordinates whose unit steps are equally long in weight space."""

    def __init__(self, settings: Gradient, task: Task, begin: np.ndarray) -> None:
        self._settings, self._num_trials, self._begin = settings, task.num_trials, begin
        self.region = Region.around(task.space, begin, settings.radius)
        self._at = self.region.center.copy()
        self._first, self._second = np.zeros_like(begin), np.zeros_like(begin)
        self._path: list[np.ndarray] = []
        self._asked, self._failed = 0, 0
        self._open: Proposal | None = None
        self._memory: deque[tuple[Proposal, np.ndarray]] = deque(maxlen=MOST_REMEMBERED)

    def ask(self) -> Proposal:
        uid, settings = self._asked, self._settings
        self._asked += 1
        noise, vector = settings.noise, self.region.vector(self._at)
        block = None if noise == "common" else uid if noise == "fresh" else uid % settings.num_blocks
        self._open = Proposal(uid, vector, True, block, settings.step_images, self._earlier())
        return self._open

    def _earlier(self) -> tuple[Earlier, ...]:
        """The last steps near here, the oldest first; how much an image counts falls with the distance since."""
        rows = []
        for past, at in self._memory if self._settings.reach else ():
            weight = math.exp(-((self.region.change(self._at - at) / self._settings.reach) ** 2) / 2)
            if weight >= LEAST and past.block is not None:
                rows.append(Earlier(past.vector, past.block, weight))
        return tuple(rows)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        if gradient is None:
            self._back_off()
            return
        assert self._open is not None, "told what was not asked"
        self._memory.append((self._open, self._at.copy()))
        self._path.append(self._at.copy())
        done = len(self._path)
        slope = np.asarray(gradient, dtype=np.float64) / self.region.lengths
        self._first = FIRST_MOMENT * self._first + (1 - FIRST_MOMENT) * slope
        self._second = SECOND_MOMENT * self._second + (1 - SECOND_MOMENT) * slope**2
        first = self._first / (1 - FIRST_MOMENT**done)
        second = self._second / (1 - SECOND_MOMENT**done)
        size = np.sqrt(second) + EPSILON * np.sqrt(second.max(initial=0.0)) + 1e-300
        # nearest as Adam measures, or a descent along the rim would end beside the lowest place (arXiv:1904.09237)
        self._at = self.region.nearest(self._at - self._rate() * (first / size), size / size.max(initial=1e-300))

    def _rate(self) -> float:
        """Constant, then falling to `final` of it over the second half of the budget along a half cosine."""
        settings = self._settings
        share = min(1.0, self._asked / max(1, self._num_trials))
        fall = max(0.0, share - settings.hold) / max(1e-9, 1 - settings.hold)
        low = settings.final
        return settings.step_size * 0.5**self._failed * (low + (1 - low) * (1 + np.cos(np.pi * fall)) / 2)

    def _back_off(self) -> None:
        """A candidate broke: return to the last one that did not, with half the step and no momentum."""
        self._failed += 1
        self._first[:] = 0
        self._at = (self._path[-1] if self._path else self.region.center).copy()

    def best(self) -> np.ndarray:
        """The average of the last quarter of the iterates; the start where there are none."""
        return tail_mean(self._path, BEST_TAIL, self.region) if self._path else self._begin

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """Averages over the last iterates, and the last one; the start where there are none."""
        named = tail_means(self._path, "iterate", self.region) if self._path else [("last iterate", self._begin)]
        return named[:count]


def tail_mean(path: list[np.ndarray], share: float, region: Region) -> np.ndarray:
    """The average of the last `share` of a path, at least of its last place, as a vector of the space."""
    return region.vector(np.mean(path[-max(1, round(len(path) * share)) :], axis=0))


def tail_means(path: list[np.ndarray], noun: str, region: Region) -> list[tuple[str, np.ndarray]]:
    """Labelled averages of the ends of a path, the longest first."""
    shares = {max(1, round(len(path) * share)): share for share in TAILS}
    names = {size: f"mean of {size} {noun}s" if size > 1 else f"last {noun}" for size in shares}
    return [(names[size], tail_mean(path, shares[size], region)) for size in sorted(shares, reverse=True)]


def need_gradient(searcher: str, task: Task) -> None:
    """Raise ConfigError where the problem has no gradient."""
    if task.no_gradient is not None:
        raise ConfigError(
            f"searcher `{searcher}` needs a derivative, and {task.no_gradient}. Use searcher=cma, or another objective."
        )


def need_memory(searcher: Gradient, task: Task) -> None:
    """Raise ConfigError where images of earlier steps shall count and cannot."""
    if searcher.reach and task.no_memory is not None:
        raise ConfigError(
            f"`searcher.reach` is {searcher.reach}, but {task.no_memory}. Set it to 0: then steps use their own images."
        )


def check_idle(searcher: Any, name: str, noise: str) -> None:
    """Raise ConfigError for a setting `name` that was changed though only the noise `noise` looks at it."""
    value = getattr(searcher, name)
    if searcher.noise != noise and value != type(searcher).__dataclass_fields__[name].default:
        raise ConfigError(
            f"`searcher.{name}` is {value}, but counts for nothing with `searcher.noise` {searcher.noise}. "
            f"Set `searcher.noise` to {noise}, or leave `{name}` out."
        )


@register("searcher", "gradient", source=SOURCE)
@register("searcher", "gradient_small", source=SOURCE, step_images=32, reach=1.0)  # many small steps
@dataclass(frozen=True)
class Gradient:
    """Adam on exact derivatives; every step sees new noise, so that it cannot fit the noise.

    Args:
        step_size: length of a step along each coordinate, in coordinates whose unit steps are equally long in weight
            space.
        noise: `fresh` (new noise every step), `rotating` (`num_blocks` blocks in turn) or `common`.
        num_blocks: blocks of rotating noise.
        radius: largest distance from the start in weight space, in the same unit; None means no limit.
        hold: share of the budget with full steps; then they shrink along a half cosine.
        final: size of the last step as a share of the first.
        step_images: images of a step; None takes `search.num_images`.
        reach: images of earlier steps count in the statistics that are differentiated, exp(-(d / reach)^2 / 2) each
            beside a new one, where d is how far from there the descent has come in weight space, in the unit of
            `radius`; 0 forgets them. The Fréchet distance, biased on few images, then needs few a step.
    """

    step_size: float = 0.3
    noise: str = "fresh"
    num_blocks: int = 8
    radius: float | None = None
    hold: float = 0.5
    final: float = 0.1
    step_images: int | None = None
    reach: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.step_size < math.inf or (self.radius is not None and not self.radius > 0):
            raise ConfigError(
                f"`searcher.step_size` is {self.step_size} and `searcher.radius` {self.radius}; both must be above 0, "
                "the first finite."
            )
        if self.noise not in NOISES or self.num_blocks < 1:
            raise ConfigError(
                f"`searcher.noise` is `{self.noise}` with `num_blocks` {self.num_blocks}; it must be one of "
                f"{', '.join(NOISES)}, with at least 1 block."
            )
        check_idle(self, "num_blocks", "rotating")
        if not 0 <= self.hold <= 1 or not 0 <= self.final <= 1:
            raise ConfigError(f"`searcher.hold` is {self.hold} and `final` {self.final}; both must lie in [0, 1].")
        if not 0 <= self.reach < math.inf or (self.step_images is not None and self.step_images < 1):
            raise ConfigError(
                f"`searcher.reach` is {self.reach} and `step_images` {self.step_images}; the first must be at least 0 "
                "and finite, the second at least 1, or null."
            )
        check_idle(self, "reach", "fresh")

    def start(self, task: Task) -> Session:
        """Begin at the best start; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, no gradient, too few images, images that cannot be weighed, or a radius
                that would be no distance.
        """
        begin = task.begin()
        need_gradient("gradient", task)
        task.need_images("step_images", self.step_images)
        need_memory(self, task)
        return GradientSession(self, task, begin)

"""Descent along the exact derivative of the score with respect to the coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.space import SearchSpace
from lcsc.searchers.base import Proposal, Task, check_told

NOISES = ("fresh", "rotating", "common")
#: Averages over this share of the last iterates are candidates for the winner: noise averages out, drift does not.
TAILS = (0.0, 1 / 8, 1 / 4, 1 / 2)
FIRST_MOMENT, SECOND_MOMENT, EPSILON = 0.9, 0.99, 1e-12


class _Session:
    """Adam (arXiv:1412.6980) in coordinates whose unit steps are equally long in weight space."""

    def __init__(self, settings: Gradient, task: Task, begin: np.ndarray) -> None:
        self._settings, self._task = settings, task
        self._lengths = lengths(task.space)
        self._begin, self._at = begin, begin * self._lengths
        self._center = self._at.copy()
        self._first, self._second = np.zeros_like(begin), np.zeros_like(begin)
        self._path: list[np.ndarray] = []
        self._asked, self._failed = 0, 0

    def ask(self) -> Proposal:
        uid, noise = self._asked, self._settings.noise
        self._asked += 1
        block = None if noise == "common" else uid if noise == "fresh" else uid % self._settings.num_blocks
        return Proposal(uid, self._at / self._lengths, gradient=True, block=block)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        if gradient is None:
            self._back_off()
            return
        self._path.append(self._at.copy())
        done = len(self._path)
        slope = np.asarray(gradient, dtype=np.float64) / self._lengths
        self._first = FIRST_MOMENT * self._first + (1 - FIRST_MOMENT) * slope
        self._second = SECOND_MOMENT * self._second + (1 - SECOND_MOMENT) * slope**2
        first = self._first / (1 - FIRST_MOMENT**done)
        second = self._second / (1 - SECOND_MOMENT**done)
        move = first / (np.sqrt(second) + EPSILON * np.sqrt(second.max(initial=0.0)) + 1e-300)
        self._at = self._inside(self._at - self._rate() * move)

    def _rate(self) -> float:
        """Constant, then falling to `final` of it over the second half of the budget along a half cosine."""
        settings = self._settings
        share = min(1.0, self._asked / max(1, self._task.num_trials))
        fall = max(0.0, share - settings.hold) / max(1e-9, 1 - settings.hold)
        low = settings.final
        return settings.step_size * 0.5**self._failed * (low + (1 - low) * (1 + np.cos(np.pi * fall)) / 2)

    def _inside(self, at: np.ndarray) -> np.ndarray:
        """The nearest allowed point: inside the trust region and the boxes."""
        radius, away = self._settings.radius, at - self._center
        if radius is not None and (size := float(np.linalg.norm(away))) > radius:
            at = self._center + away * (radius / size)
        space = self._task.space
        return np.clip(at, space.lower * self._lengths, space.upper * self._lengths)

    def _back_off(self) -> None:
        """A candidate broke: return to the last one that did not, with half the step and no momentum."""
        self._failed += 1
        self._first[:] = 0
        self._at = (self._path[-1] if self._path else self._center).copy()

    def best(self) -> np.ndarray:
        """The average of the last quarter of the iterates; the newest where there are none."""
        return self._mean(max(1, round(len(self._path) / 4)))

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """Averages over the last iterates, and the last one."""
        sizes = sorted({max(1, round(len(self._path) * share)) for share in TAILS}, reverse=True)
        names = {size: f"mean of {size} iterates" if size > 1 else "last iterate" for size in sizes}
        return [(names[size], self._mean(size)) for size in sizes][:count]

    def _mean(self, size: int) -> np.ndarray:
        return np.mean(self._path[-size:], axis=0) / self._lengths if self._path else self._begin


def lengths(space: SearchSpace) -> np.ndarray:
    """How far unit steps along the coordinates move the weights, relative to one another, shape (size,)."""
    return space.lengths / space.scale


@register("searcher", "gradient", source="Adam, arXiv:1412.6980, on the exact derivative; see docs/methods.md")
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
    """

    step_size: float = 0.3
    noise: str = "fresh"
    num_blocks: int = 8
    radius: float | None = None
    hold: float = 0.5
    final: float = 0.1

    def __post_init__(self) -> None:
        if not self.step_size > 0 or (self.radius is not None and not self.radius > 0):
            raise ConfigError(
                f"`searcher.step_size` is {self.step_size} and `searcher.radius` {self.radius}; both must be above 0."
            )
        if self.noise not in NOISES or self.num_blocks < 1:
            raise ConfigError(
                f"`searcher.noise` is `{self.noise}` with `num_blocks` {self.num_blocks}; it must be one of "
                f"{', '.join(NOISES)}, with at least 1 block."
            )
        if not 0 <= self.hold <= 1 or not 0 <= self.final <= 1:
            raise ConfigError(f"`searcher.hold` is {self.hold} and `final` {self.final}; both must lie in [0, 1].")

    def start(self, task: Task) -> _Session:
        """Begin at the best start; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, or the problem has no gradient.
        """
        begin = task.begin()
        if task.no_gradient is not None:
            raise ConfigError(
                f"searcher `gradient` needs a derivative, and {task.no_gradient}. "
                "Use searcher=cma, or another objective."
            )
        return _Session(self, task, begin)

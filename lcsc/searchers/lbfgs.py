"""L-BFGS on the exact derivative of the score, on noise that stays put while a curvature is learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.searchers.base import Proposal, Session, Task, check_told
from lcsc.searchers.gradient import BEST_TAIL, Region, check_idle, need_gradient, tail_mean, tail_means

NOISES = ("common", "rotating")
#: Wolfe's conditions: least share of the promised fall, largest share of the slope that may remain.
FALL, SLOPE = 1e-4, 0.9
#: Trials of one line search.
MAX_LINE = 12
#: A promised fall of this share of the value is none: arithmetic has no more digits.
TOLERANCE = 1e-15
#: How much of a step is left after a candidate that broke.
SHRINK = 0.25
#: Nearer to the start than this share of the first line search's longest try, a place may be the start itself.
APART = 1e-6

Told = tuple[float, np.ndarray] | None
Steps = Generator[np.ndarray, Told, "_Place | None"]


@dataclass(frozen=True, eq=False)
class _Place:
    """Somewhere that was scored: place and gradient, shape (size,), in coordinates of equal length, and value."""

    at: np.ndarray
    value: float
    slope: np.ndarray


class _Curvature:
    """What the last moves told about the second derivative (Nocedal & Wright, Numerical Optimization, section 7.2)."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.shrink: float | None = None  # of the gradient where nothing else is known; None before the first move

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def forget(self) -> None:
        """Drop the moves; the size of a step stays known."""
        self._pairs.clear()

    def learn(self, old: _Place, new: _Place) -> None:
        """Keep a move, unless the function is not convex along it."""
        move, turn = new.at - old.at, new.slope - old.slope
        if move @ turn > 1e-10 * np.linalg.norm(move) * np.linalg.norm(turn):
            self._pairs = [*self._pairs, (move, turn)][-self._memory :]
            self.shrink = float(move @ turn / (turn @ turn))

    def newton(self, slope: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Algorithm 7.4, the two loops, on the `free` coordinates: approximately inverse Hessian @ slope."""
        pairs = [(move * free, turn * free) for move, turn in self._pairs]
        pairs = [
            pair for pair in pairs if pair[0] @ pair[1] > 1e-10 * np.linalg.norm(pair[0]) * np.linalg.norm(pair[1])
        ]
        rest, weights = slope * free, []
        for move, turn in reversed(pairs):
            weights.append(float(move @ rest / (move @ turn)))
            rest = rest - weights[-1] * turn
        rest = rest * (self.shrink or 1.0)
        for move, turn in pairs:
            rest = rest + move * (weights.pop() - float(turn @ rest / (move @ turn)))
        return rest * free


class _Session:
    """The algorithm is a generator of places that is sent what was found there."""

    def __init__(self, settings: Lbfgs, task: Task, begin: np.ndarray) -> None:
        self._settings, self._begin = settings, begin
        self._region = Region.around(task.space, begin, settings.radius)
        self._path: list[np.ndarray] = []  # accepted places of the present noise
        self._ends: list[np.ndarray] = []  # where the blocks of noise before ended
        self._common: list[np.ndarray] = []  # the path on the common noise, once it has ended
        self._tried: list[_Place] = []  # scored places of the last line search
        self._stayed = True  # no place was accepted but the start
        self._asked = self._blocks = self._used = 0
        self._steps = self._descend()
        self._want = next(self._steps)

    def ask(self) -> Proposal:
        self._asked += 1
        if self._settings.noise == "rotating":
            block = self._blocks % self._settings.num_blocks
        else:
            block = self._blocks - 1 if self._blocks else None
        return Proposal(self._asked - 1, self._region.vector(self._want), gradient=True, block=block)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        self._used += 1
        slope = None if gradient is None else np.asarray(gradient, dtype=np.float64) / self._region.lengths
        self._want = self._steps.send(None if slope is None else (float(value), slope))

    def best(self) -> np.ndarray:
        """The lowest place on the common noise; after several blocks the average of the last quarter of their ends."""
        if self._ends:
            return tail_mean(self._all_ends(), BEST_TAIL, self._region)
        return self._region.vector(self._path[-1]) if self._path else self._begin

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """Averages over the ends of the last blocks, and places along the path on the common noise, the last first.

        Early places fit that noise less.
        """
        means = tail_means(self._all_ends(), "block end", self._region) if self._ends else []
        path = self._common or ([] if self._ends else self._path)
        num, rest = len(path), count - len(means)
        if not num:
            return (means or [("start", self._begin)])[:count]
        rest = max(rest, count // 2)
        places = sorted({num - math.floor(num * share / rest) for share in range(rest)}, reverse=True)
        rows = [(f"iterate {place} of {num}", self._region.vector(path[place - 1])) for place in places]
        unique: dict[bytes, tuple[str, np.ndarray]] = {}
        for label, vector in [*means[: count - len(rows)], *rows]:
            unique.setdefault(vector.tobytes(), (label, vector))
        return list(unique.values())

    def _all_ends(self) -> list[np.ndarray]:
        return [*self._ends, *self._path[-1:]]

    def _descend(self) -> Generator[np.ndarray, Told, None]:
        """One function after the other, each from where the last one ended.

        The common noise is left for new blocks of noise once no way leads down on it.
        """
        at, curvature = self._region.center, _Curvature(self._settings.memory)
        rotating = self._settings.noise == "rotating"
        while True:
            while (told := (yield at)) is None:  # the start may break on some noise only
                pass
            place = _Place(at, *told)
            self._path = self._path or [at]
            while not rotating or self._used < self._settings.block_trials:
                new = yield from self._move(place, curvature)
                if self._stayed and new is not None and new not in self._apart(place):
                    new = None
                if new is None and not curvature:
                    new = self._beside(place)
                    if new is None:
                        break
                    place, self._path = new, [new.at]
                    continue
                if new is None:
                    curvature.forget()
                    continue
                curvature.learn(place, new)
                place, self._stayed = new, False
                self._path.append(place.at)
            at = place.at
            curvature.forget()
            self._ends.append(at)
            if not rotating and not self._common:
                self._common = self._path
            self._path, self._used, self._blocks = [], 0, self._blocks + 1

    def _beside(self, start: _Place) -> _Place | None:
        """The lowest place tried around a start that no way leads down from; None where none was, or once it is left.

        A start may stand alone: a baseline beside the plane of a truncated space is lower than all around it.
        """
        around = self._apart(start) if self._stayed else []
        self._stayed = False
        return min(around, key=lambda place: place.value, default=None)

    def _apart(self, start: _Place) -> list[_Place]:
        """The places of the last line search that are not as good as the start itself."""
        ways = [float(np.linalg.norm(place.at - start.at)) for place in self._tried]
        return [place for place, way in zip(self._tried, ways, strict=True) if way > APART * max(ways)]

    def _move(self, old: _Place, curvature: _Curvature) -> Steps:
        """The next place; None where the curvature, or if there is none the slope, leads no further down."""
        self._tried = []
        slope, free, normal = self._inner_slope(old)
        way = -curvature.newton(slope, free)
        if normal is not None:
            way = way - (way @ normal) * normal
        if not way @ slope < 0:
            curvature.forget()
            way = -curvature.newton(slope, free)
        if -float(way @ slope) <= TOLERANCE * abs(old.value):
            return None
        first = self._settings.step_size / float(np.linalg.norm(way)) if curvature.shrink is None else 1.0
        return (yield from self._line(old, slope, way, first))

    def _line(self, old: _Place, slope: np.ndarray, way: np.ndarray, share: float) -> Steps:
        """A place that fulfils Wolfe's conditions, by bracketing and cubic interpolation.

        Where the way leaves the region its places are drawn back, and a fall is enough.
        """
        low, low_place = (0.0, old.value, float(way @ slope)), None
        high: tuple[float, float | None, float | None] | None = None
        gaps: list[tuple[float, float]] = []
        for _ in range(MAX_LINE):
            wanted = old.at + share * way
            at = self._region.nearest(wanted)
            if np.array_equal(at, old.at):  # arithmetic has no shorter step
                break
            told = yield at
            if told is None:
                high = (share, None, None)
                share = low[0] + SHRINK * (share - low[0])
                continue
            here = _Place(at, *told)
            self._tried.append(here)
            end = (share, here.value, float(here.slope @ way))
            if not here.value <= old.value + FALL * float(slope @ (at - old.at)) or here.value == old.value:
                high = end
            elif end[2] >= SLOPE * float(way @ slope) or not np.allclose(at, wanted, rtol=1e-12, atol=0):
                return here
            else:
                low, low_place = end, here
            gaps.append((share, here.value - share * end[2] - old.value))
            if self._stayed and low_place is None and _alone(gaps):
                break
            share = _between(low, high) if high is not None else share * 4
        return low_place

    def _inner_slope(self, old: _Place) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The slope without what points out of the region, which coordinates are free, and the rim's normal."""
        region, slope = self._region, old.slope
        stuck = ((old.at <= region.lower) & (slope > 0)) | ((old.at >= region.upper) & (slope < 0))
        slope, away = np.where(stuck, 0.0, slope), old.at - region.center
        outward = region.outward(away)
        if region.radius is None or region.distance(away) < region.radius * (1 - 1e-9) or not slope @ outward < 0:
            return slope, ~stuck, None
        normal = np.where(stuck, 0.0, outward)
        normal = normal / np.linalg.norm(normal)
        return slope - (slope @ normal) * normal, ~stuck, normal


def _alone(gaps: list[tuple[float, float]]) -> bool:
    """Whether a start stands alone, as far as shorter and shorter steps tell.

    A gap is what the tangent at a place leads back to at the start, less the start's own value: of the order of the
    step's square where the function is smooth, constant where the start is no part of it. Two shortenings in a row in
    which it falls more slowly than the step itself are enough.

    Args:
        gaps: share of the way and gap of each place tried, in order.
    """
    if len(gaps) < 3:
        return False
    pairs = itertools.pairwise(gaps[-3:])
    return all(0 < b < a and gap > before * b / a > 0 for (a, before), (b, gap) in pairs)


def _between(low: tuple[float, float, float], high: tuple[float, float | None, float | None]) -> float:
    """The lowest point of the cubic through two ends with their slopes (Nocedal & Wright, equation 3.59).

    The middle where there is none, kept off the ends.
    """
    (a, value_a, slope_a), (b, value_b, slope_b) = low, high
    if value_b is None or slope_b is None:
        return a + SHRINK * (b - a)
    one = slope_a + slope_b - 3 * (value_a - value_b) / (a - b)
    square = one**2 - slope_a * slope_b
    share = 0.5
    if 0 <= square < math.inf:
        two = math.sqrt(square)
        bottom = slope_b - slope_a + 2 * two
        share = 1 - (slope_b + two - one) / bottom if bottom else 0.5
    return a + (b - a) * (min(max(share, 0.1), 0.9) if math.isfinite(share) else 0.5)


@register("searcher", "lbfgs", source="L-BFGS, Nocedal & Wright, Numerical Optimization, algorithm 7.4")
@dataclass(frozen=True)
class Lbfgs:
    """L-BFGS on exact derivatives; it needs a fixed function, so all steps, or those of a block, see the same noise.

    From a minimum on the common noise it goes on, on new blocks of noise, one after the other.

    Args:
        step_size: length of the very first move, in coordinates whose unit steps are equally long in weight space.
        noise: `common` (that of all trials) or `rotating` (`num_blocks` blocks in turn, the curvature learned anew on
            each).
        num_blocks: blocks of rotating noise.
        block_trials: trials on one of them, at least; a line search is not cut off.
        radius: largest distance from the start in weight space, in the same unit; None means no limit.
        memory: number of moves that the curvature is learned from.
    """

    step_size: float = 1.0
    noise: str = "common"
    num_blocks: int = 8
    block_trials: int = 20
    radius: float | None = None
    memory: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.step_size < math.inf or (self.radius is not None and not self.radius > 0):
            raise ConfigError(
                f"`searcher.step_size` is {self.step_size} and `searcher.radius` {self.radius}; both must be above 0, "
                "the first finite."
            )
        if self.noise not in NOISES:
            raise ConfigError(f"`searcher.noise` is `{self.noise}`; it must be one of {', '.join(NOISES)}.")
        for name in ("num_blocks", "block_trials", "memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`searcher.{name}` is {getattr(self, name)}; it must be at least 1.")
        for name in ("num_blocks", "block_trials"):
            check_idle(self, name, "rotating")

    def start(self, task: Task) -> Session:
        """Begin at the best start; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, no gradient, or a radius that would be no distance.
        """
        begin = task.begin()
        need_gradient("lbfgs", task)
        return _Session(self, task, begin)

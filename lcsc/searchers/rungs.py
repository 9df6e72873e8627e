"""Pieces of the ladder: its rungs, the lines of the extrapolations, and the test that decides between two points."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start

#: Rungs that come scored, lowest first, and the families of starts that stand on each.
SCORED: dict[str, tuple[str, ...]] = {
    "last": ("last",),
    "best_single": ("best_single",),
    "uniform": ("uniform",),
    "ema": ("ema", "power_ema"),
    "wsm": ("wsm",),
}
AVERAGES = ("uniform", "ema", "power_ema", "wsm")
GOLDEN = (1 + math.sqrt(5)) / 2
#: A parabola's vertex closer to the best point than this share of the bracket teaches nothing new.
NEAREST = 0.02


@dataclass(frozen=True)
class Verdict:
    """A paired comparison: by how much the rival is lower on average, and the chance of that where it is not lower."""

    gain: float
    se: float
    p: float


def paired_test(champion_B: np.ndarray, rival_B: np.ndarray) -> Verdict:
    """Student's paired one-sided t-test of `rival < champion` on B common noise blocks, NaN where a value is missing.

    d_b = champion_b - rival_b, t = mean(d) / (sd(d) / sqrt(B)), p = P(T_(B-1) > t).
    """
    from scipy.special import stdtr

    diff_B = champion_B - rival_B
    diff_B = diff_B[np.isfinite(diff_B)]
    if diff_B.size < 2:
        return Verdict(math.nan, math.nan, 1.0)
    gain, se = float(diff_B.mean()), float(diff_B.std(ddof=1) / math.sqrt(diff_B.size))
    if se == 0:  # no noise at all: what is lower is lower
        return Verdict(gain, se, 0.0 if gain > 0 else 1.0)
    return Verdict(gain, se, float(stdtr(diff_B.size - 1, -gain / se)))


@dataclass(frozen=True, eq=False)
class Rung:
    """A rung, the point that stands for it, and how it fared.

    Args:
        name: of the rung, such as `ema` or `low rank 8`.
        label: of the point.
        vector: float64, shape (space.size,).
        value: a score of it, infinite where nobody knows one.
        against: label of the champion it was compared with.
        verdict: of the comparison; None where there was none.
        taken: whether it became the champion.
        note: why there was no comparison.
    """

    name: str
    label: str
    vector: np.ndarray
    value: float = math.inf
    against: str = ""
    verdict: Verdict | None = None
    taken: bool = False
    note: str = ""

    def line(self) -> str:
        """The rung in words."""
        head = self.name if self.label in ("", self.name) else f"{self.name} ({self.label})"
        if self.verdict is None:
            return f"{head}: {self.note}"
        found = self.verdict
        fate = "taken" if self.taken else "not taken"
        apart = f"{abs(found.gain):.4g} +- {found.se:.2g} {'higher' if found.gain < 0 else 'lower'}"
        return f"{head}: {apart} than {self.against}, p {found.p:.2g}, {fate}"


def scored_rungs(starts: Sequence[Start]) -> list[Rung]:
    """The best of each rung that comes scored, lowest rung first; families nobody knows are the highest."""
    known = {family: rung for rung, families in SCORED.items() for family in families}
    best: dict[str, Start] = {}
    for start in starts:  # best first
        best.setdefault(known.get(start.family, start.family), start)
    names = [name for name in SCORED if name in best] + [name for name in best if name not in SCORED]
    return [Rung(name or "start", best[name].label, best[name].vector, best[name].value) for name in names]


@dataclass(frozen=True, eq=False)
class Line:
    """Points origin + t * direction. `known`: t -> value of those that come scored; `step`: the first t to try."""

    label: str
    origin: np.ndarray
    direction: np.ndarray
    known: Mapping[float, float]
    step: float


def lines(starts: Sequence[Start]) -> list[Line]:
    """Extrapolations with one parameter, as far as the scored starts (best first) have what they are made of."""
    last, average, ema = _first(starts, "last"), _first(starts, *AVERAGES), _first(starts, "ema", "power_ema")
    oldest, pair = _oldest(starts), _neighbour(starts, average)
    found = []
    if ema and last and oldest:  # BEMA, arXiv:2508.00180: EMA + alpha (theta_t - theta_0)
        label = f"{ema.label} + t (newest - oldest)"
        found.append(Line(label, ema.vector, last.vector - oldest.vector, {0.0: ema.value}, 0.2))
    if average and pair:  # Extra-Merge, arXiv:2605.26484: on along the line of successive merged checkpoints
        other, sign = pair
        known = {0.0: average.value, sign: other.value}
        label = f"{average.label} from {other.label}"
        found.append(Line(label, average.vector, sign * (other.vector - average.vector), known, 1.0))
    if average and last:
        known = {0.0: average.value, -1.0: last.value}
        label = f"{last.label} through {average.label}"
        found.append(Line(label, average.vector, average.vector - last.vector, known, 0.5))
    return [line for line in found if np.any(line.direction)]


def _first(starts: Sequence[Start], *families: str) -> Start | None:
    return next((start for start in starts if start.family in families), None)


def _number(start: Start) -> float | None:
    """The first number of a label: a step, a window, a half-life."""
    found = re.search(r"\d+(\.\d+)?(e[+-]?\d+)?", start.label)
    return float(found[0]) if found else None


def _numbered(starts: Sequence[Start], family: str) -> list[tuple[float, Start]]:
    """Members of a family with the number of their label, smallest first."""
    pairs = [(_number(start), start) for start in starts if start.family == family]
    return sorted(((number, start) for number, start in pairs if number is not None), key=lambda pair: pair[0])


def _oldest(starts: Sequence[Start]) -> Start | None:
    singles = _numbered(starts, "best_single")
    return singles[0][1] if singles else None


def _neighbour(starts: Sequence[Start], average: Start | None) -> tuple[Start, float] | None:
    """The next longer average of the same family, at t = -1; the next shorter one, at t = 1, where none is longer."""
    if average is None:
        return None
    family = [start for _, start in _numbered(starts, average.family)]
    place = next((i for i, start in enumerate(family) if start is average), None)
    if place is None or len(family) < 2:
        return None
    return (family[place + 1], -1.0) if place + 1 < len(family) else (family[place - 1], 1.0)


def next_t(points: Mapping[float, float], step: float) -> float:
    """Where to look next for the minimum on a line, given t -> value with 0 among them.

    Outward by golden ratios until a bracket is found (first by `step`), then to the vertex of the parabola through its
    three points, or by golden section where the vertex is of no use (Press et al., Numerical Recipes, 10.1 to 10.3).
    """
    ts = sorted(points)
    place = min(range(len(ts)), key=lambda i: (points[ts[i]], abs(ts[i])))
    b = ts[place]
    if place == len(ts) - 1:
        return b + (step if b == 0 else GOLDEN * (b - ts[place - 1]))
    if place == 0:
        return b - (step if b == 0 else GOLDEN * (ts[1] - b))
    a, c = ts[place - 1], ts[place + 1]
    right, left = (b - a) * (points[b] - points[c]), (b - c) * (points[b] - points[a])
    if right != left and math.isfinite(right - left):
        vertex = b - ((b - a) * right - (b - c) * left) / (2 * (right - left))
        if a < vertex < c and min(abs(vertex - t) for t in (a, b, c)) > NEAREST * (c - a):
            return vertex
    return b + (c - b) / GOLDEN**2 if c - b > b - a else b - (b - a) / GOLDEN**2


@dataclass(frozen=True, eq=False)
class Family:
    """Some floats of a space. `index`: which, increasing; `space`: those alone."""

    name: str
    share: float
    index: np.ndarray
    space: SearchSpace


def families(space: SearchSpace, rank: int, shares: Mapping[str, float]) -> list[Family]:
    """Nested families to search: the first `rank` floats of the boxes of level 0, all of these, and all boxes.

    Low rank and all boxes are left out where they are no other than the full family.
    """
    full = [box.size if box.level == 0 else 0 for box in space.boxes]
    low, groups = [min(rank, size) for size in full], [box.size for box in space.boxes]
    offsets = np.cumsum([0, *groups[:-1]])
    found: list[Family] = []
    for name, key, heads in (
        (f"low rank {rank}", "low rank", low),
        ("full", "full", full),
        ("groups", "groups", groups),
    ):
        if sum(heads) == 0 or (heads is not full and heads == full):
            continue
        index = np.concatenate([np.arange(at, at + head) for at, head in zip(offsets, heads, strict=True)])
        boxes = tuple(_head(box, head) for box, head in zip(space.boxes, heads, strict=True) if head)
        found.append(Family(name, shares[key], index, SearchSpace(boxes)))
    return found


def _head(box: Box, size: int) -> Box:
    """The first `size` floats of a box."""
    if size == box.size:
        return box
    lengths = None if box.lengths is None else box.lengths[:size]
    return dataclasses.replace(box, size=size, lengths=lengths, natural=None)

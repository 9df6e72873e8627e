"""Tunes that are nearly the same: settings of one melody, in whatever key."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

#: Steps of melody compared at once, the share of the shorter tune's that makes two tunes one, and in how many tunes a
#: figure is common property.
LENGTH, SHARE, COMMON = 8, 0.4, 40
_NOTE = re.compile(r"([A-Ga-g])([,']*)")
_UNHEARD = re.compile(r"^[A-Z]:.*$|\[[A-Z]:[^\]]*\]|\{[^}]*\}", re.M)


def melody(body: str) -> tuple[int, ...]:
    """Steps between neighbouring notes on the staff: neither key nor rhythm nor accidentals count, nor grace notes."""
    heights = [
        "CDEFGABcdefgab".index(letter) + 7 * (marks.count("'") - marks.count(","))
        for letter, marks in _NOTE.findall(_UNHEARD.sub("", body))
    ]
    return tuple(np.diff(heights).tolist())


def groups_of(bodies: Sequence[str], titles: Sequence[str] | None = None) -> np.ndarray:
    """A number for each tune, int64 (N,): equal for tunes of one title, and for those that share 40 % of their figures
    of eight steps, also by way of a third tune.

    Args:
        bodies: the notes in ABC notation.
        titles: empty ones are nobody's.
    """
    leader = list(range(len(bodies)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    def join(i: int, j: int) -> None:
        first, second = sorted((find(i), find(j)))
        leader[second] = first

    seen: dict[object, int] = {}
    figures = []
    for i, body in enumerate(bodies):
        steps = melody(body)
        join(i, seen.setdefault(steps, i))
        title = re.sub(r"^the|[^a-z0-9]", "", titles[i].lower()) if titles else ""
        if title:
            join(i, seen.setdefault(title, i))
        # the same melody again needs no second comparison
        figures.append(_figures(steps) if seen[steps] == i else frozenset())
    where: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, mine in enumerate(figures):
        for figure in mine:
            where[figure].append(i)
    for i, mine in enumerate(figures):
        shared: Counter[int] = Counter()
        for figure in mine:
            if len(where[figure]) <= COMMON:
                shared.update(j for j in where[figure] if j < i)
        for j, count in shared.items():
            if count >= SHARE * min(len(mine), len(figures[j])):
                join(i, j)
    return np.array([find(i) for i in range(len(bodies))], dtype=np.int64)


def _figures(steps: tuple[int, ...]) -> frozenset[tuple[int, ...]]:
    return frozenset(steps[i : i + LENGTH] for i in range(max(1, len(steps) - LENGTH + 1)))

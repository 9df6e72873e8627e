"""The evolutionary search of the LCSC paper, as far as it is published."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.searchers.base import Proposal, Task, check_told

#: Families of starts that make up the first population, where there are any.
EMA_LIKE = ("ema", "power_ema")


@dataclass(frozen=True, eq=False)
class _Member:
    value: float
    uid: int
    vector: np.ndarray

    @property
    def rank(self) -> tuple[float, int]:
        return self.value, self.uid


class _Session:
    """Everything that was ever scored is the population; the best `num_parents` of it breed."""

    width = math.inf

    def __init__(self, settings: LcscEvolution, task: Task) -> None:
        self._settings, self._space = settings, task.space
        self._rng = SeedRange(task.seed, Purpose.SEARCHER).generator()
        first = [start for start in task.starts if start.family in EMA_LIKE] or list(task.starts)
        self._scored = [_Member(start.value, place - len(first), start.vector) for place, start in enumerate(first)]
        self._begin, self._asked = task.begin(), 0
        self._open: dict[int, np.ndarray] = {}
        self._parents: list[list[np.ndarray]] = []

    def ask(self) -> Proposal:
        uid, settings = self._asked, self._settings
        self._asked += 1
        if uid % settings.num_children == 0:
            best = sorted(self._scored, key=lambda member: member.rank)[: settings.num_parents]
            self._parents = [self._space.to_natural(v) for v in [member.vector for member in best] or [self._begin]]
        vector = self._space.from_natural(self._mutate(self._cross()))
        self._open[uid] = vector
        return Proposal(uid, vector)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        self._scored.append(_Member(float(value), uid, self._open.pop(uid)))

    def best(self) -> np.ndarray:
        """The best of the population."""
        return min(self._scored, key=lambda member: member.rank).vector if self._scored else self._begin

    def finalists(self, count: int) -> None:
        """The best trials."""
        return

    def _cross(self) -> list[np.ndarray]:
        """Each number of one parent or the other; most children have one parent only."""
        rng, settings = self._rng, self._settings
        one, other = rng.integers(len(self._parents), size=2)
        if not rng.random() < settings.crossover:
            return self._parents[one]
        pairs = zip(self._parents[one], self._parents[other], strict=True)
        return [np.where(rng.random(a.size) < settings.first_share, a, b) for a, b in pairs]

    def _mutate(self, child: list[np.ndarray]) -> list[np.ndarray]:
        """Normal noise on some numbers, on at least one."""
        rng, settings, sizes = self._rng, self._settings, [part.size for part in child]
        hit = rng.random(sum(sizes)) < settings.mutation
        if not hit.any():
            hit[rng.integers(hit.size)] = True
        units = [1.0 if box.natural is not None else box.scale for box in self._space.boxes]
        noise = rng.standard_normal(hit.size) * np.repeat(units, sizes) * settings.mutation_scale * hit
        return [part + move for part, move in zip(child, np.split(noise, np.cumsum(sizes)[:-1]), strict=True)]


@register(
    "searcher",
    "lcsc_evolution",
    source="LCSC Algorithm 1, arXiv:2404.02241; constants of its authors' EEP; see docs/methods.md",
)
@dataclass(frozen=True)
class LcscEvolution:
    """Elite parents, uniform crossover, sparse normal mutation, in the coefficients themselves.

    Known from the paper: the first population are EMA-like coefficients, the best of all scored ones breed, children
    are crossed and mutated, coefficients sum to one. Its numbers were never published; crossover and mutation are those
    of the same authors' EEP search (arXiv:2407.00945), the sizes are ours.

    Args:
        num_parents: how many of the best breed.
        num_children: trials of one generation; parents are chosen anew after each.
        crossover: probability that a child has two parents.
        first_share: probability of each number to come from the first of them.
        mutation: probability of each number to move.
        mutation_scale: standard deviation of a move, in coefficients.
    """

    num_parents: int = 10
    num_children: int = 20
    crossover: float = 0.3
    first_share: float = 0.6
    mutation: float = 0.25
    mutation_scale: float = 0.065
    learns = True  # its first population are baselines with their scores

    def __post_init__(self) -> None:
        if self.num_parents < 1 or self.num_children < 1 or not 0 < self.mutation_scale < math.inf:
            raise ConfigError(
                f"`searcher.num_parents` is {self.num_parents}, `num_children` {self.num_children} and "
                f"`mutation_scale` {self.mutation_scale}; all must be above 0, and finite."
            )
        for name in ("crossover", "first_share", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"`searcher.{name}` is {getattr(self, name)}; a probability lies in [0, 1].")
        if self.crossover == 0 and self.first_share != LcscEvolution.first_share:
            raise ConfigError(
                f"`searcher.first_share` is {self.first_share}, but counts for nothing with `searcher.crossover` 0. "
                "Raise `crossover`, or leave `first_share` out."
            )

    def start(self, task: Task) -> _Session:
        """Begin with the EMA-like starts; with all where there are none; see `Searcher.start`."""
        return _Session(self, task)

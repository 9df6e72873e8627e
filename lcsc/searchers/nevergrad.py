"""Optimizers of nevergrad by the names we vouch for; each passes the contract tests.

nevergrad costs seconds to import and is imported by `start` alone. Its state is never pickled (that fails for
a third of its optimizers): a search is resumed by replaying its own asks and tells from the seed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.searchers.base import Proposal, Task, check_told


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence pycma's guess that asking for one point at a time, as nevergrad does, were an oversight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*orphanated injected solution")
        yield


class _Session:
    def __init__(self, optimizer: Any, scale: np.ndarray) -> None:
        self._optimizer = optimizer
        self._scale = scale
        self._asked: dict[int, Any] = {}
        self._count = 0

    def ask(self) -> Proposal:
        with _quiet():
            candidate = self._optimizer.ask()
        uid = self._count
        self._count += 1
        self._asked[uid] = candidate
        return Proposal(uid, np.asarray(candidate.value, dtype=np.float64) * self._scale)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        with _quiet():
            self._optimizer.tell(self._asked.pop(uid), float(value))

    def best(self) -> np.ndarray:
        return np.asarray(self._optimizer.provide_recommendation().value, dtype=np.float64) * self._scale

    def finalists(self, count: int) -> None:
        """The best trials."""
        return


@register("searcher", "cma", source="CMA-ES, arXiv:1604.00772, by nevergrad", optimizer="CMA")
@register("searcher", "diagonal_cma", source="sep-CMA-ES, PPSN 2008, by nevergrad", optimizer="DiagonalCMA")
@register("searcher", "de", source="differential evolution, Storn & Price 1997, by nevergrad", optimizer="DE")
@register("searcher", "two_points_de", source="DE with two-point crossover, by nevergrad", optimizer="TwoPointsDE")
@register(
    "searcher",
    "pso",
    source="particle swarm, Kennedy & Eberhart 1995, in real space, by nevergrad",
    optimizer="RealSpacePSO",
)
@register(
    "searcher",
    "one_plus_one",
    source="(1+1) evolution strategy, Schumer & Steiglitz 1968, by nevergrad",
    optimizer="OnePlusOne",
)
@register("searcher", "tbpsa", source="TBPSA, PPSN 2016, by nevergrad", optimizer="TBPSA")
@register("searcher", "random", source="Gaussian random search, by nevergrad", optimizer="RandomSearch")
@dataclass(frozen=True)
class Nevergrad:
    """A black-box optimizer of nevergrad.

    Args:
        optimizer: its name in nevergrad's registry.
        sigma0: length of the first moves, in units of the boxes' scale.
    """

    optimizer: str = "CMA"
    sigma0: float = 1.0

    def __post_init__(self) -> None:
        if not self.sigma0 > 0:
            raise ConfigError(f"`searcher.sigma0` is {self.sigma0}; it must be above 0.")

    def start(self, task: Task) -> _Session:
        """Begin at the best start; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, or no such optimizer.
        """
        import nevergrad as ng

        space, begin = task.space, task.begin()
        if self.optimizer not in ng.optimizers.registry:
            raise ConfigError(
                f"nevergrad has no optimizer `{self.optimizer}`.{did_you_mean(self.optimizer, ng.optimizers.registry)}"
            )
        scale = space.scale
        lower, upper = space.lower / scale, space.upper / scale
        bounded = np.isfinite(lower) & np.isfinite(upper)
        if (bounded.any() and not bounded.all()) or (np.isfinite(lower) ^ np.isfinite(upper)).any():
            raise ConfigError("some boxes have bounds and some have none. Give all of them both bounds, or none.")
        start = np.clip(begin / scale, lower, upper)
        array = ng.p.Array(init=start).set_mutation(sigma=self.sigma0)
        if bounded.all():
            array = array.set_bounds(lower, upper)
        state = SeedRange(task.seed, Purpose.SEARCHER).generator().integers(2**32)
        array.random_state.seed(int(state))
        return _Session(ng.optimizers.registry[self.optimizer](array, budget=task.num_trials, num_workers=1), scale)

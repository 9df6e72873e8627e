"""The searcher to use when nobody chose one."""

from __future__ import annotations

from dataclasses import dataclass

from lcsc.core.registry import register
from lcsc.searchers.base import Session, Task
from lcsc.searchers.gradient import Gradient
from lcsc.searchers.nevergrad import Nevergrad


@register("searcher", "auto", source="the winner of benchmarks/search_efficiency.py; see docs/choosing_a_searcher.md")
@dataclass(frozen=True)
class Auto:
    """The descent of searcher `gradient` where the problem has a derivative, CMA-ES of searcher `cma` where not."""

    def start(self, task: Task) -> Session:
        """Begin at the best start; see `Searcher.start`."""
        return Gradient().start(task) if task.no_gradient is None else Nevergrad("CMA").start(task)

"""The searcher to use when nobody chose one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcsc.core.registry import register
from lcsc.searchers.base import Accountable, Proposal, Session, Task, width_of
from lcsc.searchers.gradient import Gradient
from lcsc.searchers.nevergrad import Nevergrad


class _Session:
    """The chosen searcher's session, which says what was chosen and why."""

    def __init__(self, ran: str, why: str, session: Session) -> None:
        self.ran, self._why, self._session = ran, why, session
        self.width = width_of(session)

    def ask(self) -> Proposal:
        return self._session.ask()

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        self._session.tell(uid, value, gradient)

    def best(self) -> np.ndarray:
        return self._session.best()

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]] | None:
        return self._session.finalists(count)

    def account(self) -> list[str]:
        """The choice, then what the chosen one has to tell."""
        told = self._session.account() if isinstance(self._session, Accountable) else []
        return [f"auto chose {self.ran}: {self._why}", *told]


@register("searcher", "auto", source="the winner of benchmarks/search_efficiency.py; see docs/choosing_a_searcher.md")
@dataclass(frozen=True)
class Auto:
    """The descent of searcher `gradient` where the problem has a derivative, CMA-ES of searcher `cma` where not."""

    def start(self, task: Task) -> Session:
        """Begin at the best start; see `Searcher.start`."""
        if task.no_gradient is None:
            return _Session("gradient", "the problem has a derivative", Gradient().start(task))
        return _Session("cma", task.no_gradient, Nevergrad("CMA", warm_start=False).start(task))

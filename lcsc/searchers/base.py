"""What a searcher is: it proposes vectors and hears values. It sees boxes and floats only."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from lcsc.core.space import SearchSpace


class Session(Protocol):
    """One search under way. The same seed and the same values give the same proposals, bit for bit."""

    def ask(self) -> tuple[int, np.ndarray]:
        """The next proposal: its number, counted from 0, and a float64 vector, shape (space.size,)."""
        ...

    def tell(self, uid: int, value: float) -> None:
        """The value of proposal `uid`, finite, lower is better."""
        ...

    def best(self) -> np.ndarray:
        """The vector the searcher would recommend now, shape (space.size,)."""
        ...


@runtime_checkable
class Searcher(Protocol):
    """Configuration of a search strategy."""

    def start(self, space: SearchSpace, budget: int, seed: int, init: np.ndarray | None = None) -> Session:
        """Begin.

        Args:
            space: what to vary.
            budget: number of proposals that will be asked for in all.
            seed: of the proposals.
            init: where to start, shape (space.size,); None means the middle of the boxes, or zero.
        """
        ...

"""Points of two numbers, both to be low: which of them nothing beats, and which of those say most."""

from __future__ import annotations

import numpy as np


def pareto(cost_N: np.ndarray, loss_N: np.ndarray) -> np.ndarray:
    """Whether each point is beaten by none, bool, shape (N,): of equal ones the first counts."""
    best, kept = np.inf, np.zeros(len(cost_N), bool)
    for at in np.lexsort((loss_N, cost_N)):
        kept[at] = loss_N[at] < best
        best = min(best, loss_N[at])
    return kept


def thinned(cost_N: np.ndarray, loss_N: np.ndarray, count: int) -> list[int]:
    """Places of at most `count` points of a front, cheapest first: both ends, and those that fill it between.

    The point whose loss costs the front least area goes first, and so on (Beume et al. 2007, SMS-EMOA, exclusive
    hypervolume in two dimensions); an area is measured in the front's own width and height.

    Args:
        cost_N, loss_N: points of which none beats another, shape (N,).
        count: at least 1; 1 keeps the point of the lowest loss.
    """
    left = [int(at) for at in np.argsort(cost_N, kind="stable")]
    if count == 1:
        return left[-1:]
    while len(left) > max(count, 2):
        cost, loss = cost_N[left], loss_N[left]
        alone = (cost[2:] - cost[1:-1]) * (loss[:-2] - loss[1:-1])
        del left[1 + int(np.argmin(alone))]
    return left

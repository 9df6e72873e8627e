"""Points of several numbers, all to be low: which of them nothing beats, and which of those say most."""

from __future__ import annotations

import numpy as np


def pareto(cost_N: np.ndarray, loss_N: np.ndarray) -> np.ndarray:
    """Whether each point is beaten by none, bool, shape (N,): of equal ones the first counts.

    Args:
        cost_N: one number of each point, shape (N,), or C numbers, shape (N, C).
        loss_N: another number of each, shape (N,).
    """
    points_NC = np.column_stack([cost_N, loss_N])
    kept = np.zeros(len(points_NC), bool)
    for at in np.lexsort(points_NC.T[::-1]):  # whatever beats a point comes before it
        kept[at] = not (points_NC[kept] <= points_NC[at]).all(1).any()
    return kept


def thinned(cost_N: np.ndarray, loss_N: np.ndarray, count: int) -> list[int]:
    """Places of at most `count` points of a front, cheapest first: all ends, and those that fill it between.

    Of two numbers the point whose loss costs the front least area goes first, and so on (Beume et al. 2007, SMS-EMOA,
    exclusive hypervolume in two dimensions); an area is measured in the front's own width and height. Of more the point
    whose neighbours are nearest goes first (Deb et al. 2002, NSGA-II, crowding distance).

    Args:
        cost_N, loss_N: as in `pareto`, points of which none beats another.
        count: at least 1; 1 keeps the point of the lowest loss. Ends beyond `count` go too.
    """
    cost_NC = cost_N.reshape(len(loss_N), -1)
    left = [int(at) for at in np.lexsort(cost_NC.T[::-1])]
    if count == 1:
        return [min(left, key=lambda at: loss_N[at])]
    if cost_NC.shape[1] > 1:
        points_NC = np.column_stack([cost_NC, loss_N])
        while len(left) > max(count, 2):
            del left[int(np.argmin(_crowding(points_NC[left])))]
        return left
    while len(left) > max(count, 2):
        cost, loss = cost_NC[left, 0], loss_N[left]
        alone = (cost[2:] - cost[1:-1]) * (loss[:-2] - loss[1:-1])
        del left[1 + int(np.argmin(alone))]
    return left


def _crowding(points_NC: np.ndarray) -> np.ndarray:
    """How far apart the neighbours of each point lie, summed over the numbers in units of their range, shape (N,)."""
    apart_N = np.zeros(len(points_NC))
    for number_N in points_NC.T:
        order_N = np.argsort(number_N, kind="stable")
        span = float(np.ptp(number_N)) or 1.0
        apart_N[order_N[[0, -1]]] = np.inf
        apart_N[order_N[1:-1]] += (number_N[order_N[2:]] - number_N[order_N[:-2]]) / span
    return apart_N

"""Numbers as a few symbols: what is dropped, and the codebook of the rest. N = numbers, S = codes."""

from __future__ import annotations

import numpy as np

#: most numbers that a codebook is fitted to
_SAMPLE = 1 << 18
_ROUNDS, _BINS = 60, 1024


def codebook(values_N: np.ndarray, size: int) -> np.ndarray:
    """At most `size` increasing numbers, float32, that stand for others with a small squared error (k-means in 1-D).

    Begins where the cube root of the density says (Panter and Dite 1951) and is the same for the same numbers; one
    number for each where there are few different ones.
    """
    ordered = np.sort(values_N[:: max(1, values_N.size // _SAMPLE)].astype(np.float64))
    if (few := np.unique(ordered)).size <= size:
        return few.astype(np.float32)
    density, edges = np.histogram(ordered, _BINS)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(density.astype(np.float64)))])
    centers = np.interp((np.arange(size) + 0.5) / size * share[-1], share, edges)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        first, last = np.concatenate([[0], cuts]), np.concatenate([cuts, [ordered.size]])
        counts = last - first
        means = (sums[last] - sums[first]) / np.maximum(counts, 1)
        centers = np.sort(np.where(counts > 0, means, centers))
    return np.unique(centers.astype(np.float32))


def nearest(values_N: np.ndarray, codes_S: np.ndarray) -> np.ndarray:
    """Index of the nearest code of each value, uint8, shape (N,); codes are increasing."""
    middles = (codes_S[1:].astype(np.float64) + codes_S[:-1]) / 2
    return np.searchsorted(middles, values_N).astype(np.uint8)


def threshold(delta_N: np.ndarray, tau: float) -> float:
    """Differences up to this size are dropped: `tau` times the median size, which has no unit."""
    return float(tau * np.median(np.abs(delta_N))) if tau and delta_N.size else 0.0

"""Hidden neurons of a chain of linear layers: permuting them, and finding the order that fits another network.

M = networks, P = flat parameters, U = units of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: most passes over several hidden layers
PASSES = 10

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class HiddenLayer:
    """Where a hidden layer's numbers lie in a flat row.

    Args:
        rows_UF: places of what belongs to a unit on its way in (weights of its row, then its bias), int64.
        columns_UG: places of the weights that read the unit in the next layer, int64.
    """

    rows_UF: np.ndarray
    columns_UG: np.ndarray

    @property
    def units(self) -> int:
        """U."""
        return len(self.rows_UF)

    @property
    def own_UE(self) -> np.ndarray:
        """All places that move with a unit."""
        return np.concatenate([self.rows_UF, self.columns_UG], 1)


def places_of(shapes: Shapes) -> dict[str, np.ndarray]:
    """Index of every number in the flat row, in the tensors' shapes; the row has them in the order of `shapes`."""
    out, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64))
        out[name] = np.arange(start, start + size).reshape(shape)
        start += size
    return out


def hidden_layers(shapes: Shapes) -> tuple[HiddenLayer, ...]:
    """The hidden layers of a chain of linear layers, by its state dict; empty where the tensors are no such chain.

    A chain is matrices `NAME.weight`, each as wide as the one before is high when they are sorted by the numbers in
    their names, with or without `NAME.bias`, and nothing else.
    """
    places = places_of(shapes)
    stems = sorted((name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2), key=_counted)
    known = {f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")}
    weights = [f"{stem}.weight" for stem in stems]
    if set(shapes) - known or any(shapes[a][0] != shapes[b][1] for a, b in pairwise(weights)):
        return ()
    found = []
    for stem, after in pairwise(stems):
        into = [places[f"{stem}.weight"]]
        if f"{stem}.bias" in places:
            into.append(places[f"{stem}.bias"][:, None])
        found.append(HiddenLayer(np.concatenate(into, 1), places[f"{after}.weight"].T))
    return tuple(found)


def _counted(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 2."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def shuffled(layers: tuple[HiddenLayer, ...], num: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random orders of the hidden units: theta_MP gathered at them computes the same functions.

    Returns:
        Places, int64, shape (num, size).
    """
    orders = [np.argsort(rng.random((num, layer.units)), axis=1) for layer in layers]
    return reordered(layers, orders, num, size)


def reordered(layers: tuple[HiddenLayer, ...], orders: list[np.ndarray], num: int, size: int) -> np.ndarray:
    """Places, int64, shape (num, size), of the numbers that an order of the units of each layer, (num, U), puts there.

    Unit u of the new network is unit order[u] of the old one.
    """
    out_MP = np.tile(np.arange(size), (num, 1))
    for layer, order_MU in zip(layers, orders, strict=True):
        # a matrix between two hidden layers moves with both, so the orders are applied one after the other
        here_MP = np.tile(np.arange(size), (num, 1))
        here_MP[:, layer.own_UE] = layer.own_UE[order_MU]
        out_MP = np.take_along_axis(out_MP, here_MP, 1)
    return out_MP


def aligning(layers: tuple[HiddenLayer, ...], theta_MP: np.ndarray, to_P: np.ndarray) -> np.ndarray:
    """The orders of the hidden units that bring networks nearest to another: exact for one hidden layer.

    For several, each layer is matched in turn, by its rows first and then by rows and columns (weight matching,
    arXiv:2209.04836), until nothing changes or `PASSES` are done.

    Args:
        layers: of all networks.
        theta_MP: floats.
        to_P: the network to be like.

    Returns:
        Places to gather at, int64, shape (M, P).
    """
    num, size = theta_MP.shape
    out_MP = np.tile(np.arange(size), (num, 1))
    if len(layers) > 1:  # columns are in no order yet
        for layer in layers:
            out_MP = _matched(layer, layer.rows_UF, theta_MP, to_P, out_MP)
    for _ in range(PASSES if len(layers) > 1 else 1):
        before_MP = out_MP
        for layer in layers:
            out_MP = _matched(layer, layer.own_UE, theta_MP, to_P, out_MP)
        if np.array_equal(out_MP, before_MP):
            break
    return out_MP


def _matched(
    layer: HiddenLayer, by_UE: np.ndarray, theta_MP: np.ndarray, to_P: np.ndarray, out_MP: np.ndarray
) -> np.ndarray:
    """Orders with one layer's units matched by some of their numbers."""
    from scipy.optimize import linear_sum_assignment

    now_MUE = np.take_along_axis(theta_MP, out_MP, 1)[:, by_UE]
    likeness_MUU = np.einsum("ue,mve->muv", to_P[by_UE], now_MUE)  # |a - b|^2 less what all orders share
    order_MU = np.stack([linear_sum_assignment(-like_UU)[1] for like_UU in likeness_MUU])
    return np.take_along_axis(out_MP, reordered((layer,), [order_MU], *out_MP.shape), 1)


def undone(places_MP: np.ndarray) -> np.ndarray:
    """The places that take an order back."""
    return np.argsort(places_MP, axis=1)


def matched_distances(layers: tuple[HiddenLayer, ...], theta_P: np.ndarray, seen_MP: np.ndarray) -> np.ndarray:
    """Euclidean distance of a network to each of others, their hidden units in the nearest order, shape (M,)."""
    if layers:
        seen_MP = np.take_along_axis(seen_MP, aligning(layers, seen_MP, theta_P), 1)
    return np.linalg.norm(seen_MP - theta_P, axis=1)  # type: ignore[no-any-return]

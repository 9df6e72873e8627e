"""A network's flat weights as tokens. N = networks, P = flat weights, T = tokens, C = numbers of the longest token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.recycling.neurons import hidden_layers, places_of

KINDS = ("chunks", "neurons")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which numbers are a token, and which tokens are read by one encoder.

    Args:
        places_TC: int64; P where a token is shorter than the longest.
        kinds_T: encoder and decoder of each token, int64, counted from 0.
        size: P.
    """

    places_TC: Tensor
    kinds_T: Tensor
    size: int

    def cut(self, theta_NP: Tensor) -> Tensor:
        """Tokens, shape (N, T, C), 0 where there is no number."""
        padded = torch.cat([theta_NP, theta_NP.new_zeros(len(theta_NP), 1)], 1)
        return padded[:, self.places_TC]

    def joined(self, tokens_NTC: Tensor) -> Tensor:
        """Flat weights, shape (N, P)."""
        out_NP = tokens_NTC.new_zeros(len(tokens_NTC), self.size + 1)
        out_NP[:, self.places_TC.reshape(-1)] = tokens_NTC.flatten(1)
        return out_NP[:, : self.size]


def cut_tokens(shapes: Mapping[str, Sequence[int]], kind: str, chunk: int) -> Tokens:
    """Tokens of a state dict.

    Args:
        shapes: shape by name, in the order of the flat row.
        kind: `chunks` cuts every tensor, row after row, into tokens of at most `chunk` numbers with an encoder each;
            `neurons` makes a token of each hidden unit (its weights in, its bias, its weights out), all read by one
            encoder, so that an order of the units is no matter; what belongs to none is cut into chunks.
        chunk: numbers of a chunk; whole rows of a matrix go together as far as they fit.

    Raises:
        ConfigError: `neurons` for anything but a chain of two linear layers.
    """
    named = {name: tuple(shape) for name, shape in shapes.items()}
    places, size = places_of(named), sum(int(np.prod(shape, dtype=np.int64)) for shape in named.values())
    lists: list[np.ndarray] = []
    kinds: list[int] = []
    taken = np.zeros(size, dtype=bool)
    if kind == "neurons":
        layers = hidden_layers(named)
        if len(layers) != 1:
            raise ConfigError(
                f"`tokens` is `neurons`, and the weights have {len(layers)} hidden layers of linear layers; it is for "
                "1. Use `chunks`."
            )
        lists, kinds = list(layers[0].own_UE), [0] * layers[0].units
        taken[layers[0].own_UE] = True
    for own in places.values():
        flat = own.reshape(-1)
        if taken[flat].any():  # a chain's tensors are wholly of hidden units, or not at all
            continue
        row = own.shape[-1] if own.ndim else 1
        step = max(1, chunk // row) * row if row <= chunk else chunk
        for start in range(0, len(flat), step):
            lists.append(flat[start : start + step])
            kinds.append(max(kinds, default=-1) + 1)
    longest = max(map(len, lists))
    places_TC = np.full((len(lists), longest), size)
    for row_C, numbers in zip(places_TC, lists, strict=True):
        row_C[: len(numbers)] = numbers
    return Tokens(torch.from_numpy(places_TC), torch.tensor(kinds), size)

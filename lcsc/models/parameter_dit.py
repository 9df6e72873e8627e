"""A transformer that writes a network's weights after seeing it at an earlier step and being told a metric.

N = networks, P = flat weights, T = tokens, C = numbers of a token, D = width, F = features of a scalar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.models.own_files import OwnFiles
from lcsc.models.parameter_tokens import KINDS, cut_tokens

#: steps of the diffusion in training
NUM_TIMES = 1000
#: standard deviation of scaled weights (arXiv:2209.12892's constant)
SCALED_STD = 0.538
#: scalars that are tokens of their own: time, how far to go, the wanted metric, the present one
SCALARS = 4


class ParameterDiT(OwnFiles, nn.Module):
    """G(x, t, goal, now, theta) of G.pt (arXiv:2209.12892, Section 3): weights that `goal` asks for, from noisy ones.

    Every chunk of the weights has a linear encoder and decoder of its own. The decoders begin at zero and theta is
    added to what they give, so that an untrained network returns theta. Weights are scaled by one constant, metrics are
    shifted and scaled to mean 0 and standard deviation 1.

    Args:
        shapes: shape of each tensor by name, in the order of the flat row.
        tokens, chunk: see `lcsc.models.parameter_tokens.cut_tokens`.
        width, num_layers, num_heads: of the transformer.
        freqs, max_log2: a scalar x is told as sin(2^f x), cos(2^f x) for `freqs` evenly spaced f from 0 to `max_log2`.
        scale: what weights are multiplied with.
        metric: name of the number that it is told.
        center, spread: mean and standard deviation of the metric in training.
        low, high: least and largest metric in training.
        rising: whether a larger metric is better, as a return is.
        align: whether hidden units are brought into the order that is nearest to `reference` first.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        tokens: str = "chunks",
        chunk: int = 64,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        freqs: int = 64,
        max_log2: float = 6.0,
        scale: float = 1.0,
        metric: str = "loss",
        center: float = 0.0,
        spread: float = 1.0,
        low: float = 0.0,
        high: float = 0.0,
        rising: bool = False,
        align: bool = False,
    ) -> None:
        super().__init__()
        self._settings = {k: v for k, v in locals().items() if k not in ("self", "__class__", "shapes")}
        self._settings = {"shapes": {name: list(shape) for name, shape in shapes.items()}, **self._settings}
        check_sizes(self._settings)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.scale, self.metric, self.center, self.spread = scale, metric, center, spread
        self.low, self.high, self.rising, self.align = low, high, rising, align
        self._tokens = cut_tokens(self.shapes, tokens, chunk)
        T, C = self._tokens.places_TC.shape
        kinds = int(self._tokens.kinds_T.max()) + 1
        self.register_buffer("_freqs", 2.0 ** torch.linspace(0, max_log2, freqs), persistent=False)
        self.register_buffer("reference", torch.zeros(self._tokens.size))
        bound = C**-0.5
        self.encode_noisy = nn.Parameter(torch.empty(kinds, C, width).uniform_(-bound, bound))
        self.encode_start = nn.Parameter(torch.empty(kinds, C, width).uniform_(-bound, bound))
        self.encode_scalar = nn.ModuleList(nn.Linear(2 * freqs + 1, width, bias=False) for _ in range(SCALARS))
        # units of one encoder share a position too: their order is no matter
        self.place_noisy, self.place_start = (nn.Parameter(torch.zeros(kinds, width)) for _ in range(2))
        self.place_scalar = nn.Parameter(torch.zeros(SCALARS, width))
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.decode = nn.Parameter(torch.zeros(kinds, width, C))
        # tokens of one encoder are told apart by what they start from alone, so the start is read beside the noise
        self.join_start = nn.Parameter(torch.zeros(kinds, C, width))

    @property
    def settings(self) -> dict[str, Any]:
        """See `OwnFiles.settings`."""
        return self._settings

    @property
    def num_tokens(self) -> int:
        """How many tokens the transformer reads: two for each chunk of weights, and `SCALARS`."""
        return 2 * len(self._tokens.kinds_T) + SCALARS

    @property
    def best(self) -> float:
        """The best metric of training."""
        return self.high if self.rising else self.low

    @property
    def worst(self) -> float:
        """The worst metric of training."""
        return self.low if self.rising else self.high

    def features(self, x_N: Tensor) -> Tensor:
        """What is told of a scalar, shape (N, F)."""
        waves_NF = x_N[:, None] * self._freqs
        return torch.cat([waves_NF.sin(), waves_NF.cos(), x_N[:, None]], 1)

    def forward(self, x_NP: Tensor, t_N: Tensor, goal_N: Tensor, now_N: Tensor, theta_NP: Tensor) -> Tensor:
        """The weights asked for, scaled, shape (N, P).

        Args:
            x_NP: scaled noisy weights.
            t_N: step of the diffusion, 0 to `NUM_TIMES` - 1.
            goal_N, now_N: the wanted metric, and that of `theta_NP`, in the metric's own unit.
            theta_NP: the scaled weights to start from.
        """
        kinds = self._tokens.kinds_T
        goal_N, now_N = ((metric_N - self.center) / self.spread for metric_N in (goal_N, now_N))
        start_NTC, noisy_NTC = self._tokens.cut(theta_NP), self._tokens.cut(x_NP)
        scalars = (t_N.to(x_NP.dtype) / NUM_TIMES, goal_N - now_N, goal_N, now_N)
        told = [encode(self.features(x_N)) for encode, x_N in zip(self.encode_scalar, scalars, strict=True)]
        noisy_NTD = torch.einsum("ntc,tcd->ntd", noisy_NTC, self.encode_noisy[kinds])
        noisy_NTD = noisy_NTD + torch.einsum("ntc,tcd->ntd", start_NTC, self.join_start[kinds])
        start_NTD = torch.einsum("ntc,tcd->ntd", start_NTC, self.encode_start[kinds])
        stacked = self.norm(torch.cat([noisy_NTD, start_NTD, torch.stack(told, 1)], 1))
        places = torch.cat([self.place_noisy[kinds], self.place_start[kinds], self.place_scalar])
        out_NTD = self.body(stacked + places)[:, : len(kinds)]
        change_NTC = torch.einsum("ntd,tdc->ntc", out_NTD, self.decode[kinds])
        return theta_NP + self._tokens.joined(change_NTC)


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for sizes of a `ParameterDiT` that do not go together."""
    if settings["tokens"] not in KINDS:
        raise ConfigError(f"`tokens` is `{settings['tokens']}`.{did_you_mean(settings['tokens'], KINDS)}")
    for name in ("chunk", "width", "num_layers", "num_heads", "freqs"):
        if settings[name] < 1:
            raise ConfigError(f"`{name}` is {settings[name]}; it must be at least 1.")
    if settings["width"] % settings["num_heads"]:
        raise ConfigError(f"`width` {settings['width']} is no multiple of `num_heads` {settings['num_heads']}.")

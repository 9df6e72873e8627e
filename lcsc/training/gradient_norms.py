"""The length of each layer's gradient, which recovery of a lost stage weighs its neighbours by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lcsc.recycling.stages import layer_names

#: Parameters by layer.
Layers = list[list[nn.Parameter]]


def layer_parameters(net: Any, arch: Mapping[str, Any]) -> Layers:
    """The parameters of each layer; raises BankError for networks whose layers cannot be told apart."""
    named = dict(net.named_parameters())
    told = {**arch, "config": net.config.to_dict()}
    return [[named[name] for name in names] for names in layer_names(told, list(named), "the network")]


def gradient_norms(layers: Layers) -> list[float]:
    """L2 norm of each layer's gradient, summed in float64."""
    grads = [[parameter.grad for parameter in layer if parameter.grad is not None] for layer in layers]
    return [math.sqrt(sum(float(grad.double().square().sum()) for grad in layer)) for layer in grads]

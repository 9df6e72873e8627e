"""Many `SmallClassifier` networks at once. R = networks, P = flat weights, N = images, C = classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.bank.layout import Layout
from lcsc.core.errors import ConfigError
from lcsc.models.network import build_network
from lcsc.models.small_classifier import SmallClassifier

#: numbers that a prompt can be: cross-entropy in nats, and the share of images that are classified wrongly
METRICS = ("loss", "error")


class Many:
    """The architecture, and what its networks compute.

    Args:
        arch: `{"class": "SmallClassifier", "config": {...}}`.

    Raises:
        ConfigError: another class.
    """

    def __init__(self, arch: Mapping[str, Any]) -> None:
        if arch.get("class") != "SmallClassifier":
            raise ConfigError(
                f"runs of small classifiers are made of `SmallClassifier` networks, not `{arch.get('class')}`. Choose "
                "that class, or name a folder of runs in `trainer.runs`."
            )
        self.net: SmallClassifier = build_network(arch)  # type: ignore[assignment]
        self.layout = Layout.of({name: tensor.shape for name, tensor in self.net.named_parameters()})

    def drawn(self, num: int, seeds: list[int]) -> Tensor:
        """Initial weights as torch draws them, float32, shape (num, P); one seed for each, or one for all."""
        rows = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for layer in self.net.layers:
                    layer.reset_parameters()  # type: ignore[operator]
            rows.append(self.layout.flatten(self.net.state_dict()))
        return torch.stack(rows).expand(num, -1).clone()  # shared ones are copied, for they learn apart

    def logits(self, theta_RP: Tensor, x_RNF: Tensor) -> Tensor:
        """Shape (R, N, C); `x_RNF` are the first layer's inputs, or (N, F) where all networks see the same."""
        entries = {entry.name: entry for entry in self.layout.entries}
        out = x_RNF
        for i in range(len(self.net.layers)):
            weight, bias = entries[f"layers.{i}.weight"], entries[f"layers.{i}.bias"]
            weight_ROF = theta_RP[:, weight.start : weight.stop].reshape(-1, *weight.shape)
            bias_RO = theta_RP[:, bias.start : bias.stop]
            out = (out if i == 0 else nn.functional.relu(out)) @ weight_ROF.mT + bias_RO[:, None]
        return out

    def metrics(self, theta_RP: Tensor, x_NF: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """`METRICS` of each network, shape (R,) each."""
        rows: dict[str, list[Tensor]] = {name: [] for name in METRICS}
        for part_RP in theta_RP.split(256):
            logits_RNC = self.logits(part_RP, x_NF)
            labels_RN = labels_N.expand(len(part_RP), -1)
            rows["loss"].append(losses_of(logits_RNC, labels_RN).mean(1))
            rows["error"].append((logits_RNC.argmax(-1) != labels_RN).to(part_RP.dtype).mean(1))
        return {name: torch.cat(parts) for name, parts in rows.items()}


def losses_of(logits_RNC: Tensor, labels_RN: Tensor) -> Tensor:
    """Cross-entropy of each image in nats, shape (R, N)."""
    return nn.functional.cross_entropy(logits_RNC.mT, labels_RN, reduction="none")

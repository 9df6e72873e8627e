"""A live network whose parameters are views of one flat buffer: filling the buffer is loading the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.bank.layout import Layout
from lcsc.core.errors import BankError
from lcsc.models.network import build_network


class LiveModel:
    """A network in evaluation mode on one device, and the row of floats it reads its weights from.

    Args:
        arch: `{"class": ..., "config": {...}}`.
        layout: where each parameter lies in the row.
        constants: tensors that are not combined, by name.
        device: torch device.

    Raises:
        BankError: the network's tensors and the layout's are not the same set of names and shapes.
    """

    def __init__(
        self, arch: Mapping[str, Any] | None, layout: Layout, constants: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.net: nn.Module = build_network(arch).to(device).eval().requires_grad_(False)
        self.theta_P = torch.zeros(layout.num_parameters, device=device)
        _check_bijection(self.net, layout, constants)
        views = layout.views(self.theta_P)
        targets = {**dict(self.net.named_parameters(remove_duplicate=False)), **dict(self.net.named_buffers())}
        for name, tensor in targets.items():
            if name in views:
                tensor.data = views[name]
            elif name in constants:
                tensor.data.copy_(constants[name])
        self._layout = layout

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Tensor]:
        """Inside, backward passes add up in the flat row that is yielded, float32, shape (P,); outside none is kept."""
        grad_P = torch.zeros_like(self.theta_P)
        views = self._layout.views(grad_P)
        parameters = {name: p for name, p in self.net.named_parameters() if name in views}
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(True)
                parameter.grad = views[name]
            yield grad_P
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None


def _check_bijection(net: nn.Module, layout: Layout, constants: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    given = {entry.name: entry.shape for entry in layout.entries}
    given |= {name: tuple(tensor.shape) for name, tensor in constants.items()}
    if wanted != given:
        missing = sorted(set(wanted) - set(given))
        extra = sorted(set(given) - set(wanted))
        shapes = sorted(name for name in set(given) & set(wanted) if given[name] != wanted[name])
        raise BankError(
            f"the bank does not fit `{type(net).__name__}`: missing {missing[:10]}, unknown {extra[:10]}, "
            f"other shape {shapes[:10]}. Check the bank's config.json and `bank.component`."
        )

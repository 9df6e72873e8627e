"""A live network whose parameters are views of one flat buffer: filling the buffer is loading the weights.

Only the experts of a mixture are copied behind that, where files have them one by one and the network has all of a
layer in one tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.bank.layout import Layout
from lcsc.core.errors import BankError
from lcsc.models.compiled import Compiled
from lcsc.models.network import build_network
from lcsc.recycling.experts import Part, spelled_out


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
        groups = distinct_tensors(self.net)
        shapes = layout.shapes | {name: tuple(tensor.shape) for name, tensor in constants.items()}
        spelled = spelled_out(type(self.net).__name__, net_shapes(self.net), shapes)
        check_bijection(self.net, [names for _, names in groups], shapes, spelled)
        views = layout.views(self.theta_P)
        self._layout = layout
        #: the network's tensors that read from the row, each with its name there and all its names in the network
        self._bound: list[tuple[Tensor, str, tuple[str, ...]]] = []
        for tensor, names in groups:  # each once, so that tied names stay tied
            if (own := next((name for name in names if name in views), None)) is not None:
                tensor.data = views[own]
                self._bound.append((tensor, own, names))
            elif (own := next((name for name in names if name in constants), None)) is not None:
                tensor.data.copy_(constants[own])
        #: tensors that the row holds in parts, and where they were
        self._joined = [(t, names[0], t.data_ptr()) for t, names in groups if names[0] in spelled]
        self._parts = spelled
        self._compiled: dict[str, nn.Module] = {}

    @torch.no_grad()
    def fill(self, write: Callable[[Tensor], None]) -> None:
        """Let `write` fill the row, float32, shape (P,), and the network have it."""
        write(self.theta_P)
        views = self._layout.views(self.theta_P)
        for tensor, name, _ in self._joined:
            for part in self._parts[name]:
                part.of(tensor).copy_(views[part.name])

    def network(self, compile: str) -> nn.Module:
        """The network as it is called: itself for `no`, or compiled by that backend of torch.compile, once for all."""
        if compile == "no":
            return self.net
        if compile not in self._compiled:
            self._compiled[compile] = Compiled(self.net, compile)
        return self._compiled[compile]

    @property
    def intact(self) -> bool:
        """Whether the network still reads its weights from the row: whoever had it may have moved or cast it."""
        views, now = self._layout.views(self.theta_P), named_tensors(self.net)
        for tensor, name, place in self._joined:
            if now.get(name) is not tensor or tensor.data_ptr() != place or tensor.dtype != torch.float32:
                return False
        return all(
            name in now and now[name].data_ptr() == views[own].data_ptr() and now[name].dtype == views[own].dtype
            for _, own, names in self._bound
            for name in names
        )

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Tensor]:
        """Inside, backward passes add up in the flat row that is yielded, float32, shape (P,); outside none is kept."""
        grad_P = torch.zeros_like(self.theta_P)
        views = self._layout.views(grad_P)
        parameters = [(tensor, own) for tensor, own, _ in self._bound if isinstance(tensor, nn.Parameter)]
        hooks: list[Any] = []
        try:
            for parameter, own in parameters:
                parameter.requires_grad_(True)
                parameter.grad = views[own]
            for joined, name, _ in self._joined:
                joined.requires_grad_(True)
                add = functools.partial(_add_parts, self._parts[name], views)
                hooks.append(joined.register_post_accumulate_grad_hook(add))
            yield grad_P
        finally:
            for hook in hooks:
                hook.remove()
            for tensor in (*(own for own, _ in parameters), *(own for own, *_ in self._joined)):
                tensor.requires_grad_(False)
                tensor.grad = None


def _add_parts(parts: Sequence[Part], views: Mapping[str, Tensor], parameter: Tensor) -> None:
    """Move what a backward pass left at a parameter to where its parts are added up."""
    assert parameter.grad is not None, "called behind a backward pass"
    for part in parts:
        views[part.name].add_(part.of(parameter.grad))
    parameter.grad = None


def net_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def named_tensors(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by all of their names."""
    return {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}


def distinct_tensors(net: nn.Module) -> list[tuple[Tensor, tuple[str, ...]]]:
    """All parameters and buffers with their names; tied ones have several."""
    names: dict[int, list[str]] = {}
    tensors = named_tensors(net)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [(tensors[group[0]], tuple(group)) for group in names.values()]


def check_bijection(
    net: nn.Module,
    groups: Sequence[tuple[str, ...]],
    given: Mapping[str, tuple[int, ...]],
    spelled: Mapping[str, Sequence[Part]] | None = None,
) -> None:
    """Raise BankError unless names and shapes of a network and of a bank agree.

    Of tied tensors one name is enough, as `safetensors.torch.save_model` keeps it.

    Args:
        net: the network.
        groups: names of its tensors, as `distinct_tensors` gives them.
        given: shape by name of what the bank gives.
        spelled: tensors of the network that the bank gives in parts.
    """
    wanted = net_shapes(net)
    for name, parts in (spelled or {}).items():
        del wanted[name]
        wanted |= {part.name: part.shape for part in parts}
    there = {name for names in groups if set(names) & set(given) for name in names}
    missing = sorted(set(wanted) - there - set(given))
    extra = sorted(set(given) - set(wanted))
    shapes = sorted(name for name in set(given) & set(wanted) if given[name] != wanted[name])
    if missing or extra or shapes:
        raise BankError(
            f"the bank does not fit `{type(net).__name__}`: missing {missing[:10]}, unknown {extra[:10]}, "
            f"other shape {shapes[:10]}. Check the bank's config.json and `bank.component`."
        )

"""A network spread over processes: each fills its own part of every parameter, and nothing is gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.bank import CheckpointBank
from lcsc.bank.lora import refuse_lora
from lcsc.bank.part import BankPart
from lcsc.core.errors import BankError, ConfigError, EvaluationError
from lcsc.kernels import Groups
from lcsc.models.flat import check_bijection, distinct_tensors, named_tensors, net_shapes
from lcsc.recycling.experts import Part, spelled_out


@dataclass(frozen=True)
class _Box:
    """The rectangle of a whole tensor that this process holds: first index and length along each axis."""

    at: tuple[int, ...]
    shape: tuple[int, ...]

    def span(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Elements of the whole tensor, of this shape, from the first to the last row of the box."""
        if not shape:
            return 0, 1
        width = math.prod(shape[1:])
        return self.at[0] * width, (self.at[0] + self.shape[0]) * width if 0 not in self.shape else self.at[0] * width

    def of(self, rows: Tensor) -> Tensor:
        """The box, from whole rows of it."""
        for axis in range(1, len(self.shape)):
            rows = rows.narrow(axis, self.at[axis], self.shape[axis])
        return rows


@dataclass(frozen=True)
class _Place:
    """A tensor of the bank in a tensor of the network: names there and here, its box, and where in the local part."""

    name: str
    own: str
    box: _Box
    into: tuple[int | slice, ...] = ()


class LocalShards:
    """What this process holds of a network, to be filled with one candidate after the other.

    Parameters and buffers that are DTensors (`fully_shard`, `distribute_tensor`; `Shard` along any axis and
    `Replicate`, on a mesh of any size) get their local part, others the whole tensor; dtype and device are theirs, and
    the optimizer's references stay good. Each process makes one of these for its own bank and network; it reads and
    combines what its parts need (of a tensor that is cut along another axis than the first, the whole rows) and
    exchanges nothing with the others.

    Memory beside the bank's part (`BankPart`): a float32 row of the local parts while `write` runs.

    Args:
        bank: the checkpoints; `storage="resident"` holds this process's part of them in memory.
        net: its names are the bank's; tied tensors stay tied. Buffers that no checkpoint has are left alone.

    Raises:
        BankError: LoRA factors, or names and shapes that are not the bank's.
        ConfigError: a tensor without memory (device `meta`), or partial sums in place of values.
    """

    def __init__(self, bank: CheckpointBank, net: nn.Module) -> None:
        refuse_lora(bank.layout.shapes, bank.path)
        self.bank, self.net = bank, net
        _reshard(net)
        groups = distinct_tensors(net)
        constants = {name: source.shape for name, (_, source) in bank.constant_sources().items()}
        shapes = bank.layout.shapes
        spelled = spelled_out(type(net).__name__, net_shapes(net), shapes)
        check_bijection(net, [names for _, names in groups], shapes | constants, spelled)
        #: combined tensors, and those that are copied
        self._combined: list[_Place] = []
        self._copied: list[_Place] = []
        for tensor, names in groups:
            if (own := next((name for name in names if name in shapes), None)) is not None:
                self._combined.append(_Place(names[0], bank.layout.ties.get(own, own), _box(names[0], tensor)))
            elif (own := next((name for name in names if name in constants), None)) is not None:
                self._copied.append(_Place(names[0], own, _box(names[0], tensor)))
            elif names[0] in spelled:  # experts of a mixture
                box = _box(names[0], tensor)
                places = [_within(names[0], part, box) for part in spelled[names[0]]]
                self._combined += [place for place in places if place is not None]
        spans: dict[str, tuple[int, int]] = {}
        for place in self._combined:
            a, b = place.box.span(shapes[place.own])
            if a < b:  # a network may untie what the checkpoints tie, and cut the two alike or not
                first, last = spans.get(place.own, (a, b))
                spans[place.own] = min(a, first), max(b, last)
        #: the columns of the bank that this process needs
        self.part = BankPart(bank, spans)
        self._starts = {name: a for name, (a, _) in spans.items()}

    @torch.no_grad()
    def write(self, coef: Tensor, *, groups: Groups | None = None) -> None:
        """Fill the local parts with a candidate; rounded where the network is of half precision.

        Parameters that FSDP2 has gathered for a forward pass are given back first.

        Args:
            coef: shape (K,); with `groups` (G, K).
            groups: as for `CheckpointBank.combine`.

        Raises:
            BankError, NonFiniteError: see `BankPart.combine`.
            EvaluationError: a candidate holds NaN or Inf in these parts, or a number too large for their dtype.
        """
        _reshard(self.net)
        here, row = named_tensors(self.net), self.part.combine(coef, groups=groups)
        shapes = self.bank.layout.shapes
        for place in self._combined:
            own, box, local = place.own, place.box, _local(here[place.name])[place.into]
            if local.numel() == 0:
                continue
            shape = shapes[own]
            a, b = (end - self._starts[own] for end in box.span(shape))
            rows = row[self.part.places[own]][a:b].view(box.shape[:1] + shape[1:])
            local.copy_(box.of(rows))
            if local.dtype.itemsize < 4 and not torch.isfinite(local).all():
                raise EvaluationError(
                    f"`{place.name}` reaches {rows.abs().max():.6g}, too large for its dtype {local.dtype}. Keep the "
                    "network in float32, or use smaller coefficients."
                )
        for place in self._copied:
            box, whole, local = place.box, self.bank.constants[place.own], _local(here[place.name])
            if local.numel():
                local.copy_(box.of(whole[slice(box.at[0], box.at[0] + box.shape[0])] if box.shape else whole))


def _reshard(net: nn.Module) -> None:
    """Let FSDP2 give back what it gathered: the next forward pass gathers the new numbers."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the tensor's own memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _box(name: str, tensor: Tensor) -> _Box:
    """Where the local part of a tensor lies in the whole."""
    local = _local(tensor)
    if local.is_meta:
        raise ConfigError(
            f"`{name}` has no memory yet: the network is on the device `meta`. Call `net.to_empty(device=...)` first."
        )
    if not hasattr(tensor, "placements"):
        return _Box((0,) * tensor.ndim, tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ConfigError(
            f"`{name}` is placed as {tuple(tensor.placements)}, which holds sums to be added up. Use `Shard` and "
            "`Replicate`."
        )
    if not _one_piece(tensor.placements, tensor.device_mesh.shape):
        raise ConfigError(
            f"`{name}` is placed as {tuple(tensor.placements)}, where a process holds several pieces of it. Use "
            "`Shard` and `Replicate`."
        )
    shape, at = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(local.shape):
        raise BankError(
            f"the part of `{name}` here has shape {tuple(local.shape)}, but its placement {tuple(tensor.placements)} "
            f"gives {tuple(shape)}. Spread the network with `fully_shard` or `distribute_tensor`."
        )
    return _Box(tuple(at) or (0,) * tensor.ndim, tuple(shape))


def _within(name: str, part: Part, box: _Box) -> _Place | None:
    """What a local part holds of an expert's tensor; None where it holds nothing of it."""
    if part.expert is None:
        return _Place(name, part.name, box)
    first = (part.expert, part.start, *(0,) * (len(part.shape) - 1))
    last = [a + n for a, n in zip(first, (1, *part.shape), strict=True)]
    low = [max(a, b) for a, b in zip(first, box.at, strict=True)]
    high = [min(a, b + n) for a, b, n in zip(last, box.at, box.shape, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    sizes = tuple(b - a for a, b in zip(low, high, strict=True))
    own = _Box(tuple(a - b for a, b in zip(low, first, strict=True))[1:], sizes[1:])
    into = [slice(a - b, a - b + n) for a, b, n in zip(low, box.at, sizes, strict=True)]
    return _Place(name, part.name, own, (low[0] - box.at[0], *into[1:]))


def _one_piece(placements: Sequence[Any], mesh: tuple[int, ...]) -> bool:
    """Whether strided shards are those of FSDP2 over tensor parallelism, which cut again what is cut already."""
    for i, placement in enumerate(placements):
        if (factor := getattr(placement, "split_factor", None)) is not None:
            later = zip(placements[i + 1 :], mesh[i + 1 :], strict=True)
            if factor != math.prod(size for other, size in later if getattr(other, "dim", None) == placement.dim):
                return False
    return True

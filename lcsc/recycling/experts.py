"""Where the experts of a mixture lie: each by itself in files, all of a layer as one tensor in transformers' memory.

Files have the names that transformers 4 and 5 both open (and what else reads mixtures, such as vLLM). In the memory of
transformers 5 a layer holds `mlp.experts.gate_up_proj`, shape (E, 2 I, D), gates above ups, and
`mlp.experts.down_proj`, shape (E, D, I). E = experts, D = width, I = width of an expert.

Operators work on names in files, which `expert_names` and `router_name` give. Whoever fills a network in memory asks
`parts_of` which tensors of the files make up one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Naming:
    """How files call the experts of a layer.

    Args:
        block: the mixture within its layer; `mlp` in memory.
        gate: the projection that goes through the activation.
        up: the one that is multiplied by it.
        down: the one back to the layer's width.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


#: class of transformers -> names in its files
MIXTURES: dict[str, Naming] = {
    "MixtralForCausalLM": Naming("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), Naming()),
}


@dataclass(frozen=True)
class Part:
    """A tensor of the files within one in memory.

    Args:
        name: in the files.
        expert: the expert whose it is; None: it is the whole tensor, by another name.
        start: its first row among those of the expert.
        shape: of the tensor in the files.
    """

    name: str
    expert: int | None
    start: int
    shape: Shape

    def of(self, whole: Tensor) -> Tensor:
        """The view of a tensor in memory that holds this one."""
        return whole if self.expert is None else whole[self.expert].narrow(0, self.start, self.shape[0])


def expert_names(kind: str, layer: str, expert: int) -> dict[str, str]:
    """Names in files of one expert's `gate`, `up` and `down`, shapes (I, D), (I, D), (D, I).

    Args:
        kind: class of the mixture, one of `MIXTURES`.
        layer: such as `model.layers.3`.
        expert: counted from 0.
    """
    naming = MIXTURES[kind]
    stem = f"{layer}.{naming.block}.experts.{expert}"
    return {role: f"{stem}.{getattr(naming, role)}.weight" for role in ("gate", "up", "down")}


def router_name(kind: str, layer: str) -> str:
    """Name in files of a layer's router, shape (E, D)."""
    return f"{layer}.{MIXTURES[kind].block}.gate.weight"


def parts_of(kind: str, name: str, shape: Shape) -> tuple[Part, ...]:
    """The tensors of the files that make up a tensor in memory; none where files call it the same.

    Args:
        kind: class of the network; others than `MIXTURES` have no such tensors.
        name: of the tensor in memory.
        shape: of it.
    """
    layer, found, tail = name.partition(".mlp.")
    if kind not in MIXTURES or not found:
        return ()
    if tail == "experts.down_proj":
        E, D, inner = shape
        return tuple(Part(expert_names(kind, layer, e)["down"], e, 0, (D, inner)) for e in range(E))
    if tail == "experts.gate_up_proj":
        E, both, D = shape
        return tuple(
            Part(expert_names(kind, layer, e)[role], e, start, (both // 2, D))
            for e in range(E)
            for role, start in (("gate", 0), ("up", both // 2))
        )
    if tail == "gate.weight" and router_name(kind, layer) != name:
        return (Part(router_name(kind, layer), None, 0, shape),)
    return ()


def spelled_out(kind: str, wanted: Mapping[str, Shape], given: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Tensors in memory that `given` holds in parts, by name; of a tensor that it holds as one there are none.

    Args:
        kind: class of the network.
        wanted: shapes of the tensors in memory, by name.
        given: names in the files.
    """
    there = set(given)
    found = {name: parts_of(kind, name, shape) for name, shape in wanted.items() if name not in there}
    return {name: parts for name, parts in found.items() if any(part.name in there for part in parts)}


def as_in_files(kind: str, tensors: Mapping[str, Tensor], given: Iterable[str]) -> dict[str, Tensor]:
    """Tensors in memory under the names of `given`: views of them, expert by expert where `given` has experts."""
    spelled = spelled_out(kind, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, given)
    return {
        part.name: part.of(tensor)
        for name, tensor in tensors.items()
        for part in spelled.get(name) or (Part(name, None, 0, tuple(tensor.shape)),)
    }

"""An optimizer's tensors beside a checkpoint's weights, by the names of the weights.

Read are `optimizer.bin`, `optimizer.pt` and `optimizer.pth` (accelerate, diffusers, transformers: a torch file of
`{"state": {index: {slot: tensor}}, "param_groups": ...}`) and the training state of lcsc's own trainers
(`optimizer/slot/name` in a safetensors file). Nothing of a file is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.extents import Source, read_source
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shard_index import shown
from lcsc.bank.torch_file import read_torch
from lcsc.codec.arrays import PREFIX, Array
from lcsc.core.errors import BankError

NAMES = ("optimizer.bin", "optimizer.pt", "optimizer.pth", "optimizer.safetensors", "state.safetensors")
_OWN = "optimizer/"
_MOMENTS = {"exp_avg": PREFIX["m"], "exp_avg_sq": PREFIX["v"]}


def find_optimizer(checkpoint: Path) -> Path | None:
    """The optimizer's file beside a checkpoint's files, or in the folder above them; None where there is none."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for place in (folder, folder.parent):
        for name in NAMES:
            if (place / name).is_file():
                return place / name
    return None


def slot_name(slot: str, name: str) -> str:
    """How a tensor of an optimizer is called: the moments of Adam as the codec knows them, others `state/slot/name`."""
    return _MOMENTS.get(slot, f"state/{slot}/") + name


def read_optimizer(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Tensors of an optimizer's file, named by `slot_name`.

    Args:
        path: the file.
        shapes: of the weights, by name. Where a file numbers its parameters and does not name them, each takes the
            first weight of its shape that is not taken; those without one are called by their number.

    Raises:
        BankError: a file that is damaged or holds no optimizer.
    """
    if path.suffix == ".safetensors":
        table, _ = read_safetensors(path)
        own = {name.removeprefix(_OWN): source for name, source in table.items() if name.startswith(_OWN)}
        found = {slot_name(*name.split("/", 1)): source for name, source in own.items() if "/" in name}
    else:
        found = _numbered(path, read_torch(path).value, shapes)
    if not found:
        raise BankError(f"`{shown(path)}` holds no optimizer. Give the file that the trainer saved beside the weights.")
    return {name: Array(source.dtype, read_source((path,), source)) for name, source in found.items()}


def _numbered(path: Path, value: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    state = value.get("state") if isinstance(value, dict) else None
    groups = value.get("param_groups") if isinstance(value, dict) else None
    if not isinstance(state, dict) or not isinstance(groups, list):
        return {}
    names: dict[Any, str] = {}
    for group in groups:
        said = group.get("param_names") if isinstance(group, dict) else None
        if isinstance(said, (list, tuple)) and len(said) == len(group.get("params", ())):
            names |= dict(zip(group["params"], map(str, said), strict=True))
    free = list(shapes)
    found: dict[str, Source] = {}
    for index in sorted((k for k in state if isinstance(k, int)), key=int):
        slots = {str(slot): item for slot, item in dict(state[index]).items() if isinstance(item, Source)}
        whole = max((source.shape for source in slots.values()), key=lambda shape: int(np.prod(shape)), default=())
        name = names.get(index) or next((name for name in free if tuple(shapes[name]) == whole), str(index))
        if name in free:
            free.remove(name)
        found |= {slot_name(slot, name): source for slot, source in slots.items()}
    return found


def states_of(checkpoints: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], k: int) -> dict[str, Array]:
    """The optimizer's tensors of checkpoint k.

    Raises:
        BankError: there is no optimizer's file beside it.
    """
    if (file := find_optimizer(checkpoints[k])) is None:
        raise BankError(
            f"no optimizer lies beside `{shown(checkpoints[k])}`; one of {', '.join(NAMES)} was expected. Leave "
            "`optimizer` out."
        )
    return read_optimizer(file, shapes)

"""An optimizer's tensors beside a checkpoint's weights, by the names of the weights, and its file again.

Read are `optimizer.bin`, `optimizer.pt` and `optimizer.pth` (accelerate, diffusers, transformers: a torch file of
`{"state": {index: {slot: tensor}}, "param_groups": ...}`) and the training state of lcsc's own trainers
(`optimizer/slot/name` in a safetensors file). Nothing of a file is run.

Most torch files number their parameters and do not name them. Names are guessed then, which helps to code the numbers;
what stands where is kept as it is (`Optimizer.about`), so that the file comes back whole whatever was guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.extents import Source, read_source
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shard_index import shown
from lcsc.bank.torch_file import read_torch
from lcsc.codec.arrays import PREFIX, STATES, Array, Tensors
from lcsc.core.errors import BankError

NAMES = ("optimizer.bin", "optimizer.pt", "optimizer.pth", "optimizer.safetensors", "state.safetensors")
_OWN = "optimizer/"
_MOMENTS = {"exp_avg": PREFIX["m"], "exp_avg_sq": PREFIX["v"]}
#: key in the metadata of a safetensors file: what an optimizer keeps beside tensors, by parameter and slot
PLAIN = "plain_state"


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer's file holds.

    Args:
        tensors: named by `slot_name`, others of a torch file `state/file/...`.
        about: plain values to keep beside them: `optimizer`, how to write the torch file again (its name, its contents
            with the names of tensors in their places, and whether it names its parameters), or `plain`, numbers by
            parameter and slot.
    """

    tensors: dict[str, Array]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> bool:
        """Whether moments are known to be those of the weights whose names they have."""
        return bool(self.about.get("optimizer", {}).get("named", True))


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


def read_optimizer(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Optimizer:
    """What an optimizer's file holds.

    Args:
        path: the file.
        shapes: of the weights, by name. Where a file numbers its parameters and does not name them, each takes the
            first weight of its shape that is not taken; those without one are called by their number.

    Raises:
        BankError: a file that is damaged, holds no optimizer, or more than tensors and plain values.
    """
    found: dict[str, Source] = {}
    about: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        table, metadata = read_safetensors(path)
        own = {name.removeprefix(_OWN): source for name, source in table.items() if name.startswith(_OWN)}
        found = {slot_name(*name.split("/", 1)): source for name, source in own.items() if "/" in name}
        about = {"plain": json.loads(metadata[PLAIN])} if PLAIN in metadata else {}
    else:
        value = read_torch(path).value
        if isinstance(value, dict) and isinstance(value.get("state"), dict) and "param_groups" in value:
            names, named = _names(value["state"], value["param_groups"], shapes)
            contents = _told(value, (), names, found, path)
            about = {"optimizer": {"file": path.name, "contents": contents, "named": named}}
    if not found:
        raise BankError(f"`{shown(path)}` holds no optimizer. Give the file that the trainer saved beside the weights.")
    return Optimizer({n: Array(source.dtype, read_source((path,), source)) for n, source in found.items()}, about)


def _names(state: Mapping[Any, Any], groups: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[Any, str], bool]:
    """A name for each number of a parameter, and whether the file itself has told them all."""
    told: dict[Any, str] = {}
    for group in groups if isinstance(groups, (list, tuple)) else ():
        said = group.get("param_names") if isinstance(group, dict) else None
        if isinstance(said, (list, tuple)) and len(said) == len(group.get("params", ())):
            told |= dict(zip(group["params"], map(str, said), strict=True))
    free = [name for name in shapes if name not in told.values()]
    names: dict[Any, str] = {}
    for index in sorted((k for k in state if isinstance(k, int)), key=int):
        slots = state[index].values() if isinstance(state[index], dict) else ()
        own = [item.shape for item in slots if isinstance(item, Source)]
        whole = max(own, key=lambda shape: int(np.prod(shape)), default=())
        name = told.get(index) or next((name for name in free if tuple(shapes[name]) == whole), str(index))
        if name in free:
            free.remove(name)
        names[index] = name
    return names, set(names) <= set(told)


def _told(value: Any, place: tuple[Any, ...], names: Mapping[Any, str], found: dict[str, Source], path: Path) -> Any:
    """A value of a torch file as JSON; its tensors go into `found`, and their names stand in their places."""
    if isinstance(value, Source):
        moment = len(place) == 3 and place[0] == "state" and place[1] in names
        name = slot_name(str(place[2]), names[place[1]]) if moment else "state/file/" + "/".join(map(str, place))
        found[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        rows = [[key, _told(item, (*place, key), names, found, path)] for key, item in value.items()]
        if all(isinstance(key, str | int) for key, _ in rows):
            return {"dict": rows}
    if isinstance(value, list | tuple):
        items = [_told(item, (*place, i), names, found, path) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BankError(
        f"`{shown(path)}` holds a {type(value).__name__} at `{'.'.join(map(str, place))}`, and tensors and plain "
        "values can be coded. Leave `optimizer` out."
    )


def contents_of(said: Any, tensors: Mapping[str, Any]) -> Any:
    """The contents of a torch file again, from what `read_optimizer` says of them.

    Args:
        said: `about["optimizer"]["contents"]`.
        tensors: by name, as they are to stand there.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: something else than `read_optimizer` says.
    """
    if isinstance(said, list):
        return [contents_of(item, tensors) for item in said]
    if not isinstance(said, dict):
        return said
    ((kind, inner),) = said.items()
    if kind == "dict":
        return {key: contents_of(item, tensors) for key, item in inner}
    if kind == "tuple":
        return tuple(contents_of(inner, tensors))
    return tensors[inner] if kind == "tensor" else {"float": float}[kind](inner)


def states_of(checkpoints: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], k: int) -> Optimizer:
    """The optimizer of checkpoint k.

    Raises:
        BankError: there is no optimizer's file beside it, or one that lies beside others too.
    """
    if (file := find_optimizer(checkpoints[k])) is None:
        raise BankError(
            f"no optimizer lies beside `{shown(checkpoints[k])}`; one of {', '.join(NAMES)} was expected. Leave "
            "`optimizer` out."
        )
    if (num := [find_optimizer(checkpoint) for checkpoint in checkpoints].count(file)) > 1:
        raise BankError(
            f"`{shown(file)}` lies beside {num} checkpoints and can be that of one alone. Give each checkpoint a "
            "folder with its own, or leave `optimizer` out."
        )
    return read_optimizer(file, shapes)


def optimizer_tensors(tensors: Tensors) -> dict[str, Array]:
    """Those of a coded checkpoint's tensors that are an optimizer's."""
    return {name: array for name, array in tensors.items() if name.startswith(STATES)}

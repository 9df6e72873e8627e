"""Training that saves its checkpoints coded, with the optimizer, and goes on from them.

`CodedSaver` is what a loop calls; `save_hook` and `load_hook` are what accelerate's `register_save_state_pre_hook` and
`register_load_state_pre_hook` take (diffusers' training scripts save through them), and `saver_callback` what
transformers' `Trainer` takes. Of several processes the first writes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcsc.bank.layout_read import read_arch
from lcsc.bank.optimizer_file import slot_name
from lcsc.bank.storage import as_tensor
from lcsc.codec.arrays import PREFIX, STATES, Array, Tensors
from lcsc.codec.chain import Chain, ChainWriter, is_chain
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import OutputExistsError, RunError

if TYPE_CHECKING:
    from transformers import TrainerCallback

_SLOTS = {"exp_avg": PREFIX["m"], "exp_avg_sq": PREFIX["v"]}


def array_of(tensor: Tensor) -> Array:
    """A tensor of any dtype and device as the codec sees it."""
    own, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
    if dtype.startswith(("bfloat16", "float8")):
        own = own.view(torch.int16 if own.element_size() == 2 else torch.int8)
        return Array(dtype, own.numpy().view(np.uint16 if own.element_size() == 2 else np.uint8).copy())
    return Array(dtype, own.numpy().copy())


def training_tensors(
    net: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a training by the names that the codec knows, and tied names with their twins.

    Args:
        net: weights and buffers; tensors that share their numbers are taken once.
        optimizer: its tensors of each parameter, None for the network alone.

    Raises:
        RunError: the optimizer trains parameters that the network does not have.
    """
    first: dict[tuple[int, ...], str] = {}
    found: dict[str, Array] = {}
    ties: dict[str, str] = {}
    for name, tensor in net.state_dict().items():
        key = (tensor.data_ptr(), tensor.storage_offset(), *tensor.shape, *tensor.stride())
        if tensor.numel() and key in first:
            ties[name] = first[key]
            continue
        first[key] = name
        found[name] = array_of(tensor)
    for name, slots in _states(net, optimizer).items():
        found |= {slot_name(slot, name): array_of(value) for slot, value in slots.items() if isinstance(value, Tensor)}
    return found, ties


def plain_state(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps beside tensors, by parameter and slot: numbers, and None.

    Raises:
        RunError: something else, or as `training_tensors`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, slots in _states(net, optimizer).items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                continue
            if value is not None and type(value) not in (bool, int, float):
                raise RunError(
                    f"the optimizer keeps a {type(value).__name__} as `{slot}` of `{name}`, and tensors and numbers "
                    "can be coded. Leave `optimizer` out, and save it beside."
                )
            found.setdefault(name, {})[slot] = value
    return found


def _states(net: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Any]]:
    """The optimizer's state of each of the network's parameters, by name."""
    if optimizer is None:
        return {}
    named = dict(net.named_parameters())
    if other := {id(p) for group in optimizer.param_groups for p in group["params"]} - set(map(id, named.values())):
        raise RunError(
            f"the optimizer trains {len(other)} parameters that are not the network's, and their state would be lost. "
            "Leave `optimizer` out, and save it beside."
        )
    return {name: dict(optimizer.state.get(parameter, {})) for name, parameter in named.items()}


def restore_training(
    tensors: Tensors,
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ties: Mapping[str, str] | None = None,
    plain: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Put tensors of `training_tensors` and numbers of `plain_state` into a network and an optimizer of the same kind.

    Raises:
        RunError: they are of another network, or of an optimizer of other parameters.
    """
    weights = {n: as_tensor(a.bits, a.dtype) for n, a in tensors.items() if not n.startswith(STATES)}
    weights |= {name: weights[twin] for name, twin in (ties or {}).items()}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise RunError(f"the coded checkpoint is of another network: {said}") from error
    if optimizer is None:
        return
    number: dict[int, int] = {}  # torch counts through the groups, which may stand in another order than the network
    for group in optimizer.param_groups:
        number |= {id(p): len(number) + i for i, p in enumerate(group["params"])}
    position = {name: number[id(p)] for name, p in net.named_parameters() if id(p) in number}
    state: dict[int, dict[str, Any]] = {}
    for name, slot, value in _slots(tensors, plain or {}):
        if name not in position:
            raise RunError(
                f"the coded optimizer holds `{slot}` of `{name}`, which this optimizer does not train. Give it the "
                "same parameters, or restore the network alone."
            )
        state.setdefault(position[name], {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _slots(tensors: Tensors, plain: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Parameter, slot and value of all that is an optimizer's."""
    for full, array in tensors.items():
        if full.startswith(STATES):
            slot = next((slot for slot, prefix in _SLOTS.items() if full.startswith(prefix)), None)
            slot, name = (slot, full[len(_SLOTS[slot]) :]) if slot else full.removeprefix("state/").split("/", 1)
            yield name, slot, as_tensor(array.bits, array.dtype).clone()
    for name, slots in plain.items():
        yield from ((name, slot, value) for slot, value in slots.items())


class CodedSaver:
    """Saves a training's checkpoints into a folder that `CheckpointBank.open` reads.

    Args:
        folder: of the coded checkpoints; one that has some is continued.
        settings: how they are coded.
        arch: `{"class", "config"}` of the network, for a search; None asks a network of transformers or diffusers.
        replace: a step that is saved again replaces the one that is there, and all behind it, as a training needs that
            was interrupted and goes on from an earlier step.
    """

    def __init__(
        self,
        folder: Path | str,
        settings: CodecSettings | None = None,
        arch: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        self.folder, self.settings, self.arch = Path(folder), settings or CodecSettings(), arch
        self.replace = replace
        self._writer: ChainWriter | None = None

    def check(self, step: int) -> None:
        """Refuse a training that goes on from `step` and would come to steps that are there already.

        Raises:
            OutputExistsError: saying what to do; not with `replace`.
        """
        if not self.replace and is_chain(self.folder) and (last := Chain(self.folder).steps[-1]) > step:
            raise OutputExistsError(
                f"`{self.folder}` has checkpoints up to step {last}, and the training goes on from step {step}. Write "
                "into another folder, or use CodedSaver(..., replace=True), which drops those behind it."
            )

    def save(self, step: int, net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Path:
        """Write the checkpoint of a step; with loss, the training itself goes on from what it has.

        Raises:
            OutputExistsError: a step that is not above the last, without `replace`.
            NonFiniteError: NaN or Inf in what is to be quantised.
            RunError: an optimizer that also trains what is not the network's, or keeps more than tensors and numbers.
        """
        net = _bare(net)
        tensors, ties = training_tensors(net, optimizer)
        plain = plain_state(net, optimizer)
        if self._writer is None:
            self.arch = _arch_of(net) if self.arch is None else self.arch
            self._writer = ChainWriter(self.folder, self.settings)
        if self.replace:
            self._writer.cut(step)
        about = {"arch": self.arch, "kind": "raw", "rate": None, "ties": ties, **({"plain": plain} if plain else {})}
        return self._writer.append(step, tensors, about)

    def restore(self, net: nn.Module, optimizer: torch.optim.Optimizer | None = None, step: int | None = None) -> int:
        """Put a step, the last for None, into network and optimizer, in place; returns it, 0 where there is none.

        Raises:
            BankError: no such step, or a damaged file.
            RunError: it is of another network.
        """
        if not is_chain(self.folder):
            return 0
        chain = Chain(self.folder)
        step = chain.steps[-1] if step is None else step
        tensors, about = chain.read(step), chain.header(step)["about"]
        restore_training(tensors, _bare(net), optimizer, about.get("ties"), about.get("plain"))
        return step


def _arch_of(net: nn.Module) -> Mapping[str, Any] | None:
    """What a config.json that the network itself writes says of it; None where it writes none."""
    with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
        if hasattr(net, "save_config"):  # of diffusers
            net.save_config(folder)
        elif hasattr(config := copy.copy(getattr(net, "config", None)), "save_pretrained"):
            config.architectures = [type(net).__name__]
            config.save_pretrained(folder)
        return read_arch(Path(folder))[0]


def _bare(net: nn.Module) -> nn.Module:
    """The network within what torch wraps around it to compile it, or to train it in several processes."""
    while inner := getattr(net, "_orig_mod", None) or (
        net.module if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel) else None
    ):
        net = inner
    return net


def _writes() -> bool:
    """Whether this is the process that writes, of those that train together."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def save_hook(saver: CodedSaver, optimizer: torch.optim.Optimizer | None = None) -> Callable[..., None]:
    """For accelerate's `register_save_state_pre_hook`: the first model is saved coded, and not by accelerate.

    The step is the number at the end of the folder's name, as in `checkpoint-500`. Give `load_hook(saver)` too.
    """

    def hook(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        step = _step_of(output_dir)
        if models:
            if _writes():
                saver.save(step, models[0], optimizer)
            weights.pop(0)

    return hook


def load_hook(saver: CodedSaver) -> Callable[..., None]:
    """For accelerate's `register_load_state_pre_hook`: the first model is what `save_hook` saved at that step."""

    def hook(models: list[nn.Module], input_dir: str) -> None:
        step = _step_of(input_dir)
        if models:
            saver.check(step)
            saver.restore(models.pop(0), step=step)

    return hook


def _step_of(folder: str) -> int:
    digits = Path(folder).name.rpartition("-")[2]
    if not digits.isdecimal():
        raise RunError(f"`{folder}` has no step at the end of its name. Save into `checkpoint-STEP`.")
    return int(digits)


def saver_callback(saver: CodedSaver) -> TrainerCallback:
    """For transformers' `Trainer(callbacks=[...])`: each time that it saves, the checkpoint is saved coded too."""
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saver.check(state.global_step)

        def on_save(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            if state.is_world_process_zero:
                saver.save(state.global_step, model, getattr(optimizer, "optimizer", optimizer))

    return Saver()

"""Training that saves its checkpoints coded, with the optimizer, and goes on from them.

`CodedSaver` is what a loop calls; `save_hook` is what accelerate's `register_save_state_pre_hook` takes (diffusers'
training scripts save through it), and `saver_callback` what transformers' `Trainer` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.bank.coded import STATES
from lcsc.bank.optimizer_file import slot_name
from lcsc.bank.storage import as_tensor
from lcsc.codec.arrays import PREFIX, Array, Tensors
from lcsc.codec.chain import Chain, ChainWriter, is_chain
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import RunError

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
    for name, parameter in net.named_parameters():
        for slot, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if isinstance(value, Tensor):
                found[slot_name(slot, name)] = array_of(value)
    return found, ties


def restore_training(
    tensors: Tensors,
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ties: Mapping[str, str] | None = None,
) -> None:
    """Put tensors of `training_tensors` into a network and an optimizer of the same kind.

    Raises:
        RunError: they are of another network.
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
    position = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for full, array in tensors.items():
        if not full.startswith(STATES):
            continue
        slot = next((slot for slot, prefix in _SLOTS.items() if full.startswith(prefix)), None)
        slot, name = (slot, full[len(_SLOTS[slot]) :]) if slot else full.removeprefix("state/").split("/", 1)
        state.setdefault(position[name], {})[slot] = as_tensor(array.bits, array.dtype).clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class CodedSaver:
    """Saves a training's checkpoints into a folder that `CheckpointBank.open` reads.

    Args:
        folder: of the coded checkpoints; one that has some is continued.
        settings: how they are coded.
        arch: `{"class", "config"}` of the network, for a search; None where it is not known.
    """

    def __init__(
        self, folder: Path | str, settings: CodecSettings | None = None, arch: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.settings, self.arch = Path(folder), settings or CodecSettings(), arch
        self._writer: ChainWriter | None = None

    def save(self, step: int, net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Path:
        """Write the checkpoint of a step; with loss, the training itself goes on from what it has.

        Raises:
            OutputExistsError: a step that is not above the last.
            NonFiniteError: NaN or Inf in what is to be quantised.
        """
        if self._writer is None:
            self._writer = ChainWriter(self.folder, self.settings)
        tensors, ties = training_tensors(net, optimizer)
        about = {"arch": self.arch, "kind": "raw", "rate": None, "ties": ties}
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
        ties = chain.header(step)["about"].get("ties")
        restore_training(chain.read(step), net, optimizer, ties)
        return step


def save_hook(saver: CodedSaver, optimizer: torch.optim.Optimizer | None = None) -> Callable[..., None]:
    """For accelerate's `register_save_state_pre_hook`: the first model is saved coded, and not by accelerate.

    The step is the number at the end of the folder's name, as in `checkpoint-500`.
    """

    def hook(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        digits = Path(output_dir).name.rpartition("-")[2]
        if not digits.isdecimal():
            raise RunError(f"`{output_dir}` has no step at the end of its name. Save into `checkpoint-STEP`.")
        if models:
            saver.save(int(digits), models[0], optimizer)
            weights.pop(0)

    return hook


def saver_callback(saver: CodedSaver) -> TrainerCallback:
    """For transformers' `Trainer(callbacks=[...])`: each time that it saves, the checkpoint is saved coded too."""
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def on_save(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            saver.save(state.global_step, model, getattr(optimizer, "optimizer", optimizer))

    return Saver()

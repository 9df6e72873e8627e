"""The state a training run continues from: one safetensors file, replaced whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lcsc.core.errors import RunError
from lcsc.core.files import write_bytes

NET, OPTIMIZER = "net/", "optimizer/"


@dataclass
class Progressed:
    """How far a run is: `step` updates done, and the losses since the last line of the log."""

    step: int = 0
    losses: list[float] = field(default_factory=list)


def save_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, done: Progressed, digest: str) -> None:
    """Write weights, buffers, the optimizer's per-parameter tensors and `done`, atomically.

    Args:
        digest: of the configuration; a state is never loaded under another one.
    """
    tensors = {f"{NET}{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}{key}/{name}"] = tensor
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(done.step), "losses": json.dumps(done.losses), "config_digest": digest}
    write_bytes(path, save(own, metadata=metadata))


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, digest: str) -> Progressed:
    """Put the saved state into `net` and `optimizer`; a run without a state starts at step 0.

    Raises:
        RunError: the file is damaged or belongs to another configuration.
    """
    if not path.exists():
        return Progressed()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        done = Progressed(int(metadata["step"]), json.loads(metadata["losses"]))
        if metadata["config_digest"] != digest:
            raise RunError(f"the training state `{path}` belongs to another configuration. Remove it to start over.")
        net.load_state_dict({key[len(NET) :]: tensor for key, tensor in tensors.items() if key.startswith(NET)})
        _load_optimizer(net, optimizer, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"the training state `{path}` is damaged: {error}. Remove it to train again from step 0; "
            "the checkpoints that are there stay."
        ) from error
    return done


def _load_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    position = {name: index for index, (name, _) in enumerate(net.named_parameters())}
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER):
            slot, name = key[len(OPTIMIZER) :].split("/", 1)
            state.setdefault(position[name], {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

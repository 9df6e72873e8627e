"""One stage of a pipeline: its layers, their optimizer, and how a micro-batch passes through. S = stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.models.network import build_network
from lcsc.recycling.stages import Stages, find_stages
from lcsc.training.failing_stages import Recovery, adam, clip, stage_parameters


class Part:
    """Parameters that are clipped and updated together.

    Args:
        names: of the parameters in the whole network.
        parameters: in the same order.
        learning_rate: of Adam.
    """

    def __init__(self, names: list[str], parameters: list[nn.Parameter], learning_rate: float) -> None:
        self.names, self.parameters, self._rate = names, parameters, learning_rate
        self.optimizer = adam([parameters], learning_rate)

    @property
    def size(self) -> int:
        """Numbers in the parameters."""
        return sum(p.numel() for p in self.parameters)

    def grads(self) -> Tensor:
        """Gradients as one row, float32; zeros where there is none."""
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.parameters])

    def set_grads(self, row: Tensor) -> None:
        """Give the parameters the gradients in a row."""
        for p, part in zip(self.parameters, row.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = part.reshape(p.shape).clone()

    def weights(self) -> Tensor:
        """Parameters as one row, float32."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def state(self) -> Tensor:
        """Parameters, both moments, the number of updates and the learning rate as one row, float64."""
        rows = [self.weights()]
        for key in ("exp_avg", "exp_avg_sq"):
            rows += [self.optimizer.state.get(p, {}).get(key, torch.zeros_like(p)).reshape(-1) for p in self.parameters]
        steps = float(self.optimizer.state.get(self.parameters[0], {}).get("step", 0.0))
        told = torch.tensor([steps, self.optimizer.param_groups[0]["lr"]], dtype=torch.float64)
        return torch.cat([torch.cat(rows).double(), told])

    @property
    def state_size(self) -> int:
        """Length of the row of `state`."""
        return 3 * self.size + 2

    @torch.no_grad()
    def load_state(self, row: Tensor) -> None:
        """Take over what `state` gave, bit for bit."""
        sizes = [p.numel() for p in self.parameters]
        weights, first, second = (part.float().split(sizes) for part in row[:-2].split(self.size))
        for p, w, a, b in zip(self.parameters, weights, first, second, strict=True):
            p.copy_(w.reshape(p.shape))
            self.optimizer.state[p] = {
                "step": torch.tensor(float(row[-2])),
                "exp_avg": a.reshape(p.shape).clone(),
                "exp_avg_sq": b.reshape(p.shape).clone(),
            }
        self.optimizer.param_groups[0]["lr"] = float(row[-1])

    @torch.no_grad()
    def begin_anew(self, tensors: Mapping[str, Tensor], lr_factor: float) -> None:
        """Take weights by name, with a fresh optimizer."""
        for name, p in zip(self.names, self.parameters, strict=True):
            p.copy_(tensors[name])
        self.optimizer = adam([self.parameters], self._rate * lr_factor)

    def update(self) -> None:
        """One step of the optimizer; gradients are gone afterwards."""
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Passed:
    """What a micro-batch left behind for its way back: what came in (None at its first stage), and what went out."""

    hidden_BTD: Tensor | None
    out: Tensor


class Stage:
    """A stage's layers; the first two also hold the embedding, the last two the last norm and the head.

    So the embedding and the head each survive the loss of one stage, and swapped orders can begin at the second stage
    and end at the last but one (CheckFree+, arXiv:2506.15461). Both holders make the same updates.

    Args:
        arch: of the whole network.
        number: of the stage.
        recovery: see `Recovery`.
        learning_rate: of Adam.
        seed: of the first weights: those of the whole network made with it.
    """

    def __init__(
        self, arch: Mapping[str, Any], number: int, recovery: Recovery, learning_rate: float, seed: int
    ) -> None:
        torch.manual_seed(seed)
        net = build_network(arch)
        self.number, self.recovery = number, recovery
        self.stages: Stages = find_stages(arch, [n for n, _ in net.named_parameters()], "network", recovery.num_stages)
        self.std = float(net.config.initializer_range)
        by_id = {id(p): name for name, p in net.named_parameters()}
        groups, S = stage_parameters(net, self.stages), recovery.num_stages

        def part(group: list[nn.Parameter]) -> Part:
            return Part([by_id[id(p)] for p in group], group, learning_rate)

        self.parts = {"layers": part(groups[number])}
        if number < 2:
            self.parts["embedding"] = part(groups[S])
        if number >= S - 2:
            self.parts["head"] = part(groups[S + 1])
        self.shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        #: names of the tensors of each stage, in their order in a row of weights
        self.names = [[by_id[id(p)] for p in group] for group in groups[:S]]
        layers = nn.ModuleList(net.model.layers[layer] for layer in self.stages.of(number))
        self._body, self._norm, self._head, self._loss = net.model, net.model.norm, net.lm_head, net.loss_function
        self._body.layers, self._vocab = layers, net.config.vocab_size
        if "embedding" not in self.parts:
            self._body.embed_tokens = None
        self._body.train()

    @property
    def state_size(self) -> int:
        """Length of the row of `state`."""
        return sum(part.state_size for part in self.parts.values())

    def state(self) -> Tensor:
        """All of it as one row, float64."""
        return torch.cat([part.state() for part in self.parts.values()])

    def load_state(self, row: Tensor) -> None:
        """Take over what `state` gave."""
        for part, own in zip(
            self.parts.values(), row.split([part.state_size for part in self.parts.values()]), strict=True
        ):
            part.load_state(own)

    def clip(self) -> float:
        """Scale the gradients of each part down; returns the norm of the layers' before."""
        norms = {name: clip(part.parameters, self.recovery.max_stage_norm) for name, part in self.parts.items()}
        return norms["layers"]

    def update(self) -> None:
        """One step of every optimizer."""
        for part in self.parts.values():
            part.update()

    def forward(self, ids_BT: Tensor, hidden_BTD: Tensor | None, *, last: bool, num_items: int) -> Passed:
        """Take a micro-batch through the stage.

        Args:
            ids_BT: its tokens.
            hidden_BTD: what the stage before gave; None where the micro-batch begins here.
            last: whether it ends here, so that the loss comes out.
            num_items: predicted tokens of a whole step, by which transformers divides the sum of the losses.
        """
        first = hidden_BTD is None
        if hidden_BTD is not None:
            hidden_BTD = hidden_BTD.requires_grad_(True)
        self._body.norm = self._norm if last else nn.Identity()
        inputs = {"input_ids": ids_BT} if first else {"inputs_embeds": hidden_BTD}
        out_BTD = self._body(**inputs, use_cache=False).last_hidden_state
        if not last:
            return Passed(hidden_BTD, out_BTD)
        logits_BTV = self._head(out_BTD)
        loss = self._loss(logits=logits_BTV, labels=ids_BT, vocab_size=self._vocab, num_items_in_batch=num_items)
        return Passed(hidden_BTD, loss)

    @staticmethod
    def backward(passed: Passed, grad_BTD: Tensor | None) -> Tensor | None:
        """The way back; returns the derivative by what came in, None at the micro-batch's first stage."""
        passed.out.backward(grad_BTD)
        return None if passed.hidden_BTD is None else passed.hidden_BTD.grad

"""The process of one pipeline stage: trains with its neighbours, and joins them again when one of them dies.

Time is cut into generations. In each, all stages form one group of processes; when a process dies, everyone's next
message fails, the supervisor starts a fresh process and announces the next generation. No message waits longer than the
group's timeout, and nothing else is waited for without watching for the next generation.

A step is done by all stages or by none: gradients are complete before a reduction over all (`ready`), and weights
change after it. Where some stages have passed that reduction and others have not, those catch up when they meet again,
for they hold complete gradients.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcsc.core.errors import RunError
from lcsc.models.fit import Windows
from lcsc.recycling.stages import neighbours
from lcsc.training.causal_lm import CausalLM
from lcsc.training.failing_stages import Recovery, rebuild
from lcsc.training.pipeline_stage import Passed, Stage

#: how a training lives with a lost stage
STRATEGIES = ("neighbours", "checkpoint", "redundant")
PAUSE = 0.005  # seconds between looks at the store


@dataclass(frozen=True)
class Plan:
    """What the processes of a pipeline do.

    Args:
        arch: of the network; its layers are cut into `recovery.num_stages` stages.
        windows: of the training.
        trainer: number of steps, windows of a step, learning rate.
        recovery: see `Recovery`; its rule is for `neighbours`.
        strategy: `neighbours`: a lost stage is rebuilt from what those beside it send; `checkpoint`: all stages go back
            to their last complete checkpoint; `redundant`: every process keeps its successor's stage too.
        folder: where checkpoints and the final weights go.
        period: steps between checkpoints.
        seed: of the first weights.
        patience_seconds: how long a message may take.
    """

    arch: dict[str, Any]
    windows: Windows
    trainer: CausalLM
    recovery: Recovery
    strategy: str
    folder: Path
    period: int = 0
    seed: int = 0
    patience_seconds: float = 30.0


@dataclass
class Clock:
    """Seconds of what this process did."""

    steps: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)


def main(plan: Plan, number: int, port: int, blank: bool) -> None:
    """The life of a process; a `blank` one holds no stage yet."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=plan.patience_seconds)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
    Worker(plan, number, store, blank).live()


class Worker:
    """See the module.

    Args:
        plan: see `Plan`.
        number: of the stage.
        store: the supervisor's.
        blank: whether the stage has to be rebuilt first.
    """

    def __init__(self, plan: Plan, number: int, store: dist.TCPStore, blank: bool) -> None:
        self._plan, self._number, self._store, self._S = plan, number, store, plan.recovery.num_stages
        self._stage = self._new(number)
        self._shadow = self._new((number + 1) % self._S) if plan.strategy == "redundant" else None
        self._done = -1 if blank else 0  # steps; -1 while the stage is lost
        self._ready, self._norm, self._next_norm = False, 0.0, 0.0
        self._generation, self._sent, self._clock = -1, [], Clock()

    def live(self) -> None:
        """Train until all stages have done all steps."""
        while not self._over():
            try:
                self._join()
                self._agree()
                while self._done < self._plan.trainer.num_steps:
                    self._step()
                self._finish()
            except _NextGeneration:
                pass
            except RuntimeError as error:  # what torch raises when a process of the group is gone
                self._store.set(f"broken/{self._generation}", f"stage {self._number}: {error}"[:500])
            finally:
                self._sent = []
                if dist.is_initialized():
                    dist.destroy_process_group()

    # ----------------------------------------------------------------------------------------------- meeting again

    def _over(self) -> bool:
        return bool(self._store.check(["over"]))

    def _join(self) -> None:
        """Wait for the next generation, for all of its processes, and form a group with them."""
        while (now := int(self._store.get("generation"))) <= self._generation:
            time.sleep(PAUSE)
        self._generation = now
        self._store.set(f"{now}/here/{self._number}", str(self._done))
        self._wait_for([f"{now}/here/{s}" for s in range(self._S)])
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"{now}/group", self._store),
            rank=self._number,
            world_size=self._S,
            timeout=datetime.timedelta(seconds=self._plan.patience_seconds),
        )

    def _wait_for(self, keys: list[str]) -> None:
        while not self._store.check(keys):
            if int(self._store.get("generation")) > self._generation:
                raise _NextGeneration
            time.sleep(PAUSE)

    def _agree(self) -> None:
        """Come to one step, then give lost stages back."""
        done = [int(self._store.get(f"{self._generation}/here/{s}")) for s in range(self._S)]
        target, lost = max(done), [s for s in range(self._S) if done[s] < 0]
        if 0 <= self._done < target:
            assert self._ready, "a stage passed the reduction that this one has not begun"
            self._commit()
        if lost:
            recover = {"neighbours": self._from_neighbours, "checkpoint": self._roll_back, "redundant": self._copy_back}
            with torch.no_grad():
                target = recover[self._plan.strategy](lost, target)
            self._done = target
        self._reduce(torch.zeros(1))
        self._store.set(f"{self._generation}/agreed", json.dumps({"lost": lost, "step": target}))

    def _from_neighbours(self, lost: list[int], target: int) -> int:
        """CheckFree: weights and norms of gradients from the stages beside; embedding and head from their holders."""
        S, mine = self._S, self._number
        for gone in lost:
            beside, pair = neighbours(gone, S), {0: 1, 1: 0, S - 2: S - 1, S - 1: S - 2}.get(gone)
            if set(beside) & set(lost):
                self._fail(f"stages {lost} died together, and stage {gone} has no living neighbour. Take checkpoints.")
            if mine in beside:
                layers = self._stage.parts["layers"]
                self._send(torch.cat([torch.tensor([self._norm]), layers.weights()]), gone, 0)
            end = "embedding" if gone < 2 else "head"
            if mine == pair:
                self._send(self._stage.parts[end].state(), gone, 1)
            if mine == gone:
                size = self._stage.parts["layers"].size
                rows = {s: self._receive(s, 0, torch.empty(1 + size)) for s in beside}
                self._rebuild(rows, target)
                if pair is not None:
                    part = self._stage.parts[end]
                    part.load_state(self._receive(pair, 1, torch.empty(part.state_size, dtype=torch.float64)))
        self._flush()
        return target

    def _rebuild(self, rows: dict[int, Tensor], step: int) -> None:
        """The stage from rows of its neighbours, each a norm and weights."""
        stage, norms, tensors = self._stage, [0.0] * self._S, {}
        for s, row in rows.items():
            norms[s] = float(row[0])
            shapes = [stage.shapes[name] for name in stage.names[s]]
            parts = row[1:].split([shape.numel() for shape in map(torch.Size, shapes)])
            tensors |= {n: x.reshape(shape) for n, x, shape in zip(stage.names[s], parts, shapes, strict=True)}
        own = {name: torch.empty(stage.shapes[name]) for name in stage.names[self._number]}
        made = rebuild({**own, **tensors}, stage.stages, self._number, self._plan.recovery, norms, stage.std, step)
        stage.parts["layers"].begin_anew(made, self._plan.recovery.lr_factor)

    def _copy_back(self, lost: list[int], target: int) -> int:
        """Redundant computation: the stage before holds the lost one; the one after gives itself to be held."""
        S, mine = self._S, self._number
        for gone in lost:
            before, after = (gone - 1) % S, (gone + 1) % S
            if {before, after} & set(lost):
                self._fail(f"stages {lost} died together, and with stage {before} the copy of stage {gone}.")
            if mine == before:
                self._send(self._shadow.state(), gone, 0)
            if mine == after:
                self._send(self._stage.state(), gone, 1)
            if mine == gone:
                for stage, source, tag in ((self._stage, before, 0), (self._shadow, after, 1)):
                    row = torch.empty(stage.state_size, dtype=torch.float64)
                    stage.load_state(self._receive(source, tag, row))
        self._flush()
        return target

    def _fail(self, message: str) -> None:
        self._store.set("fatal", message)
        raise RunError(message)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        began, to = time.perf_counter(), self._plan.folder / f"step-{self._done}"
        to.mkdir(parents=True, exist_ok=True)
        part = to / f"stage-{self._number}.part"
        torch.save(self._stage.state(), part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(to / f"stage-{self._number}.pt")
        old = self._plan.folder / f"step-{self._done - 2 * self._plan.period}" / f"stage-{self._number}.pt"
        old.unlink(missing_ok=True)
        self._clock.saves.append(time.perf_counter() - began)

    def _roll_back(self, lost: list[int], target: int) -> int:
        """The last checkpoint that all stages wrote; the first weights where there is none. Returns its step."""
        for step in range(target // self._plan.period * self._plan.period, 0, -self._plan.period):
            files = [self._plan.folder / f"step-{step}" / f"stage-{s}.pt" for s in range(self._S)]
            if all(file.is_file() for file in files):
                self._stage.load_state(torch.load(files[self._number], weights_only=True))
                return step
        with torch.enable_grad():
            self._stage = self._new(self._number)
        return 0

    def _new(self, number: int) -> Stage:
        plan = self._plan
        return Stage(plan.arch, number, plan.recovery, plan.trainer.learning_rate, plan.seed)

    # ------------------------------------------------------------------------------------------------------ training

    def _step(self) -> None:
        began, t = time.perf_counter(), self._done
        self._ready = False
        self._store.set(f"step/{self._number}", str(t))
        for stage in filter(None, (self._stage, self._shadow)):
            for part in stage.parts.values():
                part.optimizer.zero_grad()
        loss = self._pass_all(t)
        self._share_ends()
        self._next_norm = self._stage.clip()
        if self._shadow is not None:
            self._share_with_shadow()
        self._flush()
        self._ready = True
        total = self._reduce(torch.tensor([loss]))
        self._commit()
        self._store.set(f"loss/{t}", str(float(total)))
        self._clock.steps.append(time.perf_counter() - began)
        if self._plan.strategy == "checkpoint" and self._done % self._plan.period == 0:
            self._save()

    def _commit(self) -> None:
        self._stage.update()
        if self._shadow is not None:
            self._shadow.update()
        self._done, self._ready, self._norm = self._done + 1, False, self._next_norm

    def _pass_all(self, t: int) -> float:
        """All micro-batches of a step forward, then all of them back, in one order on all stages; the loss here."""
        plan, M = self._plan, self._plan.recovery.micro_batches
        size, B = plan.trainer.batch_size // M, plan.trainer.batch_size
        shape = (size, plan.trainer.block_length, plan.arch["config"]["hidden_size"])
        kept: list[Passed] = []
        loss = 0.0
        routes = [self._beside(m) for m in range(M)]
        for m, (before, after) in enumerate(routes):
            ids_BT = torch.stack([plan.windows[t * B + m * size + i]["input_ids"] for i in range(size)])
            hidden_BTD = None if before is None else self._receive(before, m, torch.empty(shape))
            items = B * (plan.trainer.block_length - 1)
            kept.append(self._stage.forward(ids_BT, hidden_BTD, last=after is None, num_items=items))
            out = kept[-1].out.detach()
            if after is None:
                loss += float(out)
            else:
                self._send(out, after, m)
            if self._shadow is not None:
                with torch.no_grad():
                    last = self._shadow.number == self._S - 1
                    self._shadow.forward(ids_BT, None if after is None else out.clone(), last=last, num_items=items)
        for m, (before, after) in enumerate(routes):
            grad_BTD = None if after is None else self._receive(after, M + m, torch.empty(shape))
            back_BTD = self._stage.backward(kept[m], grad_BTD)
            if before is not None:
                self._send(back_BTD, before, M + m)
        return loss

    def _beside(self, micro_batch: int) -> tuple[int | None, int | None]:
        """Where a micro-batch comes from and goes to; None at its ends."""
        order = (None, *self._plan.recovery.order(micro_batch), None)
        at = order.index(self._number)
        return order[at - 1], order[at + 1]

    def _share_ends(self) -> None:
        """Both holders of embedding or head add up their gradients, in one order."""
        tag = 2 * self._plan.recovery.micro_batches
        for name, holders in (("embedding", (0, 1)), ("head", (self._S - 2, self._S - 1))):
            if self._number in holders:
                part = self._stage.parts[name]
                other = sum(holders) - self._number
                own = part.grads()
                self._send(own, other, tag)
                part.set_grads(own + self._receive(other, tag, torch.empty(part.size)))

    def _share_with_shadow(self) -> None:
        """Give the gradients to the stage before, which holds this one too, and take those of the stage after."""
        tag = 2 * self._plan.recovery.micro_batches + 1
        parts = list(self._shadow.parts.values())
        self._send(torch.cat([part.grads() for part in self._stage.parts.values()]), (self._number - 1) % self._S, tag)
        row = self._receive(self._shadow.number, tag, torch.empty(sum(part.size for part in parts)))
        for part, own in zip(parts, row.split([part.size for part in parts]), strict=True):
            part.set_grads(own)

    def _finish(self) -> None:
        """Write the weights that are this stage's, then wait for the others or for the next generation."""
        own = ("layers", *{0: ("embedding",), self._S - 1: ("head",)}.get(self._number, ()))
        tensors = {
            name: p.detach()
            for part in own
            for name, p in zip(self._stage.parts[part].names, self._stage.parts[part].parameters, strict=True)
        }
        to = self._plan.folder / f"final-{self._number}.pt"
        torch.save({"tensors": tensors, "steps": self._clock.steps, "saves": self._clock.saves}, f"{to}.part")
        Path(f"{to}.part").replace(to)
        self._store.set(f"final/{self._number}", str(self._generation))
        self._wait_for(["over"])

    # ------------------------------------------------------------------------------------------------------ messages

    def _send(self, tensor: Tensor, to: int, tag: int) -> None:
        tensor = tensor.contiguous()
        self._sent.append((dist.isend(tensor, to, tag=tag), tensor))

    def _receive(self, source: int, tag: int, into: Tensor) -> Tensor:
        dist.recv(into, source, tag=tag)
        return into

    def _flush(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor


class _NextGeneration(Exception):
    """The supervisor has begun another generation."""

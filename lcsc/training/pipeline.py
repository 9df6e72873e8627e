"""A pipeline of processes on one machine, some of which are killed: CheckFree against checkpoints and redundancy.

Each stage of a Llama is a process; activations and their derivatives go from stage to stage by gloo. The supervisor
here starts the processes, kills them on a schedule if asked to, and replaces whichever dies. Fresh processes are forked
from a server that has torch imported, as a machine that stands by would have. torch's own pipelining schedules are not
used, for all of their micro-batches pass the stages in one order.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcsc.core.errors import ConfigError, RunError
from lcsc.training.pipeline_worker import STRATEGIES, Plan, main

PAUSE = 0.002  # seconds between looks at the processes
#: how long a generation that somebody calls broken lasts when nobody is found dead
GRACE_SECONDS = 2.0
#: generations in a row that may end before all stages have met; more of them are a defect, not bad luck
MOST_VAIN = 20


@dataclass(frozen=True)
class Kill:
    """SIGKILL for the process of a stage, `delay_seconds` after it began a step for the first time.

    With `hang` it is SIGSTOP instead: the process does not die, it says nothing more.
    """

    step: int
    stage: int
    delay_seconds: float = 0.0
    hang: bool = False


@dataclass
class Story:
    """What happened.

    Args:
        losses: of each step on its own training windows.
        events: for each time that the stages met again: those that were lost, the step that training went on with,
            and the seconds from the death until all stages stood at that step.
        step_seconds: median of a step without failures, as the first stage saw it.
        save_seconds: median of a checkpoint; None where none was saved.
        seconds: of all of it, from the first step on.
        tensors: the final weights by name.
    """

    losses: dict[int, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    step_seconds: float = 0.0
    save_seconds: float | None = None
    seconds: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)


def run_pipeline(plan: Plan, kills: Sequence[Kill] = ()) -> Story:
    """Train; returns when all stages have done all steps.

    Raises:
        ConfigError: a plan that cannot be carried out.
        RunError: stages that died together and cannot be given back, or a pipeline that stands still.
    """
    _check(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    supervisor = _Supervisor(plan, kills)
    try:
        supervisor.watch()
        return supervisor.story()
    finally:
        supervisor.end()


def _check(plan: Plan) -> None:
    recovery, trainer = plan.recovery, plan.trainer
    if plan.strategy not in STRATEGIES:
        raise ConfigError(f"`strategy` is `{plan.strategy}`; it must be one of {', '.join(STRATEGIES)}.")
    if recovery.num_stages < 4:
        raise ConfigError(
            f"a pipeline here has two stages at each end, and `num_stages` is {recovery.num_stages}; use 4+."
        )
    if plan.strategy == "checkpoint" and plan.period < 1:
        raise ConfigError(f"`period` is {plan.period}; give the steps between checkpoints, at least 1.")
    if plan.strategy == "redundant" and recovery.swapped:
        raise ConfigError(
            "redundant computation keeps the stage that follows, and swapped orders have several. Leave it."
        )
    if trainer.batch_size % recovery.micro_batches:
        raise ConfigError(f"`batch_size` is {trainer.batch_size} for {recovery.micro_batches} equal micro-batches.")


class _Supervisor:
    def __init__(self, plan: Plan, kills: Sequence[Kill]) -> None:
        self._plan, self._S = plan, plan.recovery.num_stages
        self._kills = sorted(kills, key=lambda kill: (kill.step, kill.stage))
        patience = datetime.timedelta(seconds=plan.patience_seconds)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([main.__module__, "transformers.models.llama.modeling_llama"])
        self._generation, self._agreed, self._died, self._began = 0, 0, {}, time.perf_counter()
        self._last_word: str | None = None
        self._since, self._broken_since = self._began, None
        self._due: dict[Kill, float] = {}
        self._events: list[dict[str, Any]] = []
        self._store.set("generation", "0")
        self._processes = [self._start(s, blank=False) for s in range(self._S)]

    def _start(self, stage: int, *, blank: bool) -> Any:
        process = self._context.Process(target=main, args=(self._plan, stage, self._store.port, blank), daemon=True)
        process.start()
        return process

    def watch(self) -> None:
        """Until all is done: replace the dead, kill who is due, and end what stands still."""
        moved, last, began = time.perf_counter(), None, False
        while True:
            now, state = time.perf_counter(), self._state()
            if state != last:
                moved, last = now, state
            if not began and all(step is not None for step in state[1]):
                began, self._began = True, now
            if self._value("fatal"):
                raise RunError(str(self._value("fatal")))
            if self._generation - self._agreed > MOST_VAIN:
                raise RunError(f"the stages met in none of {MOST_VAIN} tries: {self._last_word or 'they died first'}.")
            if now - moved > 2 * self._plan.patience_seconds + 60:
                raise RunError(f"the pipeline stands still at steps {state[1]}: {self._last_word or 'no word'}.")
            self._note_agreement(now)
            self._kill(state[1], now)
            if self._replace(now):
                continue
            if all(self._value(f"final/{s}") is not None for s in range(self._S)):
                self._seconds = now - self._began
                return
            time.sleep(PAUSE)

    def _state(self) -> tuple[int, list[int | None]]:
        steps = [self._value(f"step/{s}") for s in range(self._S)]
        return self._generation, [None if step is None else int(step) for step in steps]

    def _value(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _kill(self, steps: list[int | None], now: float) -> None:
        for kill in list(self._kills):
            at = steps[kill.stage]
            if kill not in self._due and at is not None and at >= kill.step:
                self._due[kill] = now + kill.delay_seconds
            if kill in self._due and now >= self._due[kill]:
                os.kill(self._processes[kill.stage].pid, signal.SIGSTOP if kill.hang else signal.SIGKILL)
                self._died.setdefault(self._generation + 1, now)
                self._kills.remove(kill)

    def _replace(self, now: float) -> bool:
        """Start fresh processes for the dead, and the next generation."""
        if self._generation and now - self._since > self._plan.patience_seconds:
            for s in range(self._S):  # who has not come by now hangs
                if self._value(f"{self._generation}/here/{s}") is None and self._processes[s].is_alive():
                    self._processes[s].kill()
                    self._processes[s].join()
        dead = [s for s, process in enumerate(self._processes) if not process.is_alive()]
        if (said := self._value(f"broken/{self._generation}")) is not None and self._broken_since is None:
            self._broken_since, self._last_word = now, said
        stuck = self._broken_since is not None and now - self._broken_since > GRACE_SECONDS
        if not dead and not stuck:
            return False
        for s in dead:
            self._store.delete_key(f"final/{s}")
            self._store.delete_key(f"step/{s}")
            self._processes[s] = self._start(s, blank=True)
        self._generation, self._broken_since, self._since = self._generation + 1, None, now
        self._died.setdefault(self._generation, now)
        self._store.set("generation", str(self._generation))
        return True

    def _note_agreement(self, now: float) -> None:
        if self._generation > self._agreed and (said := self._value(f"{self._generation}/agreed")):
            self._events.append(json.loads(said) | {"seconds": now - self._died[self._generation]})
            self._agreed = self._generation

    def story(self) -> Story:
        """What happened, of a pipeline that is done."""
        finals = [torch.load(self._plan.folder / f"final-{s}.pt", weights_only=True) for s in range(self._S)]
        saves = [x for final in finals for x in final["saves"]]
        losses = {t: float(self._value(f"loss/{t}") or "nan") for t in range(self._plan.trainer.num_steps)}
        steps = max((final["steps"] for final in finals), key=len)
        return Story(
            losses,
            self._events,
            statistics.median(steps),
            statistics.median(saves) if saves else None,
            self._seconds,
            {name: tensor for final in finals for name, tensor in final["tensors"].items()},
        )

    def end(self) -> None:
        """Let everyone go, and end whoever does not."""
        self._store.set("over", "1")
        until = time.perf_counter() + 2.0
        for process in self._processes:
            process.join(max(0.0, until - time.perf_counter()))
            if process.is_alive():
                process.kill()
            process.join(5.0)
        for path in self._plan.folder.glob("step-*"):
            shutil.rmtree(path, ignore_errors=True)

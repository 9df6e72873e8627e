"""The training loop: what every step does, and how a run stops and continues without a trace.

The batch and the noise of step s follow from (seed, s) alone, so a run that was interrupted, even killed, and
started again gives the same bits on the same machine as an unbroken one; with `compile`, or where the GPU adds in no
fixed order, the same up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn

from lcsc.codec.settings import MODES
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import Dataset, need_images
from lcsc.models.base import Model
from lcsc.models.compiled import check_compile
from lcsc.models.network import build_network
from lcsc.training.base import Recipe, Speed
from lcsc.training.folder import BankFolder, make_config
from lcsc.training.progress import reporter
from lcsc.training.state import load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_EVERY = 10
INIT, DROPOUT = 0, 1  # index of the initial weights' stream; stream of the layers that draw for themselves


def check_numbers(recipe: Recipe) -> None:
    """Refuse counts below 1, rates that are not positive and unknown ways to be fast.

    Raises:
        ConfigError: naming the field.
    """
    for name in ("num_steps", "batch_size", "save_every"):
        if getattr(recipe, name) < 1:
            raise ConfigError(f"`{name}` is {getattr(recipe, name)}; it must be at least 1.")
    if not 0 < recipe.learning_rate < math.inf:
        raise ConfigError(f"`learning_rate` is {recipe.learning_rate}; it must be above 0 and finite.")
    if not 0 <= recipe.weight_decay < math.inf:
        raise ConfigError(f"`weight_decay` is {recipe.weight_decay}; it must be 0 or above, and finite.")
    precision = speed_of(recipe).mixed_precision
    if precision not in ("no", "bf16"):
        raise ConfigError(f"`mixed_precision` is `{precision}`; it is `no` or `bf16`.")
    if (codec := speed_of(recipe).codec) not in ("no", *MODES):
        raise ConfigError(f"`codec` is `{codec}`; it is `no`, {' or '.join(f'`{mode}`' for mode in MODES)}.")


def check_finite(loss: float, step: int, learning_rate: float) -> None:
    """Raise EvaluationError where a training diverged."""
    if not math.isfinite(loss):
        raise EvaluationError(
            f"the loss is {loss} at step {step} with `learning_rate` {learning_rate}; it must be finite. Train with a "
            "lower learning rate into another folder."
        )


def speed_of(recipe: Any) -> Speed:
    """The fields of `Speed` that a recipe has, the defaults for the others."""
    names = [field.name for field in dataclasses.fields(Speed)]
    return Speed(**{name: getattr(recipe, name) for name in names if hasattr(recipe, name)})


def checkpoint_steps(num_steps: int, save_every: int) -> tuple[int, ...]:
    """Multiples of `save_every` up to `num_steps`, and `num_steps` itself."""
    return tuple(sorted({*range(save_every, num_steps + 1, save_every), num_steps}))


def fit(
    recipe: Recipe,
    *,
    arch: Mapping[str, Any],
    model: Model,
    dataset: Dataset,
    out: Path,
    seed: int,
    progress: bool | None = None,
) -> Path:
    """Train into the folder `out`, or continue there; arguments and errors as in `Trainer.train`.

    A bank that is complete is returned as it is, without work. Ctrl-C ends the step, saves the state and raises
    `KeyboardInterrupt`; a second one leaves at once, with the state of the last checkpoint.
    """
    recipe.check(model)
    need_images(dataset, "this trainer")
    images_NCHW, out = dataset.images(), Path(out)
    channels = (arch.get("config") or {}).get("in_channels", images_NCHW.shape[1])
    if channels != images_NCHW.shape[1]:
        raise ConfigError(
            f"network takes {channels} channels, dataset `{dataset.name}` has {images_NCHW.shape[1]}. "
            "Set `in_channels` and `out_channels` of the architecture to the dataset's."
        )
    check_compile(speed_of(recipe).compile)
    config = make_config(recipe, arch=arch, model=model, dataset=dataset, images_NCHW=images_NCHW, seed=seed)
    usual = dataclasses.asdict(Speed())  # left out, so that banks made before these settings existed still fit
    config["trainer"] = {k: v for k, v in config["trainer"].items() if k not in usual or v != usual[k]}
    codec = speed_of(recipe).codec
    folder = BankFolder(out, config, checkpoint_steps(recipe.num_steps, recipe.save_every), codec=codec)
    folder.check()
    if folder.finished:
        return out

    from accelerate import Accelerator  # costs about a second to import

    accelerator = Accelerator(mixed_precision="no")
    if recipe.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"`batch_size` {recipe.batch_size} does not divide among {accelerator.num_processes} processes. "
            "Choose a multiple."
        )
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        seeds = SeedRange(seed, Purpose.TRAIN)
        torch.manual_seed(int(seeds.generator(INIT).integers(2**63)))
        net = build_network(arch)
        if accelerator.is_main_process:
            stack.enter_context(folder.lock())
            folder.check()  # another process may have begun another bank meanwhile
            folder.create()
        accelerator.wait_for_everyone()
        stack.enter_context(warnings.catch_warnings())  # diffusers caches a version test; torch.compile warns of it
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        _Session(recipe, accelerator, net, model, images_NCHW, folder, seeds).run(progress)
    return out


class _Session:
    """One stretch of training, from the state on disk to the end or an interruption."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        net: nn.Module,
        model: Model,
        images_NCHW: Tensor,
        folder: BankFolder,
        seeds: SeedRange,
    ) -> None:
        self.recipe, self.model, self.folder, self.seeds = recipe, model, folder, seeds
        self.accelerator, self.net, self.images_NCHW = accelerator, net, images_NCHW
        self.speed = speed_of(recipe)
        self.memory_format = torch.channels_last if self.speed.channels_last else torch.contiguous_format
        net.to(memory_format=self.memory_format)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.wrapped, self.prepared = accelerator.prepare(net, self.optimizer)
        self.done = load_state(folder.state_path, net, self.optimizer, folder.digest)
        self.ahead: tuple[Tensor, dict[str, Tensor]] | None = None  # the next step's batch and noise
        self.wrapped.train()
        if self.speed.compile != "no":
            self.wrapped = torch.compile(self.wrapped, backend=self.speed.compile)

    def run(self, progress: bool | None) -> None:
        """Train to the last step; every checkpoint is preceded by the state it can be made from again."""
        total, steps = self.recipe.num_steps, set(self.folder.steps)
        main = self.accelerator.is_main_process
        show = reporter("training", self.done.step, total, progress=progress if main else False)
        opened = self.folder.open_log(self.done.step) if main else contextlib.nullcontext()
        with deferred_interrupt() as interrupted, show as report, opened as log:
            if self.done.step in steps:
                self._save(log, checkpoint=True)  # killed between state and checkpoint
            for step in range(self.done.step + 1, total + 1):
                loss, stop = self._step(step, interrupted)
                self.done.step = step
                self.done.losses.append(loss)
                report(step, sum(self.done.losses) / len(self.done.losses))
                if step % LOG_EVERY == 0 or step == total:
                    self._log(log)
                if step in steps:
                    self._save(log, checkpoint=True)
                if stop and step < total:
                    self._save(log, checkpoint=False)
                    raise KeyboardInterrupt
        if main:
            self.folder.close()
        self.accelerator.wait_for_everyone()

    def _step(self, step: int, interrupted: Callable[[], bool]) -> tuple[float, bool]:
        """One update; returns the loss before it and whether any process was interrupted."""
        torch.manual_seed(int(self.seeds.generator(step, DROPOUT + self.accelerator.process_index).integers(2**63)))
        images_NCHW, draws = self.ahead or self._batch(step)
        device = self.accelerator.device
        # A call uses each weight once, so a cache of casts would only hold memory.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self.speed.mixed_precision == "bf16", cache_enabled=False
        ):
            loss = self.recipe.loss(self.wrapped, self.model, images_NCHW, draws).mean()
        flag = torch.tensor(float(interrupted()), device=device)
        mean = self.accelerator.reduce(torch.stack([loss.detach(), flag]), "mean")
        self.prepared.zero_grad()
        self.accelerator.backward(loss)
        self.prepared.step()
        # Reading a number waits for the GPU, so the next batch is drawn while it still works.
        self.ahead = self._batch(step + 1) if step < self.recipe.num_steps else None
        value, stop = mean.tolist()
        check_finite(value, step, self.recipe.learning_rate)
        return value, stop > 0

    def _batch(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's images and random numbers of a step, on its device."""
        size, rank = self.recipe.batch_size // self.accelerator.num_processes, self.accelerator.process_index
        mine = slice(rank * size, (rank + 1) * size)
        rng = self.seeds.generator(step)
        index_N = torch.from_numpy(rng.integers(len(self.images_NCHW), size=self.recipe.batch_size))
        shape_NCHW = (self.recipe.batch_size, *self.images_NCHW.shape[1:])
        arrays = self.recipe.draw(rng, step, shape_NCHW)
        draws = {name: self._moved(torch.from_numpy(array[mine])) for name, array in arrays.items()}
        return self._moved(self.images_NCHW[index_N[mine]]).to(memory_format=self.memory_format), draws

    def _moved(self, numbers: Tensor) -> Tensor:
        """On the device; from pinned memory the copy does not wait for what the GPU has to do first."""
        device = self.accelerator.device
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)

    def _log(self, log: TextIO | None) -> None:
        mean = sum(self.done.losses) / len(self.done.losses)
        self.done.losses.clear()
        if log is not None:
            log.write(json.dumps({"step": self.done.step, "loss": mean}) + "\n")
            log.flush()

    def _save(self, log: TextIO | None, *, checkpoint: bool) -> None:
        if log is not None:  # the main process
            os.fsync(log.fileno())
            save_state(self.folder.state_path, self.net, self.optimizer, self.done, self.folder.digest)
            if checkpoint:
                self.folder.write_checkpoint(self.net, self.done.step)
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back so that no update is left half-done; the function tells whether there was one."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread only
        return
    seen, old = threading.Event(), signal.getsignal(signal.SIGINT)

    def handler(signum: int, frame: object) -> None:
        seen.set()
        signal.signal(signal.SIGINT, old)

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, old)

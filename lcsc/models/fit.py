"""Training a language model with transformers' `Trainer`: the windows of text, the settings, the call.

Whoever saves what comes of it (a bank) or scores it (an objective) stands above.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.core.seeds import SeedRange
from lcsc.models.causal_lm import quiet

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

#: Stream of the windows, and of the seed for what draws for itself, such as dropout.
WINDOW, OWN = 2, 3
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay")


@dataclass(frozen=True)
class Fit:
    """How a language model is trained, with AdamW on one process and one device.

    Args:
        num_steps: optimizer steps.
        batch_size: windows a step.
        block_length: tokens of a window.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        schedule: of the learning rate, by its name in transformers.
        warmup_steps: steps in which the rate rises from 0, where the schedule has them.
        max_grad_norm: larger gradients are scaled down to it.
        mixed_precision: `no`, or `bf16` for matrix products in bfloat16; weights and optimizer stay float32.
        cpu: stay on the processor where there is a GPU.
    """

    num_steps: int
    batch_size: int
    block_length: int
    learning_rate: float
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    cpu: bool = False

    def run(
        self,
        net: nn.Module,
        windows: Windows,
        folder: Path,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        begun: str | None = None,
    ) -> None:
        """Train `net` in place.

        Args:
            net: a language model of transformers.
            windows: as many as its steps take.
            folder: where transformers may write.
            callbacks: of transformers.
            begun: a state to go on from.
        """
        from transformers import PrinterCallback, Trainer

        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            warnings.filterwarnings("ignore", message="Version v4.12.0 introduces")  # of encoder-decoders, at each step
            trainer = Trainer(
                net,
                self.arguments(folder, windows.seed),
                data_collator=windows.collate,
                train_dataset=windows,
                callbacks=list(callbacks),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.save_model = lambda to, **_: _save(net, Path(to))  # type: ignore[method-assign]
            trainer.train(resume_from_checkpoint=begun)

    def run_until(self, net: nn.Module, windows: Windows, folder: Path, stop: int, begun: str | None) -> str | None:
        """Train on until so many steps are done, on the way to all of them.

        Args:
            net: as for `run`; where it was begun, as it was left.
            windows: of all steps.
            folder: where transformers may write.
            stop: steps, at most `num_steps`.
            begun: what this returned for fewer steps; None from the first.

        Returns:
            a state to go on from, None behind the last step.
        """
        if stop == self.num_steps:
            self.run(net, windows, folder, begun=begun)
            return None
        self.run(net, windows, folder, callbacks=[_pause(stop)], begun=begun)
        return str(folder / f"checkpoint-{stop}")

    def arguments(self, folder: Path, seed: int) -> TrainingArguments:
        """What transformers is told.

        Args:
            folder: where it may write.
            seed: of what draws for itself, such as dropout.
        """
        from transformers import TrainingArguments

        arguments = TrainingArguments(
            str(folder),
            max_steps=self.num_steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type=self.schedule,
            # a last tenth in which a stable rate falls to 0
            lr_scheduler_kwargs={"num_decay_steps": max(1, self.num_steps // 10)}
            if self.schedule == "warmup_stable_decay"
            else None,
            warmup_steps=self.warmup_steps,
            max_grad_norm=self.max_grad_norm,
            bf16=self.mixed_precision == "bf16",
            use_cpu=self.cpu,
            optim="adamw_torch",
            logging_strategy="no",  # the callbacks say when
            save_strategy="no",
            save_total_limit=2,  # the one before, should the last be cut short
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            seed=seed,
            logging_nan_inf_filter=False,
        )
        _ = arguments.device
        arguments._n_gpu = min(arguments.n_gpu, 1)  # the size of a batch is what was asked for
        return arguments


def _pause(stop: int) -> TrainerCallback:
    """What ends a training behind a step and leaves its state."""
    from transformers import TrainerCallback

    class Pause(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == stop

    return Pause()


def _save(net: nn.Module, folder: Path) -> None:
    """The network in a state, each tensor once.

    transformers would take a mixture's experts apart and not find them again, and safetensors refuses views of a row.
    """
    from safetensors.torch import save_file

    tensors = {(t.data_ptr(), t.shape): name for name, t in reversed(net.state_dict().items())}
    folder.mkdir(parents=True, exist_ok=True)
    state = net.state_dict()
    whole = {name: state[name].clone(memory_format=torch.contiguous_format) for name in tensors.values()}
    save_file(whole, str(folder / "model.safetensors"), metadata={"format": "pt"})


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows of a training in their order; a step's are neighbours, and each is drawn by (seed, i) alone.

    `collate` makes one input of those of a step; None stacks them.

    Args:
        stretches_SL: the training text.
        fit: how many there are and how long; whatever has its three fields.
        seeds: what they are drawn by.
    """

    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, stretches_SL: Tensor, fit: Any, seeds: SeedRange) -> None:
        self._stretches_SL, self._length, self._seeds = stretches_SL, fit.block_length, seeds
        self._num = fit.num_steps * fit.batch_size
        #: of what draws for itself, such as dropout
        self.seed = int(seeds.generator(0, OWN).integers(2**32))

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng = self._seeds.generator(i, WINDOW)
        stretch, at = (
            rng.integers(len(self._stretches_SL)),
            rng.integers(self._stretches_SL.shape[1] - self._length + 1),
        )
        ids_T = self._stretches_SL[stretch, at : at + self._length].long()
        return {"input_ids": ids_T, "labels": ids_T}


def check_fit(settings: Any, section: str = "") -> None:
    """Refuse what transformers would refuse late or not at all.

    Args:
        settings: has the fields of `Fit` from `block_length` to `max_grad_norm`.
        section: of the configuration where they stand, with a dot, such as `objective.`.

    Raises:
        ConfigError: naming the fields and their values.
    """
    if not 0 < settings.learning_rate < math.inf or not 0 <= settings.weight_decay < math.inf:
        raise ConfigError(
            f"`{section}learning_rate`, `weight_decay` are {settings.learning_rate}, {settings.weight_decay}; they "
            "must be above 0, and at least 0, and finite."
        )
    if settings.block_length < 2 or settings.warmup_steps < 0 or not settings.max_grad_norm > 0:
        raise ConfigError(
            f"`{section}block_length`, `warmup_steps`, `max_grad_norm` are {settings.block_length}, "
            f"{settings.warmup_steps}, {settings.max_grad_norm}; they must be at least 2, at least 0, and above 0."
        )
    if settings.schedule not in SCHEDULES:
        raise ConfigError(f"`{section}schedule` is `{settings.schedule}`; it must be one of {', '.join(SCHEDULES)}.")


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Inside, the global generators are the training's; outside they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

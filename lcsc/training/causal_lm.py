"""Language models by transformers' `Trainer`, which saves a bank."""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.errors import BankError, ConfigError, RunError
from lcsc.core.files import write_bytes
from lcsc.core.registry import describe, plain, register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextDataset, TextPart, need_text
from lcsc.datasets.content import images_digest, text_digest
from lcsc.models.causal_lm import CAUSAL_LMS, check_text, quiet
from lcsc.models.network import build_network, check_typed, load_network
from lcsc.training.folder import BankFolder
from lcsc.training.loop import INIT, LOG_EVERY, check_finite, check_numbers, checkpoint_steps
from lcsc.training.progress import Report, reporter

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

#: Stream of the windows, and of the seed for what draws for itself, such as dropout.
WINDOW, OWN = 2, 3
#: In a state of transformers: everything before was written to the end.
COMPLETE = "complete"
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay")


@register("trainer", "causal_lm", source="transformers' Trainer; arXiv:1711.05101 (AdamW)")
@dataclass(frozen=True)
class CausalLM:
    """Trains a language model on a text's training part with transformers' `Trainer`; raw weights are saved.

    Window i of the training is `block_length` neighbouring tokens drawn by (seed, i) alone, so a run that was
    interrupted, even killed, and started again gives the same bits on the same machine as an unbroken one (on a GPU up
    to rounding). One process and one device.

    Args:
        num_steps: optimizer steps.
        batch_size: windows a step.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        save_every: steps between checkpoints.
        block_length: tokens of a window.
        schedule: of the learning rate, by its name in transformers.
        warmup_steps: steps in which the rate rises from 0, where the schedule has them.
        max_grad_norm: larger gradients are scaled down to it.
        mixed_precision: `no`, or `bf16` for matrix products in bfloat16; weights and optimizer stay float32.
        start: folder of a network whose weights are the first; None draws them. A new bank goes on from there.
    """

    num_steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    save_every: int = 25
    block_length: int = 128
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    start: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.block_length < 2 or self.warmup_steps < 0 or not self.max_grad_norm > 0:
            raise ConfigError(
                f"`block_length`, `warmup_steps`, `max_grad_norm` are {self.block_length}, {self.warmup_steps}, "
                f"{self.max_grad_norm}; they must be at least 2, at least 0, and above 0."
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"`schedule` is `{self.schedule}`; it must be one of {', '.join(SCHEDULES)}.")

    def train(
        self,
        *,
        arch: Mapping[str, Any],
        model: object,
        dataset: TextDataset,
        out: Path,
        seed: int,
        progress: bool | None = None,
    ) -> Path:
        """Fill the bank `out`, or continue; see `lcsc.training.base.Trainer.train`. `model` is not used."""
        stretches_SL, out = self._check(arch, dataset), Path(out)
        seeds = SeedRange(seed, Purpose.TRAIN)
        with _own_randomness(seeds):
            torch.manual_seed(int(seeds.generator(INIT).integers(2**63)))
            net = build_network(arch)
            first = None if self.start is None else _start(net, Path(self.start))
            check_text(net.config, dataset.vocab_size, self.block_length)
            config = {
                "trainer": describe("trainer", self) | ({} if first is None else {"start": first}),
                "arch": plain(arch),
                "dataset": {"name": dataset.name, "digest": text_digest(dataset)},
                "seed": int(seed),
            }
            folder = BankFolder(out, config, checkpoint_steps(self.num_steps, self.save_every), component="")
            folder.check()
            if folder.finished:
                return out
            with folder.lock():
                folder.check()
                folder.create()
                self._fit(net, Windows(stretches_SL, self, seeds), folder, progress)
                folder.close()
        return out

    def _check(self, arch: Mapping[str, Any], dataset: TextDataset) -> Tensor:
        """The training text; raises ConfigError where architecture or text do not fit."""
        need_text(dataset, "trainer `causal_lm`")
        if arch.get("class") not in CAUSAL_LMS:
            raise ConfigError(
                f"trainer `causal_lm` makes language models of transformers, not `{arch.get('class')}`. Use one of: "
                f"{', '.join(CAUSAL_LMS)}."
            )
        check_typed(arch)
        stretches_SL = dataset.tokens(TextPart.TRAIN)
        if self.block_length > stretches_SL.shape[1]:
            raise ConfigError(
                f"`trainer.block_length` is {self.block_length}, and the text is cut into stretches of "
                f"{stretches_SL.shape[1]} tokens. Give shorter blocks, or a longer `dataset.stretch`."
            )
        return stretches_SL

    def _fit(self, net: nn.Module, windows: Windows, folder: BankFolder, progress: bool | None) -> None:
        """Hand the rest of the training to transformers."""
        from transformers import PrinterCallback, Trainer

        states = folder.state_path.parent
        begun, step = _last_state(states)
        show = reporter("training", step, self.num_steps, progress=progress)
        with quiet(), warnings.catch_warnings(), folder.open_log(step) as log, show as report:
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            arguments = self._arguments(states, windows.seed)
            trainer = Trainer(
                net, arguments, train_dataset=windows, callbacks=[_keeper(self, folder, net, log, report)]
            )
            trainer.remove_callback(PrinterCallback)
            # transformers would take a mixture's experts apart and not find them again when it goes on
            trainer.save_model = lambda to, **_: _save_state(net, Path(to))  # type: ignore[method-assign]
            trainer.train(resume_from_checkpoint=begun)

    def _arguments(self, states: Path, seed: int) -> TrainingArguments:
        from transformers import TrainingArguments

        arguments = TrainingArguments(
            str(states),
            max_steps=self.num_steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type=self.schedule,
            lr_scheduler_kwargs=_decay(self) if self.schedule == "warmup_stable_decay" else None,
            warmup_steps=self.warmup_steps,
            max_grad_norm=self.max_grad_norm,
            bf16=self.mixed_precision == "bf16",
            optim="adamw_torch",
            logging_strategy="no",  # the callback says when
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


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows of a training in their order; a step's are neighbours."""

    def __init__(self, stretches_SL: Tensor, trainer: CausalLM, seeds: SeedRange) -> None:
        self._stretches_SL, self._length, self._seeds = stretches_SL, trainer.block_length, seeds
        self._num = trainer.num_steps * trainer.batch_size
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


def _keeper(trainer: CausalLM, folder: BankFolder, net: nn.Module, log: TextIO, report: Report) -> TrainerCallback:
    """What saves the bank and the log; each checkpoint is there before the state that goes on behind it."""
    import json

    from transformers import TrainerCallback

    steps = set(folder.steps)

    class Keeper(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            control.should_save = step in steps
            control.should_log = step in steps or step % LOG_EVERY == 0
            if control.should_save:
                folder.write_checkpoint(net, step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                loss = logs["loss"]  # type: ignore[index]
                check_finite(loss, state.global_step, trainer.learning_rate)
                log.write(json.dumps({"step": state.global_step, "loss": loss}) + "\n")
                log.flush()
                report(state.global_step, loss)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_bytes(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, b"")

    return Keeper()


def _decay(trainer: CausalLM) -> dict[str, int]:
    """A last tenth in which a stable rate falls to 0."""
    return {"num_decay_steps": max(1, trainer.num_steps // 10)}


def _save_state(net: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(net, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _last_state(states: Path) -> tuple[str | None, int]:
    """The last state that is whole, and its step; the others are dropped."""
    found = {int(path.name.partition("-")[2]): path for path in states.glob("checkpoint-*")}
    whole = {step: path for step, path in found.items() if (path / COMPLETE).is_file()}
    step = max(whole, default=0)
    for other, path in found.items():
        if other != step:
            shutil.rmtree(path)
    return (str(whole[step]), step) if step else (None, 0)


def _start(net: nn.Module, folder: Path) -> str:
    """Fill `net` with the weights of another network of its kind; returns their digest."""
    try:
        net.load_state_dict(load_network(folder).state_dict())
    except (BankError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise RunError(f"`trainer.start` `{folder}` cannot be where the training begins: {said}") from error
    return images_digest(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))


@contextlib.contextmanager
def _own_randomness(seeds: SeedRange) -> Iterator[None]:
    """Inside, the global generators are the training's; outside they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

"""Language models by transformers' `Trainer`, which saves a bank."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn

from lcsc.core.errors import BankError, ConfigError, RunError
from lcsc.core.files import write_bytes
from lcsc.core.registry import describe, plain, register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextDataset, TextPart, need_text
from lcsc.datasets.content import images_digest, text_digest
from lcsc.models.causal_lm import CAUSAL_LMS, check_text
from lcsc.models.fit import Fit, Windows, check_fit, own_randomness
from lcsc.models.network import build_network, check_typed, load_network
from lcsc.training.folder import BankFolder
from lcsc.training.loop import INIT, LOG_EVERY, check_finite, check_numbers, checkpoint_steps
from lcsc.training.progress import Report, reporter

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: In a state of transformers: everything before was written to the end.
COMPLETE = "complete"


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
        codec: `no`, or how the bank is coded: `lossless`, or `lossy`, where the bank holds nearly what was trained.
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
    codec: str = "no"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_fit(self)

    @property
    def fit(self) -> Fit:
        """The settings without what is saved."""
        names = [field.name for field in dataclasses.fields(Fit)]
        return Fit(**{name: getattr(self, name) for name in names if hasattr(self, name)})

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
        with own_randomness():
            torch.manual_seed(int(seeds.generator(INIT).integers(2**63)))
            net = build_network(arch)
            first = None if self.start is None else _start(net, Path(self.start))
            check_text(net.config, dataset.vocab_size, self.block_length)
            usual = describe("trainer", self)
            if self.codec == "no":  # left out, so that banks made before this setting existed still fit
                del usual["codec"]
            config = {
                "trainer": usual | ({} if first is None else {"start": first}),
                "arch": plain(arch),
                "dataset": {"name": dataset.name, "digest": text_digest(dataset)},
                "seed": int(seed),
            }
            folder = BankFolder(out, config, checkpoint_steps(self.num_steps, self.save_every), "", self.codec)
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
        states = folder.state_path.parent
        begun, step = _last_state(states)
        show = reporter("training", step, self.num_steps, progress=progress)
        with folder.open_log(step) as log, show as report:
            keeper = _keeper(self, folder, net, log, report)
            # transformers would take a mixture's experts apart and not find them again when it goes on
            save = functools.partial(_save_state, net)
            self.fit.run(net, windows, states, callbacks=[keeper], save=save, begun=begun)


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

"""What trainers of language models share: transformers' `Trainer`, and the bank that it fills."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

import torch
from torch import nn

from lcsc.core.errors import BankError, ConfigError, RunError
from lcsc.core.files import write_bytes
from lcsc.core.registry import describe, plain
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextDataset, TextPart, need_text
from lcsc.datasets.content import images_digest, text_digest
from lcsc.models.causal_lm import check_text
from lcsc.models.fit import Fit, Windows, check_fit, own_randomness
from lcsc.models.network import build_network, check_typed, load_network
from lcsc.recycling.stages import NORMS
from lcsc.training.folder import BankFolder
from lcsc.training.gradient_norms import Layers, gradient_norms, layer_parameters
from lcsc.training.loop import INIT, LOG_EVERY, check_finite, check_numbers, checkpoint_steps
from lcsc.training.progress import Report, reporter

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: In a state of transformers: everything before was written to the end.
COMPLETE = "complete"


@dataclass(frozen=True)
class LanguageTrainer:
    """Trains a language model on a text's training part; raw weights are saved. A subclass says which, and on what.

    Its docstring tells the fields, because they are its configuration.
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
    gradient_norms: bool = False
    codec: str = "no"

    #: name of the trainer, and classes that it trains
    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_numbers(self)
        check_fit(self)
        if self.gradient_norms and self.codec != "no":
            raise ConfigError(
                f"`trainer.gradient_norms` is true and `codec` is `{self.codec}`, whose files hold tensors alone. "
                "Leave one out."
            )

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
        self._check(arch, dataset)
        out, seeds = Path(out), SeedRange(seed, Purpose.TRAIN)
        with own_randomness():
            torch.manual_seed(int(seeds.generator(INIT).integers(2**63)))
            net = build_network(arch)
            first = None if self.start is None else _start(net, Path(self.start))
            self._check_network(net, dataset)
            windows = self.windows(net, dataset, seeds)
            layers = layer_parameters(net, arch) if self.gradient_norms else None
            config = {
                "trainer": self._described() | ({} if first is None else {"start": first}),
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
                self._fit(net, windows, folder, layers, progress)
                folder.close()
        return out

    def windows(self, net: nn.Module, dataset: TextDataset, seeds: SeedRange) -> Windows:
        """What it trains on, from the training part of a text."""
        return Windows(dataset.tokens(TextPart.TRAIN), self, seeds)

    def _check(self, arch: Mapping[str, Any], dataset: TextDataset) -> None:
        """Raise ConfigError where architecture or text do not fit."""
        need_text(dataset, f"trainer `{self.name}`")
        if arch.get("class") not in self.classes:
            raise ConfigError(
                f"trainer `{self.name}` makes language models of transformers, not `{arch.get('class')}`. Use one of: "
                f"{', '.join(self.classes)}."
            )
        check_typed(arch)
        length = dataset.tokens(TextPart.TRAIN).shape[1]
        if self.block_length > length:
            raise ConfigError(
                f"`trainer.block_length` is {self.block_length}, and the text is cut into stretches of {length} "
                "tokens. Give shorter blocks, or a longer `dataset.stretch`."
            )

    def _check_network(self, net: nn.Module, dataset: TextDataset) -> None:
        """Raise ConfigError where the network does not read the text."""
        check_text(net.config, dataset.vocab_size, self.block_length)

    def _described(self) -> dict[str, Any]:
        """What `train.json` says of it, without what is not asked for: banks from before it existed still fit."""
        idle = {"gradient_norms": False, "codec": "no"}
        return {key: value for key, value in describe("trainer", self).items() if idle.get(key, ...) != value}

    def _fit(
        self, net: nn.Module, windows: Windows, folder: BankFolder, layers: Layers | None, progress: bool | None
    ) -> None:
        """Hand the rest of the training to transformers."""
        states = folder.state_path.parent
        begun, step = _last_state(states)
        show = reporter("training", step, self.num_steps, progress=progress)
        with folder.open_log(step) as log, show as report:
            keeper = _keeper(self, folder, net, layers, log, report)
            self.fit.run(net, windows, states, callbacks=[keeper], begun=begun)


def _keeper(
    trainer: LanguageTrainer, folder: BankFolder, net: nn.Module, layers: Layers | None, log: TextIO, report: Report
) -> TrainerCallback:
    """What saves the bank and the log; each checkpoint is there before the state that goes on behind it."""
    import json

    from transformers import TrainerCallback

    steps = set(folder.steps)

    class Keeper(TrainerCallback):
        beside: Mapping[str, Any] = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step + 1
            if layers is not None and step in steps:
                self.beside = {NORMS: {"step": step, "layers": gradient_norms(layers)}}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            control.should_save = step in steps
            control.should_log = step in steps or step % LOG_EVERY == 0
            if control.should_save:
                folder.write_checkpoint(net, step, self.beside)

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

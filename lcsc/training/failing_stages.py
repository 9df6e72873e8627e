"""Training in one process whose stages are lost and rebuilt on a schedule: what a pipeline would compute. S = stages.

The pipeline of `lcsc.training.pipeline` gives the same bits; this is for the many runs of an experiment.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.models.causal_lm import quiet
from lcsc.models.fit import Windows
from lcsc.recycling.failures import Failure
from lcsc.recycling.rebuild import RULES, lost_layers, mix_by_rule
from lcsc.recycling.stages import Stages, find_stages, route
from lcsc.training.causal_lm import CausalLM

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

#: betas of Adam; the authors' code has no decay of weights
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Recovery:
    """How a training with failing stages is carried out.

    Args:
        num_stages: S.
        rule: how a lost stage is rebuilt; see `lcsc.recycling.rebuild.RULES`. A rule that needs a neighbour which a
            stage at an end lacks takes the other one.
        swapped: every second micro-batch passes the stages in swapped order (CheckFree+).
        micro_batches: of a step; even where `swapped`.
        lr_factor: factor of the learning rate of a stage that was rebuilt, from then on.
        norm_power: power of the gradients' norms in the weights.
        max_stage_norm: larger gradients of a stage are scaled down to it, each stage by itself.
        seed: of stages that begin anew.
    """

    num_stages: int
    rule: str = "checkfree"
    swapped: bool = False
    micro_batches: int = 2
    lr_factor: float = 1.1
    norm_power: float = 1.0
    max_stage_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"`rule` is `{self.rule}`; it must be one of {', '.join(RULES)}.")
        if self.micro_batches < 1 or (self.swapped and self.micro_batches % 2):
            raise ConfigError(
                f"`micro_batches` is {self.micro_batches}; give 1 or more, and an even number for swapped orders."
            )
        if not (self.lr_factor > 0 and self.max_stage_norm > 0):
            raise ConfigError(
                f"`lr_factor` and `max_stage_norm` are {self.lr_factor} and {self.max_stage_norm}; they must be above "
                "0."
            )
        if self.swapped:
            route(self.num_stages, swapped=True)  # checks it

    def order(self, micro_batch: int) -> tuple[int, ...]:
        """The stages in the order in which a micro-batch passes them."""
        return route(self.num_stages, swapped=self.swapped and micro_batch % 2 == 1)

    def rule_at(self, stage: int) -> str:
        """The rule where the stage is: at an end its only neighbour is copied."""
        if stage == 0 and self.rule in ("checkfree", "copy_previous"):
            return "copy_next"
        if stage == self.num_stages - 1 and self.rule in ("checkfree", "copy_next"):
            return "copy_previous"
        return self.rule


def stage_parameters(net: nn.Module, stages: Stages) -> list[list[nn.Parameter]]:
    """Parameters of each stage, then those of the embedding, then those of last norm and head.

    Raises:
        ConfigError: an embedding that is the head too, which would lie at both ends of a pipeline.
    """
    named = dict(net.named_parameters())
    own = [
        [named[name] for layer in stages.of(s) for name in stages.layers[layer].values()]
        for s in range(stages.num_stages)
    ]
    if not hasattr(net.model, "layers") or net.lm_head.weight is net.get_input_embeddings().weight:
        raise ConfigError(
            f"a pipeline takes a network laid out like Llama with a head of its own, and this {type(net).__name__} is "
            "none. Set `tie_word_embeddings` to false, or take LlamaForCausalLM."
        )
    ends = [net.get_input_embeddings().weight, *net.model.norm.parameters(), net.lm_head.weight]
    return [*own, ends[:1], ends[1:]]


def adam(groups: Sequence[Sequence[nn.Parameter]], learning_rate: float) -> torch.optim.Adam:
    """The optimizer, with a learning rate for each group."""
    return torch.optim.Adam(
        [{"params": list(group), "lr": learning_rate} for group in groups], betas=BETAS, foreach=False
    )


def clip(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Scale the gradients of one stage down to the norm `most`; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(parameters, most, foreach=False))


def rebuild(
    tensors: Mapping[str, Tensor],
    stages: Stages,
    lost: int,
    recovery: Recovery,
    norms: Sequence[float],
    std: float,
    step: int,
) -> dict[str, Tensor]:
    """The tensors of a lost stage by name, from those of its neighbours.

    Args:
        tensors: by name; only the neighbours' numbers are read.
        stages: see `Stages`.
        lost: the stage.
        recovery: see `Recovery`.
        norms: of the stages' gradients in the step before.
        std: of new matrices.
        step: the step before which it died, which makes new numbers new each time.
    """
    mix = mix_by_rule(recovery.rule_at(lost), lost, stages.num_stages, norms, recovery.norm_power)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = lost_layers(stages, [lost], [mix], shapes, std, recovery.seed + step)
    return {name: tensor for layer in layers for name, tensor in layer.rebuilt(tensors).items()}


@dataclass
class Curve:
    """What a training gave: loss on held-out text by step, norms of each stage's gradients in the last step."""

    losses: dict[int, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)


@dataclass
class _Losing:
    """Where a training stands that loses stages."""

    net: nn.Module
    stages: Stages
    recovery: Recovery
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    groups: list[list[nn.Parameter]]
    curve: Curve

    def __post_init__(self) -> None:
        self._layers = list(self.net.model.layers)
        self._std = float(self.net.config.initializer_range)

    def set_order(self, micro_batch: int) -> None:
        """Let the network pass its stages as a micro-batch does."""
        order = [layer for stage in self.recovery.order(micro_batch) for layer in self.stages.of(stage)]
        self.net.model.layers = nn.ModuleList(self._layers[layer] for layer in order)

    def clip(self) -> None:
        """Scale gradients down, and keep their norms before."""
        norms = [clip(group, self.recovery.max_stage_norm) for group in self.groups]
        self.curve.norms = norms[: self.stages.num_stages]

    @torch.no_grad()
    def lose(self, lost: int, step: int) -> None:
        """Rebuild a stage; its optimizer begins anew."""
        named = dict(self.net.named_parameters())
        made = rebuild(named, self.stages, lost, self.recovery, self.curve.norms, self._std, step)
        for name, tensor in made.items():
            named[name].copy_(tensor)
            self.optimizer.state.pop(named[name], None)
        self.curve.norms[lost] = 0.0  # it has no gradient yet
        rate = self.schedule.base_lrs[-1] * self.recovery.lr_factor
        self.schedule.base_lrs[lost] = self.optimizer.param_groups[lost]["lr"] = rate


def _callback(
    losing: _Losing, dies: Sequence[Failure], evaluate: Callable[[nn.Module], float], every: int
) -> TrainerCallback:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        micro_batch = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.micro_batch = 0
            losing.set_order(0)
            for failure in dies:
                if failure.step == state.global_step:
                    losing.lose(failure.stage, failure.step)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.micro_batch += 1
            losing.set_order(self.micro_batch)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losing.clip()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losing.set_order(0)
            if state.global_step % every == 0 or state.global_step == args.max_steps:
                losing.net.eval()
                losing.curve.losses[state.global_step] = evaluate(losing.net)
                losing.net.train()

    return Callback()


def train_failing(
    net: nn.Module,
    arch: Mapping[str, Any],
    windows: Windows,
    trainer: CausalLM,
    recovery: Recovery,
    failures: Sequence[Failure],
    *,
    evaluate: Callable[[nn.Module], float],
    evaluate_every: int,
) -> Curve:
    """Train `net` in place with transformers' `Trainer`, losing and rebuilding stages on the way.

    Args:
        net: a Llama or a network laid out alike (`net.model.layers`).
        arch: `{"class", "config"}` of it.
        windows: the training's; a step's windows are cut into `recovery.micro_batches`.
        trainer: number of steps, size of a step and learning rate, which is constant.
        recovery: see `Recovery`.
        failures: which stage dies before which step.
        evaluate: loss of the network in eval mode.
        evaluate_every: steps between evaluations.
    """
    from transformers import PrinterCallback, ProgressCallback, Trainer

    if trainer.batch_size % recovery.micro_batches:
        raise ConfigError(f"`batch_size` is {trainer.batch_size} for {recovery.micro_batches} equal micro-batches.")
    stages = find_stages(arch, [name for name, _ in net.named_parameters()], "network", recovery.num_stages)
    groups = stage_parameters(net, stages)
    optimizer = adam(groups, trainer.learning_rate)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    losing = _Losing(net, stages, recovery, optimizer, constant, groups, Curve())
    callback = _callback(losing, failures, evaluate, evaluate_every)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        arguments = _arguments(trainer, recovery, windows.seed)
        run = Trainer(net, arguments, train_dataset=windows, callbacks=[callback], optimizers=(optimizer, constant))
        for other in (PrinterCallback, ProgressCallback):
            run.remove_callback(other)
        run.train()
    return losing.curve


def _arguments(trainer: CausalLM, recovery: Recovery, seed: int) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        "unused",
        max_steps=trainer.num_steps,
        per_device_train_batch_size=trainer.batch_size // recovery.micro_batches,
        gradient_accumulation_steps=recovery.micro_batches,
        max_grad_norm=0.0,  # each stage is clipped by itself
        logging_strategy="no",
        save_strategy="no",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        use_cpu=True,  # as the pipeline's processes
    )

"""The loss of a language model on held-out text after a short continued training."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import plain, register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Fit, Windows, check_fit, own_randomness
from lcsc.models.flat import LiveModel
from lcsc.models.flops import training_flops
from lcsc.objectives.base import Blocks, Score, spending
from lcsc.objectives.language_modeling import LanguageModeling
from lcsc.objectives.shared import choose_device
from lcsc.operators.base import Candidate

#: Network evaluations that a window costs in training; a backward pass counts two.
FORWARDS = 3
DEVICES = ("auto", "cpu", "cuda", "cuda:0")


@register("objective", "uptrained_loss", source="lcsc; uptraining of arXiv:2305.13245 and arXiv:2212.05055")
@dataclass(frozen=True)
class UptrainedLoss(LanguageModeling):
    """`language_modeling` of what a fixed budget of continued training makes of a candidate.

    Each candidate is trained with transformers' `Trainer` from a new optimizer, on the same windows of the text's
    training part in the same order; the search and report halves are not trained on. With `num_steps` 0 it is
    `language_modeling` to the bit. The weights of a candidate stay what its operator made: an export is where a
    training begins (`trainer.start`), and it is scored by training it again.

    A score costs `3 x num_steps x train_batch_size` network calls beside its own. They are counted where a score
    begins, whether the trained network was still at hand or not, so that a journal does not tell what a worker did
    before. Full scores hold `trained_tokens` and `training_flops` too.

    Args:
        num_steps: optimizer steps of a candidate.
        learning_rate: of AdamW.
        warmup_steps: steps in which the rate rises from 0.
        schedule: of the learning rate, by its name in transformers.
        train_batch_size: blocks a step, of `block_length` tokens.
        weight_decay: of AdamW.
        max_grad_norm: larger gradients are scaled down to it.
        train_seed: of the windows; all candidates of all searches with it see the same.
        keep: trained networks held in memory, so that a candidate which is scored again is not trained again.
    """

    num_steps: int = 50
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "constant_with_warmup"
    train_batch_size: int = 16
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    train_seed: int = 0
    keep: int = 4

    name: ClassVar[str] = "uptrained_loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self, "objective.")
        for name, least in (("num_steps", 0), ("train_batch_size", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"`objective.{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.device not in DEVICES:
            raise ConfigError(
                f"`objective.device` is `{self.device}`, and transformers trains on the first GPU that it sees. Use "
                f"one of {', '.join(DEVICES)}, and CUDA_VISIBLE_DEVICES to choose."
            )
        _ = SeedRange(self.train_seed, Purpose.TRAIN)  # checks it
        self.__dict__["_courses"] = OrderedDict()

    @property
    def fit(self) -> Fit:
        """The training of a candidate."""
        return Fit(
            self.num_steps,
            self.train_batch_size,
            self.block_length,
            self.learning_rate,
            self.weight_decay,
            self.schedule,
            self.warmup_steps,
            self.max_grad_norm,
            cpu=choose_device(self.device).type == "cpu",
        )

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`."""
        further = self._further(images)
        with spending(further):
            score = super().__call__(candidate, seed=seed, purpose=purpose, images=images, full=full)
        return dataclasses.replace(score, further=further)

    def block_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int
    ) -> Blocks:
        """See `Raceable.block_states`."""
        further = self._further(images)
        with spending(further):
            blocks = super().block_states(candidate, seed=seed, purpose=purpose, images=images, num_blocks=num_blocks)
        return dataclasses.replace(blocks, image_forwards=blocks.image_forwards + further)

    def leg_states(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, num_blocks: int, steps: range
    ) -> Blocks:
        """See `RaceableBySteps.leg_states`."""
        further = FORWARDS * len(steps) * self.train_batch_size
        with spending(further):
            live = self._trained(candidate, steps.stop)
            blocks = self._states(live, seed, purpose, images, num_blocks)
        return dataclasses.replace(blocks, image_forwards=blocks.image_forwards + further)

    @property
    def no_gradient(self) -> str | None:
        """See `Differentiable.no_gradient`."""
        return f"objective `{self.name}` is behind a training, which has no derivative here" if self.num_steps else None

    def circumstances(self) -> dict[str, Any]:
        """What `language_modeling` says, and the training."""
        said = super().circumstances()
        training = {**dataclasses.asdict(self.fit), "train_seed": self.train_seed}
        del training["cpu"]
        digest = value_digest({"name": self.name, "before": said["detector_digest"], **training})
        return {**said, "detector_digest": digest, "training": training}

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        tokens = self.num_steps * self.train_batch_size * self._window
        costs = {"trained_tokens": tokens, "training_flops": self._training_flops(live.net)}
        return {
            **super()._others(live, purpose, rows_N, value, se),
            **{name: {"value": float(cost), "se": 0.0} for name, cost in costs.items()},
        }

    def _further(self, images: range) -> int:
        """Network evaluations of the training, where this score is the first of its images."""
        return 0 if images.start else FORWARDS * self.num_steps * self.train_batch_size

    def _live(self, candidate: Candidate) -> LiveModel:
        return self._trained(candidate, self.num_steps)

    def _trained(self, candidate: Candidate, stop: int) -> LiveModel:
        """The network after so many steps; one that is kept after fewer goes on."""
        if not stop:
            return super()._live(candidate)
        fresh = super()._live(candidate)
        kept: OrderedDict[str, _Course] = self.__dict__["_courses"]
        key = _digest(candidate, fresh.theta_P)
        course = kept.pop(key, None)
        if course is None or not course.live.intact or course.step > stop:
            course = _Course(fresh)
            self.__dict__["_kept"].forget()  # its weights are no longer a candidate's
        if course.step < stop:
            self._train(course, stop)
        kept[key] = course
        while len(kept) > self.keep:
            kept.popitem(last=False)
        return course.live

    def _training_flops(self, net: nn.Module) -> int:
        return training_flops(net, self.num_steps * self.train_batch_size * self._window, self._window)

    @property
    def _window(self) -> int:
        """Tokens of a window, as a network reads them."""
        return self.block_length

    def _windows(self, net: nn.Module, seeds: SeedRange) -> Windows:
        """What it trains on."""
        return Windows(self.dataset.tokens(TextPart.TRAIN), self.fit, seeds)

    def _train(self, course: _Course, stop: int) -> None:
        """The network trained in place until a step."""
        seeds, live = SeedRange(self.train_seed, Purpose.TRAIN), course.live
        windows = self._windows(live.net, seeds)
        live.net.requires_grad_(True)
        with own_randomness(), torch.enable_grad():
            begun = self.fit.run_until(live.net, windows, course.folder, stop, course.begun)
        course.step, course.begun = stop, begun
        live.net.zero_grad(set_to_none=True)
        live.net.requires_grad_(False).eval()
        if begun is None:
            course.close()


class _Course:
    """A network on the way through its training, and the folder of the state that it goes on from, while there is one.

    The folder goes with the object, also where a process ends.
    """

    def __init__(self, live: LiveModel) -> None:
        self.live, self.step, self.begun = live, 0, None
        self.folder = Path(tempfile.mkdtemp(prefix="lcsc-"))
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _digest(candidate: Candidate, theta_P: Tensor) -> str:
    """Hex SHA-256 of a candidate: its architecture and its weights."""
    arch = value_digest([plain(candidate.arch), {name: list(shape) for name, shape in candidate.layout.shapes.items()}])
    return hashlib.sha256(arch.encode() + theta_P.cpu().numpy().tobytes()).hexdigest()

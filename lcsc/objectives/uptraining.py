"""What objectives share that train each candidate for a while before they score it."""

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
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import plain
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.models.fit import Fit, Windows, check_fit, own_randomness
from lcsc.models.flat import LiveModel
from lcsc.objectives.base import Blocks, Score, spending
from lcsc.objectives.mean_loss import MeanLoss
from lcsc.objectives.shared import choose_device
from lcsc.operators.base import Candidate

#: Network evaluations that a window costs in training; a backward pass counts two.
FORWARDS = 3
DEVICES = ("auto", "cpu", "cuda", "cuda:0")


@dataclass(frozen=True, kw_only=True)
class Uptraining(MeanLoss):
    """A mean loss of what a fixed budget of training makes of a candidate.

    Each candidate is trained with transformers' `Trainer` from a new optimizer, on the same windows in the same order.
    The weights of a candidate stay what its operator made: an export is where a training begins (`trainer.start`), and
    it is scored by training it again.

    A score costs `3 x num_steps x train_batch_size` network calls beside its own. They are counted where a score
    begins, whether the trained network was still at hand or not, so that a journal does not tell what a worker did
    before.

    A subclass has `fit` and `_windows`, and calls `_check_training` when it is made.

    Args:
        num_steps: optimizer steps of a candidate; 0 scores it as it is.
        learning_rate: of AdamW.
        warmup_steps: steps in which the rate rises from 0.
        schedule: of the learning rate, by its name in transformers.
        train_batch_size: windows a step.
        weight_decay: of AdamW.
        max_grad_norm: larger gradients are scaled down to it.
        train_seed: of the windows; all candidates of all searches with it see the same.
        keep: trained networks held in memory, so that a candidate which is scored again is not trained again.
    """

    num_steps: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "constant_with_warmup"
    train_batch_size: int = 16
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    train_seed: int = 0
    keep: int = 4

    @property
    def fit(self) -> Fit:
        """The training of a candidate."""
        raise NotImplementedError

    def _windows(self, net: nn.Module, seeds: SeedRange) -> Windows:
        """What it trains on."""
        raise NotImplementedError

    def _check_training(self) -> None:
        """Refuse settings that no training can have; raises ConfigError."""
        for name, least in (("num_steps", 0), ("train_batch_size", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"`objective.{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.num_steps and self.device not in DEVICES:
            raise ConfigError(
                f"`objective.device` is `{self.device}`, and transformers trains on the first GPU that it sees. Use "
                f"one of {', '.join(DEVICES)}, and CUDA_VISIBLE_DEVICES to choose."
            )
        _ = SeedRange(self.train_seed, Purpose.TRAIN)  # checks it
        self.__dict__["_courses"] = OrderedDict()
        check_fit(self.fit, "objective.")

    def _fit(self, block_length: int) -> Fit:
        """The settings of a training on windows of so many tokens."""
        return Fit(
            self.num_steps,
            self.train_batch_size,
            block_length,
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

    def _with_training(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Circumstances of a loss, and of its training."""
        training = {**dataclasses.asdict(self.fit), "train_seed": self.train_seed}
        del training["cpu"]
        digest = value_digest({"name": self.name, "before": said["detector_digest"], **training})
        return {**said, "detector_digest": digest, "training": training}

    def _further(self, images: range) -> int:
        """Network evaluations of the training, where this score is the first of its images."""
        return 0 if images.start else FORWARDS * self.num_steps * self.train_batch_size

    def _fresh(self, candidate: Candidate) -> LiveModel:
        """A candidate's network before its training."""
        return super()._live(candidate)

    def _live(self, candidate: Candidate) -> LiveModel:
        return self._trained(candidate, self.num_steps)

    def _trained(self, candidate: Candidate, stop: int) -> LiveModel:
        """The network after so many steps; one that is kept after fewer goes on."""
        fresh = self._fresh(candidate)
        if not stop:
            return fresh
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

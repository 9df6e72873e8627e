"""What a trainer is, and what it asks of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from lcsc.datasets.base import Dataset
    from lcsc.models.base import Model


class Trainer(Protocol):
    """Makes a bank: a folder of checkpoints `checkpoint-{step:06d}/unet/` in diffusers layout.

    A language model's are `checkpoint-{step:06d}/` in the layout of transformers, its data set is a text, and no
    `model` stands between network and loss.
    """

    def train(
        self,
        *,
        arch: Mapping[str, Any],
        model: Model,
        dataset: Dataset,
        out: Path,
        seed: int,
        progress: bool | None = None,
    ) -> Path:
        """Fill `out`, or continue filling it, and return it.

        Args:
            arch: `{"class": ..., "config": {...}}` of the network.
            model: how the network becomes a denoiser.
            dataset: the training images.
            out: the bank's folder.
            seed: all randomness follows from it.
            progress: False silences; otherwise a bar on a terminal, about ten plain lines elsewhere.

        Raises:
            RunError: `out` belongs to another configuration or another process.
            OutputExistsError: `out` holds something that is not a bank of ours.
            EvaluationError: the loss is not finite.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Settings of the loop that cost accuracy or repeatability for speed or room; a trainer has them by inheriting.

    The defaults change nothing and are left out of `train.json`.

    Args:
        mixed_precision: `no`, or `bf16` for matrix products and convolutions in bfloat16; weights, optimizer and loss
            stay float32.
        channels_last: keep images and convolution weights as NHWC in memory, which tensor cores read faster.
        compile: `no`, or a backend of torch.compile, usually `inductor`.
        codec: `no`, or how the bank is coded: `lossless`, or `lossy`, where the bank holds nearly what was trained.
    """

    mixed_precision: str = "no"
    channels_last: bool = False
    compile: str = "no"
    codec: str = "no"


class Recipe(Protocol):
    """What the loop needs to know about a kind of training: its random draws, its loss and a few numbers.

    A recipe that also has the fields of `Speed` is trained by them.
    """

    @property
    def num_steps(self) -> int: ...  # optimizer steps
    @property
    def batch_size(self) -> int: ...  # images a step, over all processes
    @property
    def learning_rate(self) -> float: ...  # constant
    @property
    def weight_decay(self) -> float: ...  # decoupled
    @property
    def save_every(self) -> int: ...  # steps between checkpoints

    def check(self, model: Model) -> None:
        """Refuse settings that contradict the model's.

        Raises:
            ConfigError: naming both values.
        """
        ...

    def draw(self, rng: np.random.Generator, step: int, shape_NCHW: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The random numbers of one step; the first axis of every array has length N."""
        ...

    def loss(self, net: nn.Module, model: Model, images_NCHW: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Loss of each image, shape (N,), float32."""
        ...

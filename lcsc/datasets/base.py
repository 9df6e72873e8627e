"""What a data set is: named images of one shape, or text."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.music.pairs import Pair


class Dataset(Protocol):
    """Images in memory, in a fixed order."""

    @property
    def name(self) -> str:
        """Short name for tables and titles."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def images(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1]; made once, not to be written to."""
        ...

    def labels(self) -> Tensor | None:
        """Class of each image, shape (N,), int64; None when the data set has none."""
        ...


class TextPart(Enum):
    """What a stretch of a text is for."""

    TRAIN = 0
    SEARCH = 1
    REPORT = 2


class TextDataset(Protocol):
    """Tokens in memory, in stretches of equal length, each in one part."""

    @property
    def name(self) -> str:
        """Short name for tables and titles."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens there are."""
        ...

    def tokens(self, part: TextPart) -> Tensor:
        """The stretches of one part, shape (S, L), an integer dtype; made once, not to be written to."""
        ...

    def byte_counts(self, part: TextPart) -> Tensor:
        """Bytes of the text that each of these tokens stands for, shape (S, L), int64; their sum is exact.

        A text may lack this method; then there are no bits per byte.
        """
        ...


class PairDataset(TextDataset, Protocol):
    """Texts and their tunes, which also are a text: one pair after the other."""

    def pairs(self, part: TextPart) -> tuple[Pair, ...]:
        """The pairs of one part, in a fixed order; those of one group are all in one part."""
        ...


def need_images(dataset: object, who: str) -> None:
    """Raise ConfigError where `who`, such as "objective `x`", is given text."""
    if hasattr(dataset, "tokens"):
        kind = type(dataset).__name__
        raise ConfigError(f"{who} reads images, and data set `{kind}` holds text. Choose another one.")


def need_text(dataset: object, who: str) -> None:
    """Raise ConfigError where `who`, such as "objective `x`", is given images."""
    if not hasattr(dataset, "tokens"):
        kind = type(dataset).__name__
        raise ConfigError(f"{who} reads text, and data set `{kind}` holds images. Choose dataset=text.")


def need_pairs(dataset: object, who: str) -> None:
    """Raise ConfigError where `who`, such as "objective `x`", is given anything but texts and their tunes."""
    if not hasattr(dataset, "pairs"):
        kind = type(dataset).__name__
        raise ConfigError(f"{who} reads texts and their tunes; data set `{kind}` holds none. Choose dataset=tunes.")

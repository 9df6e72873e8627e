"""Text as tokens, cut into what a language model is trained on, searched against and reported on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.datasets.tokenizer import Encoded, encode

#: Stream of the cut; streams 0 and 1 of this purpose split images and draw the toy's.
CUT = 2


@register("dataset", "text", source="lcsc; its default text is Python's language reference, shipped as pydoc_data")
@dataclass(frozen=True)
class Text:
    """Text files. Without `tokenizer` a token is a byte, so the vocabulary has 256.

    The text is cut into stretches of `stretch` tokens. Of every `every` neighbours one, drawn by `seed`, goes to the
    search half, another one to the report half, and the others to training: all three come from all over the text, and
    no token is in two of them. What is left over at the end goes to training.

    Without `path` the text is the language reference that Python's `help` shows (`pydoc_data.topics`), about 0.5 MB. It
    is the same on all machines with one version of Python; the digest that a bank and a run keep tells others apart.

    Args:
        path: a text file, or a folder, whose `.txt` files below it are read in the order of their paths.
        tokenizer: folder of a model of transformers, whose `tokenizer.json` cuts the text into tokens; nothing is
            added to them. Null takes bytes.
        stretch: tokens of a stretch; no block of tokens reaches over its end.
        every: stretches of which one is held out for the search and one for the report.
        seed: of the cut.
    """

    path: str | None = None
    tokenizer: str | None = None
    stretch: int = 2048
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stretch < 2:
            raise ConfigError(f"dataset `text` has `stretch` {self.stretch}; it must be at least 2.")
        if self.every < 3:
            raise ConfigError(
                f"dataset `text` has `every` {self.every}; it must be at least 3: one stretch each for training, "
                "search and report."
            )

    @property
    def name(self) -> str:
        """Short name for tables and titles: the file's."""
        return "python_reference" if self.path is None else Path(self.path).stem

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer, with the tokens that were added to it; 256 where a token is a byte."""
        return 256 if self._encoded is None else self._encoded.vocab_size

    def tokens(self, part: TextPart) -> Tensor:
        """The stretches of one part, shape (S, stretch), uint8; made once, not to be written to.

        Raises:
            ConfigError: the text cannot be read, or is too short for one stretch of each part.
        """
        return self._parts[part]

    def byte_counts(self, part: TextPart) -> Tensor:
        """Bytes that each token of one part stands for, shape (S, stretch), int64.

        Raises:
            ConfigError: as `tokens`.
        """
        if self._encoded is None:
            return torch.ones(self.tokens(part).shape, dtype=torch.int64)
        return self._cut(torch.from_numpy(self._encoded.bytes_N))[part]

    @cached_property
    def _encoded(self) -> Encoded | None:
        return None if self.tokenizer is None else encode(_read(self.path), Path(self.tokenizer))

    @cached_property
    def _parts(self) -> Mapping[TextPart, Tensor]:
        if self._encoded is not None:
            return self._cut(torch.from_numpy(self._encoded.ids_N))
        return self._cut(torch.frombuffer(bytearray(_read(self.path)), dtype=torch.uint8))

    def _cut(self, text_N: Tensor) -> Mapping[TextPart, Tensor]:
        """Something of each token in stretches, by part."""
        if (num := len(text_N) // self.stretch) < self.every:
            unit = "bytes" if self.tokenizer is None else "tokens"
            raise ConfigError(
                f"dataset `text` has {len(text_N)} {unit}, and `every` {self.every} stretches of {self.stretch} need "
                f"{self.every * self.stretch}. Give more text, or a smaller `stretch`."
            )
        stretches_SL = text_N[: num * self.stretch].view(num, -1)
        part_S = torch.full((num,), TextPart.TRAIN.value)
        seeds = SeedRange(self.seed, Purpose.SPLIT)
        for group in range(num // self.every):
            search, report = seeds.generator(group, CUT).permutation(self.every)[:2] + group * self.every
            part_S[search], part_S[report] = TextPart.SEARCH.value, TextPart.REPORT.value
        return {part: stretches_SL[part_S == part.value] for part in TextPart}


def _read(path: str | None) -> bytes:
    """The text; raises ConfigError when there is none."""
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ConfigError(
                "dataset `text` has no `path`, and this Python comes without its language reference "
                "(`pydoc_data`). Give `dataset.path` a text file."
            ) from error
        return "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
    here = Path(path)
    files = sorted(here.rglob("*.txt")) if here.is_dir() else [here]
    if not files:
        raise ConfigError(f"dataset `text` has `path` `{path}`, a folder without a `.txt` file. Give another one.")
    try:
        return b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise ConfigError(
            f"dataset `text` cannot read `{path}`: {error.strerror or error}. Give a text file."
        ) from error

"""Tunes in ABC notation with the words that ask for them, for text to music."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.music.abc import Tune, read_tunes
from lcsc.music.compose import compose
from lcsc.music.pairs import Pair, rhythm_of_file, text_of
from lcsc.music.similar import groups_of
from lcsc.music.tokens import TOKENS, VOCAB_SIZE, pair_tokens

#: Streams of the cut and of the composed tunes; 0 to 2 of this purpose are the images', the toy's and the texts'.
CUT, COMPOSED = 3, 4


@register(
    "dataset", "tunes", source="arXiv:2211.11216 (text and tune in ABC notation); its default tunes are lcsc's own"
)
@dataclass(frozen=True)
class Tunes:
    """Pairs of a text, made of a tune's own headers, and the tune: `a jig in D, 6/8` and its notes.

    A tune is its metre, unit, key and notes in ABC notation without comments, chord names and words. The text names
    rhythm, key and metre and in half of the tunes origin or title. A token is a character or one of 28 notations, such
    as `|:`; there are 128, whatever the tunes are.

    Tunes that are nearly the same, by title or by their melody in whatever key, are all in one part. Of every `every`
    tunes one is for the search, one for the report and the rest for training.

    As a text, for trainers and losses that know nothing of pairs, each part is its pairs one after the other, cut into
    stretches; the last one is filled up from the part's own beginning.

    Without `path` the tunes are composed by a rule that is part of lcsc, so they are nobody's and need no download.

    Args:
        path: an ABC file, or a folder, whose `.abc` files below it are read in the order of their paths. A tune without
            a rhythm gets that of its file's name, as in `jigs.abc`.
        num: tunes that are composed where there is no `path`.
        stretch: tokens of a stretch.
        longest: tokens of a pair; longer ones are left out.
        every: tunes of which one is held out for the search and one for the report.
        seed: of the cut, and of what is composed.
    """

    path: str | None = None
    num: int = 400
    stretch: int = 512
    longest: int = 1024
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num", 3), ("stretch", 2), ("longest", 8), ("every", 3)):
            if getattr(self, name) < least:
                raise ConfigError(f"dataset `tunes` has `{name}` {getattr(self, name)}; it must be at least {least}.")

    @property
    def name(self) -> str:
        """Short name for tables and titles: the file's."""
        return "composed_tunes" if self.path is None else Path(self.path).stem

    @property
    def vocab_size(self) -> int:
        """Of characters and notations."""
        return VOCAB_SIZE

    def pairs(self, part: TextPart) -> tuple[Pair, ...]:
        """Texts and tunes of one part, in an order drawn by `seed`.

        Raises:
            ConfigError: the tunes cannot be read, or are too few for three parts.
        """
        return self._pairs[part]

    def tokens(self, part: TextPart) -> Tensor:
        """The stretches of one part, shape (S, stretch), uint8; made once, not to be written to.

        Raises:
            ConfigError: as `pairs`.
        """
        return self._tokens[part]

    def byte_counts(self, part: TextPart) -> Tensor:
        """Bytes that each token stands for, shape (S, stretch), int64; marks stand for none."""
        return torch.tensor([len(token) for token in TOKENS])[self.tokens(part).long()]

    @cached_property
    def _tokens(self) -> Mapping[TextPart, Tensor]:
        parts = {}
        for part, pairs in self._pairs.items():
            stream = np.concatenate([np.array(pair_tokens(pair.text, pair.tune), np.uint8) for pair in pairs])
            parts[part] = torch.from_numpy(np.resize(stream, (-(-len(stream) // self.stretch), self.stretch)))
        return parts

    @cached_property
    def _pairs(self) -> Mapping[TextPart, tuple[Pair, ...]]:
        tunes = self._composed() if self.path is None else _read(self.path)
        tunes = list({tune.abc: tune for tune in tunes}.values())
        tunes = [tune for tune in tunes if len(pair_tokens(text_of(tune), tune.abc)) <= self.longest]
        groups_N = groups_of([tune.body for tune in tunes], [tune.title for tune in tunes])
        names, sizes = np.unique(groups_N, return_counts=True)
        order = SeedRange(self.seed, Purpose.SPLIT).generator(0, CUT).permutation(len(names))
        room = len(tunes) // self.every
        rows: dict[TextPart, list[int]] = {part: [] for part in TextPart}
        for place in order:
            part = TextPart.TRAIN
            # one large family would be most of a small part, and says little about other tunes
            for held_out in (TextPart.SEARCH, TextPart.REPORT):
                if sizes[place] * 2 <= max(room, 2) and len(rows[held_out]) + sizes[place] <= room:
                    part = held_out
                    break
            rows[part].extend(np.flatnonzero(groups_N == names[place]).tolist())
        if not all(rows.values()):
            counts = {part.name.lower(): len(found) for part, found in rows.items()}
            raise ConfigError(
                f"dataset `tunes` has {len(tunes)} tunes of at most {self.longest} tokens in {len(names)} families, "
                f"which gives {counts} with `every` {self.every}. Give more tunes, or a smaller `every`."
            )
        return {
            part: tuple(Pair(text_of(tunes[i]), tunes[i].abc, int(groups_N[i])) for i in found)
            for part, found in rows.items()
        }

    def _composed(self) -> list[Tune]:
        seeds = SeedRange(self.seed, Purpose.SPLIT)
        return [compose(seeds.generator(i, COMPOSED), i) for i in range(self.num)]


def _read(path: str) -> list[Tune]:
    here = Path(path)
    files = sorted(here.rglob("*.abc")) if here.is_dir() else [here]
    if not files:
        raise ConfigError(f"dataset `tunes` has `path` `{path}`, a folder without an `.abc` file. Give another one.")
    tunes: list[Tune] = []
    for file in files:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"dataset `tunes` cannot read `{file}`: {error.strerror or error}. Give a file in ABC notation."
            ) from error
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("latin-1")  # what older files are in
        rhythm = rhythm_of_file(file.stem)
        tunes += [tune if tune.rhythm else replace(tune, rhythm=rhythm) for tune in read_tunes(text)]
    return tunes

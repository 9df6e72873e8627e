"""What a warm start is made of: checkpoints of one or two models, pieces that read them, and what is told of them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.lora import refuse_lora
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.seeds import SeedRange
from lcsc.core.space import Point
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, row_of
from lcsc.recycling.defaults import filled_config
from lcsc.recycling.families import FAMILIES, Family, find_family
from lcsc.recycling.vocabulary import Rows, Vocabulary, find_rows, find_vocabulary
from lcsc.recycling.warm_start import Origin, Side, Target, find_origin, projection, shared, side_targets

#: which layers are taken where a number of them is set: rules for the baselines
RULES = ("first", "last", "spread")
#: most folders beside the bank that are kept open
MAX_OPEN = 8
_BLOCK = re.compile(r"(.+\.(?:layer|h)\.\d+)\..+")


@dataclass(frozen=True)
class Found:
    """Where a side comes from.

    Args:
        bank: of its source; of a random side what gives it its sizes.
        row: of the bank.
        family: of the source.
        config: of the source, as it is written.
        sizes: of the source; see `Family.sizes`.
        random: whether its numbers are not taken.
    """

    bank: CheckpointBank
    row: int
    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    random: bool

    @property
    def folder(self) -> Path:
        """Where the source's files lie."""
        return self.bank.rows[self.row].files[0].parent

    def new_family(self, role: str) -> Family:
        """The family of the new side: a random encoder with the sizes of a GPT-2 is a BERT."""
        return FAMILIES["bert"] if role == "encoder" and not self.family.encodes else self.family


class Sources:
    """Opens the folders that settings name beside the bank, once each."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int | None, str], CheckpointBank] = {}

    def find(
        self, bank: CheckpointBank, place: str | None, role: str, step: int | None, at: np.ndarray | None, random: bool
    ) -> Found:
        """The checkpoint of a side.

        Args:
            bank: the operator's own.
            place: a folder; None for the bank.
            role: `encoder` or `decoder`.
            step: of the source; None for the last, or the one that `at` names.
            at: a float that counts the source's checkpoints from the last on.
            random: whether only its sizes are wanted.

        Raises:
            BankError: it cannot be opened, or is a model that cannot be this side.
            ConfigError: it lacks the step.
        """
        found = bank if place is None else self._opened(bank, Path(place), None)
        if place is None and step is not None and step not in bank.steps:
            found = self._narrowed(bank, step, f"{role}_step")
        refuse_lora(found.layout.shapes, found.path)
        sized = "decoder" if random and role == "encoder" else role
        family = find_family(found.arch, found.path, sized)
        config = need_arch(found)["config"]
        row = row_of(found, step, f"{role}_step")
        if at is not None:
            row = found.num_checkpoints - 1 - min(int(at.reshape(-1)[0]), found.num_checkpoints - 1)
        return Found(found, row, family, config, family.sizes(filled_config(family.kind, config)), random)

    def origin(self, bank: CheckpointBank, tag: str) -> Origin:
        """The tensors that a checkpoint of a bank has, under what it is called in a plan."""
        family = find_family(bank.arch, bank.path, "decoder")
        sizes = family.sizes(filled_config(family.kind, need_arch(bank)["config"]))
        return find_origin(family, sizes, bank.layout.shapes, tag, bank.path)

    def _narrowed(self, bank: CheckpointBank, step: int, name: str) -> CheckpointBank:
        """A step beside those that the bank was opened with, as where only the recipe's own is."""
        try:
            return self._opened(bank, bank.path, step)
        except BankError:
            row_of(bank, step, name)  # says which steps there are
            raise

    def _opened(self, bank: CheckpointBank, path: Path, step: int | None) -> CheckpointBank:
        storage = "streamed" if bank.storage == "streamed" else "exact"
        key = (str(path.absolute()), step, storage)
        if key not in self._open:
            how = {name: bank.config[name] for name in ("component", "weights")} if path == bank.path else {}
            while len(self._open) >= MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[key] = CheckpointBank.open(path, select=Selection(step, step), storage=storage, **how)
        return self._open[key]


def kinds_of(bank: CheckpointBank) -> set[str]:
    """Dtypes of a bank's weights."""
    return set(bank.dtypes.values())


def dtype_of(bank: CheckpointBank, sources: Mapping[str, CheckpointBank]) -> str:
    """The dtype of all sources; raises ConfigError where they have several, because a model runs in one."""
    kinds = set.union(kinds_of(bank), *map(kinds_of, sources.values()))
    if len(kinds) > 1:
        raise ConfigError(f"the checkpoints are in {', '.join(sorted(kinds))}; save them in one dtype first.")
    return kinds.pop()


def pick(point: Point | None, name: str, options: Sequence[str]) -> str:
    """The option that a box of one float names; the first where there is no such box."""
    at = 0 if point is None or name not in point else int(np.asarray(point[name]).reshape(-1)[0])
    return options[min(max(at, 0), len(options) - 1)]


def by_rule(rule: str, L: int, num: int) -> tuple[int, ...]:
    """The layers of a rule of `RULES`."""
    spread = [math.floor(i * L / num) for i in range(num)]
    return tuple({"first": range(num), "last": range(L - num, L), "spread": spread}[rule])


def differ(a: Found, b: Found) -> bool:
    """Whether two sources are known to have other tokens."""
    if a.bank is b.bank:
        return False
    mine, theirs = find_vocabulary(a.folder), find_vocabulary(b.folder)
    return mine is not None and theirs is not None and mine.ids != theirs.ids


def norm_of(origin: Origin) -> str:
    """A small tensor that every checkpoint has."""
    return next(key for name, key in origin.names.items() if name in ("embeddings.LayerNorm.bias", "ln_f.bias"))


def need_vocabulary(place: str | None) -> Vocabulary:
    """The tokens of the folder that `operator.vocabulary` names; raises ConfigError where no file lists them."""
    new = find_vocabulary(Path(str(place)))
    if new is None:
        raise ConfigError(
            f"`operator.vocabulary` is `{place}`, which has no tokenizer.json, vocab.json or vocab.txt. Give a folder "
            "with one of them."
        )
    return new


def mix_of(given: Any, role: str, L: int, point: Point | None) -> tuple[float, ...]:
    """Shares of the second checkpoint of a side, L + 1 numbers; as set, at a point, or none."""
    if given is None:
        given = 0.0 if point is None or f"{role}_mix" not in point else tuple(map(float, point[f"{role}_mix"]))
    if not isinstance(given, tuple):
        return (float(given),) * (L + 1)
    if len(given) != L + 1:
        raise ConfigError(
            f"`operator.{role}_mix` has {len(given)} numbers for {L} layers; give one each and one for all else."
        )
    return tuple(map(float, given))


def token_rows(found: Found, role: str, new: Vocabulary, how: str) -> Rows | None:
    """What rows for a new vocabulary are made of by one of `RENEWED`; None for a random side."""
    if found.random:
        return None
    if (old := find_vocabulary(found.folder)) is None:
        raise ConfigError(
            f"`operator.{role}_embeddings` is `{how}`, and `{found.folder}` has no tokenizer.json, vocab.json or "
            "vocab.txt to compare with. Put it there."
        )
    return find_rows(old, new, spell=how == "pieces")


def all_targets(sides: Mapping[str, Side], seeds: SeedRange, share: str, cross: str | None) -> list[Target]:
    """All tensors of the new model, those that are the encoder's as `shared`."""
    decoder = sides["decoder"]
    out = list(side_targets(decoder, seeds, head=True, pooler=False, cross=cross))
    if "encoder" not in sides:
        return out
    encoder = sides["encoder"]
    out = [*side_targets(encoder, seeds, head=False, pooler=share == "none", cross=None), *out]
    if encoder.sizes["D"] != decoder.sizes["D"]:
        out += projection(encoder.sizes["D"], decoder.sizes["D"], decoder.std, seeds)
    return shared(out, encoder, decoder, share)


def pieces_of(targets: Sequence[Target], like: str) -> Iterator[Piece]:
    """One for each layer, and one for everything else of a side; what is drawn takes the dtype of `like`."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        if target.how != "shared":
            block = _BLOCK.fullmatch(target.name)
            groups.setdefault(block[1] if block else target.name.partition(".")[0], []).append(target)
    for name, group in groups.items():
        reads = tuple(dict.fromkeys([like, *(read for target in group for read in target.reads)]))
        likes = {target.name: like for target in group}
        yield Piece(reads, {t.name: t.shape for t in group}, _Make(name, tuple(group), like), {"block": name}, likes)


@dataclass(frozen=True)
class _Make:
    """Makes the tensors of a piece."""

    name: str
    targets: tuple[Target, ...]
    like: str

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        dtype = tensors[self.like].dtype
        made = {t.name: t.make([tensors[read] for read in t.reads]).to(dtype) for t in self.targets}
        return {name: tensor.contiguous() for name, tensor in made.items()}, {"block": self.name}


# ------------------------------------------------------------------------------------------------------------ report


def tensors_told(targets: Sequence[Target]) -> dict[str, list[str]]:
    """How each tensor of the new model came about, and what it was read from; plain values by name."""
    return {target.name: [target.how, *target.reads] for target in targets}


def provenance_csv(targets: Sequence[Target], checkpoints: Mapping[str, tuple[CheckpointBank, int]]) -> str:
    """A table with a row for each tensor of the new model: how it came about, from which file and key.

    Args:
        targets: all of them.
        checkpoints: bank and row by what reads call them; the plan's own is empty.
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("tensor", "how", "source", "step", "file", "key", "shape", "parameters"))
    for target in targets:
        size = ("x".join(map(str, target.shape)), 0 if target.how == "shared" else target.numel)
        if target.how == "shared" or not target.reads:
            table.writerow((target.name, target.how, "", "", "", target.reads[0] if target.reads else "", *size))
        for read in target.reads if target.how != "shared" else ():
            tag, _, key = read.rpartition(":")
            bank, k = checkpoints[tag]
            row = bank.rows[k]
            place = row.table.get(key) or row.table[bank.layout.ties[key]]
            file = row.files[place.pieces[0].part].name
            table.writerow((target.name, target.how, tag or "bank", row.step, file, key, *size))
    return out.getvalue()

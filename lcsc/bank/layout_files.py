"""Which files of one folder belong together: shards with their index, variants, and the same weights in two formats."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcsc.bank.names import SUFFIXES, is_temporary, parse, split_shard, split_suffix
from lcsc.bank.shard_index import read_index, shown
from lcsc.core.errors import BankError

_INDEX = re.compile(r"(?P<stem>.+?)(?P<suffix>\.safetensors|\.bin|\.pt|\.pth)\.index(?:\.(?P<variant>[\w-]+))?\.json")
_VARIANT = re.compile(r"(?P<stem>.+)\.(?P<variant>fp16|bf16|fp32|fp8\w*|int8|non_ema|no_ema|ema_only)")
#: stems that libraries use whatever the network is; anything behind a dot in them is a variant
_CANONICAL = re.compile(r"(?P<stem>(?:diffusion_pytorch_|pytorch_|adapter_)?model)\.(?P<variant>[A-Za-z][\w-]*)")
_ACCELERATE = re.compile(r"(?:pytorch_)?model_\d+")
#: files that are read beside the weights
_READ = {"config.json", "model_index.json", "adapter_config.json", ".metadata"}
#: an unfinished folder of torch.distributed.checkpoint has these, and no `.metadata`
DCP = ".distcp"


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The files that hold one set of weights.

    Args:
        folder: where they lie.
        stem: their name without number of the shard, variant and ending.
        suffix: ending, one of `names.SUFFIXES`; `.distcp` for a folder of torch.distributed.checkpoint.
        files: file names, shards in order.
        variant: `fp16` and the like, None for full precision.
        index: name of the index of the shards, None when there is none.
    """

    folder: Path
    stem: str
    suffix: str
    files: tuple[str, ...]
    variant: str | None = None
    index: str | None = None

    @property
    def path(self) -> Path:
        """The file, or for several files their folder."""
        single = len(self.files) == 1 and not self.index and self.suffix != DCP
        return self.folder / self.files[0] if single else self.folder

    @property
    def main(self) -> Path:
        """One file that stands for all, where several sets lie in one folder."""
        return self.folder / (self.index or self.files[0])

    @property
    def label(self) -> str:
        """How a note names it."""
        return self.files[0] if len(self.files) == 1 else self.index or f"{self.files[0]} ..."


@dataclass
class Listing:
    """What lies in a folder, by name; nothing is opened but indices of shards."""

    sets: list[WeightSet] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    dcp: bool = False
    unfinished: bool = False


def list_folder(folder: Path) -> Listing:
    """Sort the names in a folder into sets of weights, folders and the rest.

    Raises:
        BankError: the folder cannot be read, or shards are missing, stale or beside a whole file of the same name.
    """
    found, weights, indices = Listing(), [], []
    try:
        entries = sorted((entry.name, _is_folder(entry)) for entry in os.scandir(folder))
    except OSError as error:
        raise BankError(
            f"the folder `{shown(folder)}` cannot be read: {error.strerror}. Check its permissions."
        ) from None
    for name, is_folder in entries:
        if name == ".metadata" and not is_folder:
            found.dcp = True
        elif is_temporary(name):
            found.passed.append(name)
        elif is_folder:
            found.folders.append(name)
        elif split_suffix(name)[1]:
            weights.append(name)
        elif index := _INDEX.fullmatch(name):
            indices.append((name, index))
        elif name.endswith(DCP):
            found.unfinished = True
        else:
            found.others.add(name)
    found.unfinished = found.unfinished and not found.dcp
    found.sets = _sets(folder, weights, indices)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def passed_names(listing: Listing) -> list[str]:
    """Names of a listing that are neither weights, folders, nor files that are read beside them."""
    return listing.passed + sorted(listing.others - _READ)


def _sets(folder: Path, weights: Sequence[str], indices: Sequence[tuple[str, re.Match[str]]]) -> list[WeightSet]:
    shards: dict[tuple[str, str], list[str]] = {}
    whole: dict[tuple[str, str], str] = {}
    for name in weights:
        stem, suffix = split_suffix(name)
        base, shard = split_shard(stem)
        if shard:
            shards.setdefault((base, suffix), []).append(name)
        else:
            whole[base, suffix] = name
    found = []
    for name, index in indices:
        variant = index["variant"]
        base = f"{index['stem']}.{variant}" if variant else index["stem"]
        files = sorted(set(read_index(folder / name).values()))
        if stale := sorted(set(shards.pop((base, index["suffix"]), [])) - set(files)):
            raise BankError(
                f"`{shown(folder / stale[0])}` is a shard that `{shown(name)}` does not list. Remove what an older "
                "save left, or save the checkpoint again."
            )
        for file in files:  # an index may list a file that is not numbered
            stem, suffix = split_suffix(file)
            whole.pop((stem, suffix), None)
        if (base, index["suffix"]) in whole:
            raise _both(folder, whole[base, index["suffix"]], name)
        found.append(_weight_set(folder, base, index["suffix"], files, name))
    for (base, suffix), names in shards.items():
        _check_complete(folder, names)
        if (base, suffix) in whole:
            raise _both(folder, whole[base, suffix], names[0])
        found.append(_weight_set(folder, base, suffix, names, None))
    found += [_weight_set(folder, base, suffix, [name], None) for (base, suffix), name in whole.items()]
    return sorted(found, key=lambda item: (item.stem, item.variant or "", item.suffix))


def _both(folder: Path, file: str, shard: str) -> BankError:
    return BankError(
        f"`{shown(folder)}` holds `{shown(file)}` and the same weights in parts (`{shown(shard)}`). "
        "One of them is stale; move it away."
    )


def _weight_set(folder: Path, base: str, suffix: str, files: Iterable[str], index: str | None) -> WeightSet:
    found = _CANONICAL.fullmatch(base) or _VARIANT.fullmatch(base)
    stem, variant = (found["stem"], found["variant"]) if found else (base, None)
    return WeightSet(folder, stem, suffix, tuple(files), variant, index)


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    """Raise BankError unless shards without an index are numbered 1 to N, all of the same N."""
    numbers = [split_shard(split_suffix(name)[0])[1] or (0, 0) for name in names]
    total = numbers[0][1]
    missing = sorted(set(range(1, min(total, 100_000) + 1)) - {number for number, _ in numbers})
    if {count for _, count in numbers} != {total} or missing or total > 100_000:
        what = f"number {missing[0]} of {total} is missing" if missing else "they come from two saves"
        raise BankError(
            f"the shards `{shown(folder / names[0])}` ... are not complete: {what}. Copy the checkpoint again."
        )


def is_accelerate_model(stem: str) -> bool:
    """Whether a stem is that of accelerate's second or later model (`model_1`)."""
    return bool(_ACCELERATE.fullmatch(stem))


def prefer(sets: Sequence[WeightSet]) -> tuple[list[WeightSet], list[str], list[str]]:
    """One set for each network: full precision before variants, safetensors before formats that are pickles.

    Returns:
        The sets to read, notes about the choice, and names of training states that are passed over.

    Raises:
        BankError: several variants and no full precision.
    """
    notes: list[str] = []
    states: list[str] = []
    groups: dict[str, list[WeightSet]] = {}
    for item in sets:
        if parse(item.stem).state:
            states += item.files
        elif item.suffix == ".pkl" and parse(item.stem).kind is None:
            notes.append(f"pickles such as `{shown(item.label)}` are not read; see `lcsc bank convert`")
        else:
            stem = re.sub(r"^pytorch_model(?=$|_\d+$)", "model", item.stem)
            groups.setdefault(stem, []).append(item)
    chosen = []
    for items in groups.values():
        full = [item for item in items if item.variant is None]
        variants = sorted({item.variant for item in items if item.variant})
        if not full and len(variants) > 1:
            raise BankError(
                f"`{shown(items[0].folder)}` holds `{shown(items[0].stem)}` in the variants {', '.join(variants)} and "
                "not in full precision. Keep one of them in the folder."
            )
        if variants:
            said = f"the variant `{variants[0]}` is read (there is no full precision)"
            notes.append(f"variants passed over: {', '.join(variants)}" if full else said)
        left = sorted(full or items, key=lambda item: SUFFIXES.index(item.suffix))
        chosen.append(left[0])
        if len(left) > 1:
            notes.append(f"{left[0].suffix} is read, the same in {', '.join(x.suffix for x in left[1:])} passed over")
    return chosen, notes, states

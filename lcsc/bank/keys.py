"""One set of tensor names for all checkpoints: a checked bijection, never a guess.

Wrappers put their own words into names: `module.` (DataParallel and DDP), `_orig_mod.` (torch.compile),
`_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.` (FSDP). A run that was compiled half-way has both spellings.
They are taken off only where that makes all files agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lcsc.bank.extents import FLOATS, Table
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError

if TYPE_CHECKING:
    from lcsc.bank.find import Checkpoint

#: words that wrappers add at the front of names
PREFIXES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: differences that an error names
SHOWN = 10


def strip_wrappers(name: str) -> str:
    """A tensor's name without wrapper words: any of them at the front, those with an underscore anywhere."""
    words = name.split(".")
    while len(words) > 1 and words[0] in PREFIXES:
        words.pop(0)
    return ".".join([word for word in words[:-1] if word not in PREFIXES[1:]] + words[-1:])


def agree(checkpoints: Sequence[Checkpoint]) -> list[Table]:
    """The checkpoints' tables under one set of names, in the order given.

    Tables that were one object stay one object; where all names agree already, the tables come back as they are.

    Raises:
        BankError: names or shapes differ; both files and the first ten differences are named.
    """
    firsts: dict[int, Checkpoint] = {}
    for item in checkpoints:
        firsts.setdefault(id(item.table), item)
    distinct = list(firsts.values())
    renamed = {id(item.table): table for item, table in zip(distinct, _common(distinct), strict=True)}
    first = distinct[0]
    for other in distinct[1:]:
        _check(first, renamed[id(first.table)], other, renamed[id(other.table)])
    return [renamed[id(item.table)] for item in checkpoints]


def unfilled(group: Sequence[Checkpoint]) -> set[str]:
    """Names, without wrapper words, for which no file of a group of EMAs has one: buffers."""
    return set.intersection(*({strip_wrappers(name) for name in names} for names in {item.filled for item in group}))


def check_filled(checkpoints: Sequence[Checkpoint], group: Sequence[Checkpoint]) -> None:
    """Raise BankError where a checkpoint has raw tensors in places for which other files of its group have an EMA.

    Buffers have no EMA in any file. A name that only some files lack is a parameter whose EMA was lost, and the raw
    tensor in its place would be averaged with the EMAs of the others.
    """
    sets = {names: {strip_wrappers(name): name for name in names} for names in {item.filled for item in group}}
    buffers = unfilled(group)
    for item in checkpoints:
        for short, name in sets[item.filled].items():
            if short not in buffers:
                other = next(other for other in group if short not in sets[other.filled])
                raise BankError(
                    f"`{shown(item.path)}` holds no EMA of `{shown(name)}`, but `{shown(other.path)}` does; raw "
                    "weights never stand in for an EMA. Leave that step out with `bank.start`, `bank.stop` or "
                    "`bank.every`, or save it again."
                )


def _common(items: Sequence[Checkpoint]) -> list[Table]:
    """The tables, renamed if that makes their names equal; otherwise as near to it as can be."""
    tables = [item.table for item in items]
    names = tables[0].keys()
    if all(table.keys() == names for table in tables):
        return tables
    maps = [{strip_wrappers(name): name for name in table} for table in tables]
    one_to_one = all(len(short) == len(table) for short, table in zip(maps, tables, strict=True))
    if not one_to_one or not any(name != short for found in maps for short, name in found.items()):
        return tables
    if all(found.keys() == maps[0].keys() for found in maps):
        plain = min(maps, key=lambda found: sum(map(len, found.values())))
        # the barest spelling among the files, unless the files have different wrappers and none is bare
        target = plain if all(_extends(found, plain) for found in maps) else {short: short for short in plain}
        return [
            {target[short]: table[name] for short, name in found.items()}
            for found, table in zip(maps, tables, strict=True)
        ]
    return [{short: table[name] for short, name in found.items()} for found, table in zip(maps, tables, strict=True)]


def _extends(found: Mapping[str, str], plain: Mapping[str, str]) -> bool:
    """Whether one spelling is the other with words added at the front."""
    return all(name.endswith(plain[short]) for short, name in found.items())


def _check(a: Checkpoint, table_a: Table, b: Checkpoint, table_b: Table) -> None:
    """Raise BankError with the first differences between two checkpoints."""
    rows = [(a, table_a, name) for name in sorted(table_a.keys() - table_b.keys())]
    rows += [(b, table_b, name) for name in sorted(table_b.keys() - table_a.keys())]
    texts = [_missing(*row) for row in rows[:SHOWN]]
    count = len(rows)
    for name in sorted(table_a.keys() & table_b.keys()):
        one, two = table_a[name], table_b[name]
        if one.shape == two.shape and (one.dtype in FLOATS) == (two.dtype in FLOATS):
            continue
        count += 1
        what = (one.shape, two.shape) if one.shape != two.shape else (one.dtype, two.dtype)
        texts.append(f"`{shown(name)}` is {what[0]} vs {what[1]}")
    if texts:
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        raise BankError(
            f"checkpoints `{a.path}` and `{b.path}` differ: {'; '.join(texts[:SHOWN])}{more}. "
            "A bank holds one architecture; choose its steps with `bank.start` and `bank.stop`."
        )


def _missing(item: Checkpoint, table: Table, name: str) -> str:
    """One line for a tensor that the other checkpoint lacks; says so where it is tied to another (same bytes)."""
    source = table[name]
    twin = next((other for other, same in table.items() if other != name and same == source and source.numel), None)
    tied = f" (there tied to `{shown(twin)}`; save all steps with one writer)" if twin else ""
    return f"`{shown(name)}` is only in step {item.step}{tied}"

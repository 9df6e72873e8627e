"""Packed banks, read: a description that is checked before anything rests on it, and rows mapped where they lie.

The file may come from a stranger. Its description is JSON in a safetensors header; it is parsed and bounded like the
header itself, and whatever it says is held against the file before a row is made of it. See `lcsc.bank.pack` for what
is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from lcsc.bank.extents import ITEMSIZE, Piece, Source
from lcsc.bank.find import Checkpoint, Group, choose
from lcsc.bank.layout import Layout, is_combined
from lcsc.bank.rows import Row
from lcsc.bank.safetensors_file import MAX_TENSORS, PACK_KEY, read_safetensors
from lcsc.bank.shape import Shape, several_emas
from lcsc.bank.shard_index import shown, strict_json
from lcsc.core.errors import BankError

if TYPE_CHECKING:
    from torch import Tensor

ROWS = "rows"
VERSION = 1
#: dtypes of rows
PACKED = ("float32", "bfloat16", "float16")
#: file systems on which a memory map can stall or kill the process when the server goes away
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "9p", "afs"}
#: most lists and objects of a description, and most names and numbers: what 16 MiB of it hold when it is honest
_MAX_OBJECTS, _MAX_NAMES = 400_000, 600_000
_FIELDS = {"version", "dtype", "tensors", "ties", "constants", "arch", "kind", "rate", "parents"}
_PARENT = {"step", "files", "content"}
_CONTENT = re.compile(r"[0-9a-f]{64}")
_LIMIT = 1 << 63


class _Wrong(Exception):
    """What is wrong with a description, as the middle of a sentence."""


def open_pack(path: Path) -> Shape | None:
    """What a packed bank holds, None when `path` is no packed bank.

    Raises:
        BankError: a damaged or hostile file, or a description that does not fit it.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    table, metadata = read_safetensors(path)
    if PACK_KEY not in metadata:
        return None
    said = strict_json(metadata.pop(PACK_KEY).encode(), path, objects=_MAX_OBJECTS, names=_MAX_NAMES)
    try:
        return _shape(path, table, said)
    except _Wrong as error:
        raise BankError(
            f"`{shown(path)}` is no whole packed bank: {error}. Pack it again with `lcsc bank pack`."
        ) from None


def _shape(path: Path, table: dict[str, Source], said: dict[str, Any]) -> Shape:
    if _whole(said.get("version")) and said["version"] != VERSION:
        raise _Wrong(f"it has version {shown(said['version'])}, this lcsc reads {VERSION}")
    if said.keys() - {"rates"} != _FIELDS or not _whole(said["version"]):
        raise _Wrong(f"its description names {shown(sorted(said))}")
    if list(table) != [ROWS] or len(table[ROWS].shape) != 2 or 0 in table[ROWS].shape:
        raise _Wrong(f"it holds the tensors {shown(list(table))}, not one matrix `{ROWS}`")
    rows = table[ROWS]
    if rows.dtype not in PACKED or said["dtype"] != rows.dtype or rows.pieces[0].offset % ITEMSIZE[rows.dtype]:
        raise _Wrong(f"its rows are {rows.dtype} and its description says {shown(said['dtype'])}")
    layout = _layout(said["tensors"], said["ties"], rows.dtype)
    own = _table(rows, layout, said["constants"])
    steps, rates = _origins(said, rows.shape[0])
    width = rows.shape[1] * ITEMSIZE[rows.dtype]
    return Shape(
        rows=tuple(Row(step, path, (path,), own, k * width) for k, step in enumerate(steps)),
        layout=layout,
        constants=tuple(sorted(name for name, *_ in said["constants"])),
        arch=said["arch"],
        kind=said["kind"],
        rate=None if rates else said["rate"],
        notes=(f"packed bank: {len(steps)} rows of {rows.dtype}",),
        rates=rates,
        parents=tuple(said["parents"]),
    )


def _whole(value: Any) -> bool:
    """Whether a value is a count that a file can hold (True is none)."""
    return value.__class__ is int and 0 <= value < _LIMIT


def _size(name: Any, shape: Any, itemsize: int) -> int:
    """Bytes of a tensor; raises _Wrong unless it has a name and a shape."""
    nbytes = itemsize
    if name.__class__ is not str or shape.__class__ is not list or len(shape) > 64:
        raise _Wrong(f"a tensor is described by {shown([name, shape])}, not by name and shape")
    for n in shape:
        if not _whole(n) or (nbytes := nbytes * n) >= _LIMIT:
            raise _Wrong(f"`{shown(name)}` has the shape {shown(shape)}")
    return nbytes


def _layout(tensors: Any, ties: Any, dtype: str) -> Layout:
    """The columns that a description names."""
    if tensors.__class__ is not list or ties.__class__ is not dict or len(tensors) + len(ties) > MAX_TENSORS:
        raise _Wrong(f"its tensors are {shown(tensors)} and its tied names {shown(ties)}")
    shapes: dict[str, list[int]] = {}
    for entry in tensors:
        if entry.__class__ is not list or len(entry) != 2:
            raise _Wrong(f"a tensor is described by {shown(entry)}, not by name and shape")
        _size(entry[0], entry[1], ITEMSIZE[dtype])
        shapes[entry[0]] = entry[1]
    if len(shapes) != len(tensors):
        raise _Wrong("a tensor stands in it twice")
    if odd := [name for name in (*shapes, *ties) if not is_combined(name, dtype)]:
        raise _Wrong(f"`{shown(odd[0])}` is no tensor that is combined")
    for name, twin in ties.items():
        if twin.__class__ is not str or twin not in shapes or name in shapes:
            raise _Wrong(f"`{shown(name)}` is tied to {shown(twin)}")
    return Layout.of(shapes, ties)


def _table(rows: Source, layout: Layout, constants: Any) -> dict[str, Source]:
    """Where the tensors of the first row lie; those of the others lie as many bytes behind as a row has."""
    size, first = ITEMSIZE[rows.dtype], rows.pieces[0].offset
    position, width = layout.num_parameters * size, rows.shape[1] * size
    if not 0 < position <= width:
        raise _Wrong(f"its rows have {rows.shape[1]} columns for {layout.num_parameters} numbers")
    own = {e.name: Source(rows.dtype, e.shape, (Piece(0, first + e.start * size, e.shape),)) for e in layout.entries}
    own |= {name: own[twin] for name, twin in layout.ties.items()}
    if constants.__class__ is not list or len(own) + len(constants) > MAX_TENSORS:
        raise _Wrong(f"its constants are {shown(constants)}")
    for entry in constants:
        if entry.__class__ is not list or len(entry) != 4 or entry[1].__class__ is not str or not _whole(entry[3]):
            raise _Wrong(f"a constant is described by {shown(entry)}, not by name, dtype, shape and place")
        name, dtype, shape, at = entry
        nbytes = _size(name, shape, ITEMSIZE.get(dtype, 1))
        if dtype not in ITEMSIZE or name in own or is_combined(name, dtype):
            raise _Wrong(f"`{shown(name)}` ({shown(dtype)}) is no tensor that is copied, or stands in it twice")
        if at < position or at + nbytes > width:
            raise _Wrong(f"`{shown(name)}` lies at {at}, outside of its row or in another tensor")
        own[name], position = Source(dtype, tuple(shape), (Piece(0, first + at, tuple(shape)),)), at + nbytes
    return own


def _origins(said: dict[str, Any], num_rows: int) -> tuple[list[int], tuple[str, ...]]:
    """Step of each row, and rate where there are several; raises _Wrong unless all that names the rows is sound."""
    parents, arch, rates = said["parents"], said["arch"], said.get("rates", [])
    if said["kind"] not in ("raw", "ema") or said["rate"].__class__ not in (str, type(None)):
        raise _Wrong(f"its weights are {shown([said['kind'], said['rate']])}")
    if arch is not None and (
        arch.__class__ is not dict
        or arch.keys() != {"class", "config"}
        or (arch["class"].__class__, arch["config"].__class__) != (str, dict)
    ):
        raise _Wrong(f"its network is {shown(arch)}")
    if parents.__class__ is not list or len(parents) != num_rows:
        raise _Wrong(f"it has {num_rows} rows and does not name as many checkpoints")
    for parent in parents:
        if parent.__class__ is not dict or not _is_parent(parent):
            raise _Wrong(f"a row comes from {shown(parent)}, not from a step, files and a content")
    steps = [parent["step"] for parent in parents]
    if rates.__class__ is not list or any(rate.__class__ is not str for rate in rates):
        raise _Wrong(f"its rates are {shown(rates)}")
    if rates and (said["kind"] != "ema" or len(rates) != num_rows or len(set(rates)) == 1):
        raise _Wrong(f"its {num_rows} rows ({said['kind']}) have the rates {shown(rates)}")
    runs = [rate for rate, _ in itertools.groupby(rates or [None] * num_rows)]
    named = list(zip(rates or [None] * num_rows, steps, strict=True))
    if len(runs) != len(set(runs)) or any(a[0] == b[0] and a[1] >= b[1] for a, b in itertools.pairwise(named)):
        raise _Wrong("its steps do not increase from row to row of one run")
    return steps, tuple(rates)


def _is_parent(parent: dict[str, Any]) -> bool:
    files, content, rounded = parent.get("files"), parent.get("content"), parent.get("rounded", PACKED[0])
    return (
        parent.keys() - {"rounded"} == _PARENT
        and _whole(parent["step"])
        and files.__class__ is dict
        and all(map(_whole, files.values()))
        and content.__class__ is str
        and _CONTENT.fullmatch(content) is not None
        and rounded.__class__ is str
        and set(rounded.split(", ")) <= set(PACKED)
    )


# ------------------------------------------------------------------------------------------------------- selection


def pack_groups(shape: Shape) -> list[Group]:
    """The rows of a packed bank as groups of checkpoints, one for each EMA rate."""
    found: dict[str | None, list[Checkpoint]] = {}
    for row, rate in zip(shape.rows, shape.row_rates, strict=True):
        item = Checkpoint(row.step, row.path, row.files, row.table, "safetensors", shape.kind, rate, arch=shape.arch)
        found.setdefault(rate, []).append(item)
    return [Group(None, shape.kind, rate, "packed bank", tuple(rows), shape.notes) for rate, rows in found.items()]


def rows_by_rate(shape: Shape, weights: str | None) -> list[list[Row]]:
    """The rows that `weights` chooses, a list for each EMA rate; several rates are taken for `ema:*` alone.

    Raises:
        BankError: the bank holds no such weights, or several EMA rates and `weights` does not say which.
    """
    if weights is None and not shape.rates:
        return [list(shape.rows)]
    groups = pack_groups(shape)
    chosen = several_emas(groups) if weights == "ema:*" else (choose(groups, None, weights),)
    return [
        [row for row, rate in zip(shape.rows, shape.row_rates, strict=True) if rate == group.rate] for group in chosen
    ]


def take_rows(shape: Shape, rows: Sequence[Row]) -> Shape:
    """A packed bank with some of its rows alone."""
    place = {row.base: k for k, row in enumerate(shape.rows)}
    index = [place[row.base] for row in rows]
    all_rates = shape.row_rates
    rates = [all_rates[k] for k in index]
    several = len(set(rates)) > 1
    return dataclasses.replace(
        shape,
        rows=tuple(rows),
        rate=None if several else rates[0],
        rates=tuple(map(str, rates)) if several else (),
        parents=None if shape.parents is None else tuple(shape.parents[k] for k in index),
    )


# ------------------------------------------------------------------------------------------------------------- map


def on_network(path: Path) -> bool:
    """Whether a path lies on a network file system, as far as the mount table says."""
    full, best = str(path.resolve()), ("", "")
    # of two mounts at one place the later covers the earlier, as nfs covers autofs
    for part in psutil.disk_partitions(all=True):
        inside = full == part.mountpoint or full.startswith(part.mountpoint.rstrip("/") + "/")
        if inside and len(part.mountpoint) >= len(best[0]):
            best = (part.mountpoint, part.fstype)
    return best[1] in NETWORK or best[1].startswith("fuse.")


def map_pack(path: Path, rows: Sequence[Row], layout: Layout, dtype: str) -> Tensor | None:
    """W_KP of a packed bank as a memory map, None where the rows must be read (no pack, another dtype, network)."""
    if not path.is_file() or {row.files for row in rows} != {(path,)}:
        return None
    table, (entry, *_) = rows[0].table, layout.entries
    steps = np.diff([row.base for row in rows])
    if table[entry.name].dtype != dtype or len(set(steps.tolist())) > 1 or (steps < 0).any() or on_network(path):
        return None
    import torch

    size, first = ITEMSIZE[dtype], table[entry.name].pieces[0].offset + rows[0].base
    step = int(steps[0]) if len(steps) else layout.num_parameters * size
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        # a private map: torch wants writable memory, the file stays as it is
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), offset=first)
        return torch.as_strided(flat, (len(rows), layout.num_parameters), (step // size, 1))
    return None

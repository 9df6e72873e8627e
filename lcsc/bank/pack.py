"""A bank in one file: rows that can be used where they lie, opened in milliseconds.

The file is a safetensors file with one tensor `rows` and a description in the metadata. A row holds a checkpoint's
combined tensors, then the bits of its other tensors, and is padded to whole pages; the data begins on a page boundary
too, so that the rows can be mapped into memory and shared by all processes of a machine.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from lcsc.bank.extents import ITEMSIZE, Piece, Source, read_source
from lcsc.bank.layout import Layout
from lcsc.bank.rows import Row, cut
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shape import Shape
from lcsc.core.digests import canonical_json
from lcsc.core.errors import BankError, ConfigError, NonFiniteError, OutputExistsError
from lcsc.core.files import fsync_dir

if TYPE_CHECKING:
    from torch import Tensor

    from lcsc.bank.bank import CheckpointBank
    from lcsc.bank.stream import Progress

KEY = "lcsc_bank"
ROWS = "rows"
PAGE = 4096
VERSION = 1
#: largest number of float16
HALF_MAX = 65504
#: file systems on which a memory map can stall or kill the process when the server goes away
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "9p", "afs"}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def on_network(path: Path) -> bool:
    """Whether a path lies on a network file system, as far as the mount table says."""
    full, best = str(path.resolve()), ("", "")
    for part in psutil.disk_partitions(all=True):
        inside = full == part.mountpoint or full.startswith(part.mountpoint.rstrip("/") + "/")
        if inside and len(part.mountpoint) > len(best[0]):
            best = (part.mountpoint, part.fstype)
    return best[1] in NETWORK or best[1].startswith("fuse.")


def write_pack(bank: CheckpointBank, to: Path, dtype: str | None = None, progress: Progress | None = None) -> str:
    """Write a bank's rows into the new file `to`; it appears under its name only when it is whole.

    Args:
        bank: any bank; its finite check applies.
        to: file that does not exist yet, ending in `.safetensors`.
        dtype: float32, bfloat16 or float16; None keeps a dtype that all files share and uses float32 otherwise.
        progress: called with rows' columns done and all of them.

    Returns:
        The dtype of the rows.

    Raises:
        OutputExistsError: `to` exists.
        ConfigError: no such dtype, or another suffix.
        BankError: LoRA factors.
    """
    if bank.kind == "lora":
        raise BankError(
            f"`{bank.path}` holds LoRA factors, whose settings lie beside them. They are small; use them there."
        )
    found = set(bank.dtypes.values())
    dtype = dtype or (found.pop() if len(found) == 1 and found <= set(_CODES) else "float32")
    if dtype not in _CODES:
        raise ConfigError(f"`dtype` is `{dtype}`; it must be one of {', '.join(_CODES)}.")
    if to.suffix != ".safetensors":
        raise ConfigError(f"`to` is `{to}`; a packed bank is a file whose name ends in `.safetensors`.")
    if to.exists() or to.is_symlink():
        raise OutputExistsError(f"output `{to}` exists already. Nothing is overwritten; choose another path.")
    to.parent.mkdir(parents=True, exist_ok=True)
    temp = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temp, "xb") as file:
            _write(bank, file.fileno(), dtype, progress)
            os.fsync(file.fileno())
        if to.exists():
            raise OutputExistsError(f"output `{to}` appeared while it was being written; nothing is overwritten.")
        os.replace(temp, to)
    finally:
        temp.unlink(missing_ok=True)
    fsync_dir(to.parent)
    return dtype


def _places(bank: CheckpointBank, size: int) -> tuple[list[list[Any]], int]:
    """`[name, dtype, shape, first byte in the row]` of every constant, and the bytes of a whole row."""
    at, places = bank.layout.num_parameters * size, []
    for name, (_, source) in bank.constant_sources().items():
        at += -at % 8
        places.append([name, source.dtype, list(source.shape), at])
        at += source.nbytes
    return places, at + -at % PAGE


def _write(bank: CheckpointBank, fd: int, dtype: str, progress: Progress | None) -> None:
    from lcsc.bank.storage import each_row, from_float32, tables_of

    K, P, size = bank.num_checkpoints, bank.layout.num_parameters, ITEMSIZE[dtype]
    places, width = _places(bank, size)
    # the digests of the contents are known only after the pass, and have a fixed length
    start = len(_header(bank, dtype, places, width, ["0" * 64] * K))
    os.posix_fallocate(fd, 0, start + K * width)
    for block, k, row_C in each_row(bank.rows, cut(bank.layout, tables_of(bank.rows)), bank.checksums):
        data = from_float32(row_C, dtype)
        if dtype == "float16" and np.abs(row_C).max(initial=0) > HALF_MAX:
            raise NonFiniteError(
                f"step {bank.rows[k].step} holds numbers beyond {HALF_MAX}, the largest of float16, near "
                f"`{block.spans[0].name}`. Use dtype=bfloat16 or dtype=float32."
            )
        os.pwrite(fd, data.data.cast("B"), start + k * width + block.start * size)
        if progress and k == K - 1:
            progress(block.stop, P)
    for k, row in enumerate(bank.rows):
        for name, _, _, at in places:
            os.pwrite(fd, read_source(row.files, row.table[name], row.base).tobytes(), start + k * width + at)
    os.pwrite(fd, _header(bank, dtype, places, width, [parent["content"] for parent in bank.parents]), 0)


def _holds(wide: str, narrow: str) -> bool:
    """Whether every number of one dtype is a number of another."""
    return narrow == wide or (wide == "float32" and narrow in ("bfloat16", "float16"))


def _header(bank: CheckpointBank, dtype: str, places: list[list[Any]], width: int, contents: Sequence[str]) -> bytes:
    root = bank.path if bank.path.is_dir() else bank.path.parent
    exact = all(_holds(dtype, row.table[e.name].dtype) for row in bank.rows for e in bank.layout.entries)
    rounded = {} if exact else {"rounded": dtype}
    described = {
        "version": VERSION,
        "dtype": dtype,
        "tensors": [[entry.name, list(entry.shape)] for entry in bank.layout.entries],
        "ties": dict(bank.layout.ties),
        "constants": places,
        "arch": bank.arch,
        "kind": bank.kind,
        "rate": bank.rate,
        "parents": [
            {
                "step": row.step,
                "files": {str(f.relative_to(root)): f.stat().st_size for f in row.files},
                "content": c,
                **rounded,
            }
            for row, c in zip(bank.rows, contents, strict=True)
        ],
    }
    K = bank.num_checkpoints
    rows = {"dtype": _CODES[dtype], "shape": [K, width // ITEMSIZE[dtype]], "data_offsets": [0, K * width]}
    text = json.dumps({"__metadata__": {KEY: canonical_json(described)}, ROWS: rows}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def open_pack(path: Path) -> Shape | None:
    """What a packed bank holds, None when `path` is no packed bank.

    Raises:
        BankError: the description does not fit the file.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    table, metadata = read_safetensors(path)
    if KEY not in metadata:
        return None
    try:
        return _shape(path, table, json.loads(metadata[KEY]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BankError(f"`{path}` is no whole packed bank: {error!r}. Pack it again with `lcsc bank pack`.") from error


def _shape(path: Path, table: dict[str, Source], said: dict[str, Any]) -> Shape:
    if said["version"] != VERSION:
        raise ValueError(f"version {said['version']}, this lcsc reads {VERSION}")
    rows, layout = table[ROWS], Layout.of(dict(said["tensors"]), said["ties"])
    (K, stride), size = rows.shape, ITEMSIZE[rows.dtype]
    if stride < layout.num_parameters or len(said["parents"]) != K:
        raise ValueError(f"{K} rows of {stride} columns for {len(said['parents'])} x {layout.num_parameters}")
    first = rows.pieces[0].offset
    own = {e.name: Source(rows.dtype, e.shape, (Piece(0, first + e.start * size, e.shape),)) for e in layout.entries}
    own |= {name: own[twin] for name, twin in layout.ties.items()}
    for name, dtype, shape, at in said["constants"]:
        own[name] = Source(dtype, tuple(shape), (Piece(0, first + at, tuple(shape)),))
        if at + own[name].nbytes > stride * size:
            raise ValueError(f"`{name}` lies outside its row")
    steps = [int(parent["step"]) for parent in said["parents"]]
    return Shape(
        rows=tuple(Row(step, path, (path,), own, k * stride * size) for k, step in enumerate(steps)),
        layout=layout,
        constants=tuple(sorted(name for name, *_ in said["constants"])),
        arch=said["arch"],
        kind=str(said["kind"]),
        rate=said["rate"],
        notes=(f"packed bank: {K} rows of {rows.dtype}",),
        parents=tuple(said["parents"]),
    )


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

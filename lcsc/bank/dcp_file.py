"""Folders of `torch.distributed.checkpoint`: `.metadata` and the `*.distcp` files that hold the parts of tensors.

`.metadata` is a pickle, read as a description by `inert_pickle`; torch is not used. It says which rectangle of which
tensor lies at which bytes of which file. There, each rectangle is a whole torch archive (or, if the writer was told so,
the file is in the safetensors format).
Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/metadata.py
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.extents import ITEMSIZE, Source
from lcsc.bank.inert_pickle import Global, Record, Refused, counts, read_pickle
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shard_index import open_regular, plain_file, read_range, regular_file, shown
from lcsc.bank.torch_file import MAX_PICKLE, read_archive
from lcsc.bank.zip_check import Entry
from lcsc.core.errors import BankError

_META = "torch.distributed.checkpoint.metadata."
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_DTYPES = {f"torch.{name}": name for name in ITEMSIZE}
_ALLOWED = frozenset(
    {
        _META + name
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {_INFO, "torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"}
    | {f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
    | _DTYPES.keys()
)
#: pickle instructions that are carried out, beside one for every so many bytes of the data files
_BUDGET, _BYTES_PER_STEP = 1_000_000, 10
_MAX_CHUNKS = 2_048
#: instructions that describe a part (25 and 2 for each axis, fewer where parts have equal sizes); a part that is met
#: more often than the instructions allow stands in a list that many tensors share
_STEPS_PER_PART = 16
#: comparisons of parts that lie in no grid, over all tensors
_MAX_PAIRS = 50_000_000


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of one data file."""

    file: str
    offset: int
    length: int


def read_dcp(
    folder: Path, *, crc: bool = True, stored: list[tuple[int, Entry]] | None = None
) -> tuple[dict[str, Source], tuple[Path, ...], dict[str, Any]]:
    """Describe a folder of `torch.distributed.checkpoint`, whole tensors and FSDP or DTensor shards alike.

    Args:
        folder: holds `.metadata` and the data files.
        crc: compare the checksums of all tensors' bytes, which reads the files once.
        stored: as for `read_torch`.

    Returns:
        Tensors by name (levels joined by dots, as the writer did), the data files that their pieces count in, and the
        values that are not tensors (steps, settings); values that only code could read are left out.

    Raises:
        BankError: missing or damaged files, parts that overlap or leave holes, parts that differ from what `.metadata`
            says of them, or a pickle that names anything but the classes of `.metadata`.
    """
    path = plain_file(folder, ".metadata")
    try:
        tensors, others, places = _metadata(folder, path)
    except Refused as error:
        raise BankError(
            f"`{shown(path)}` {error}. Nothing was run. Copy the checkpoint again, or save it anew with "
            "`torch.distributed.checkpoint.save`."
        ) from None
    names = sorted({place.file for place in places.values()})
    files = tuple(plain_file(folder, name) for name in names)
    with contextlib.ExitStack() as stack:
        reader = _Reader({name: (k, file) for k, (name, file) in enumerate(zip(names, files, strict=True))}, crc, stack)
        reader.stored = stored
        table = {name: _source(folder, name, *tensor, places, reader) for name, tensor in tensors.items()}
        values = {}
        for name in others:
            place = places.get((name, None))
            if place is not None:
                with contextlib.suppress(Refused):  # an object of the user's own class; the weights do not need it
                    values[name] = reader.archive(place)
    return table, files, values


_Chunks = list[tuple[tuple[int, ...], tuple[int, ...]]]


def _metadata(
    folder: Path, path: Path
) -> tuple[dict[str, tuple[str, tuple[int, ...], _Chunks]], list[str], dict[tuple[str, Any], _Place]]:
    """Tensors (dtype, shape, offsets and sizes of the parts), names of other values, and the place of each part."""
    with open_regular(path) as (fd, size):
        if size > MAX_PICKLE:
            raise BankError(f"`{shown(path)}` has {size} bytes; at most {MAX_PICKLE} are read.")
        data = read_range(fd, 0, size, path)
    stored = sum(regular_file(plain_file(folder, file.name)) for file in folder.glob("*.distcp"))
    value, steps = read_pickle(data, _ALLOWED, _BUDGET + stored // _BYTES_PER_STEP)
    parts = _Parts(steps)
    fields = _fields(value, _META + "Metadata")
    tensors, others = {}, []
    for name, entry in _dict(fields, "state_dict_metadata").items():
        if name.__class__ is not str or entry.__class__ is not Record:
            raise Refused("describes a tensor without a name")
        if entry.name == _META + "BytesStorageMetadata":
            others.append(name)
        else:
            tensors[name] = _tensor(name, entry, parts)
    places = {}
    for index, info in _dict(fields, "storage_data").items():
        key = _fields(index, _META + "MetadataIndex")
        name, offset = key.get("fqn"), key.get("offset")
        if name.__class__ is not str:
            raise Refused("holds a place of a tensor without a name")
        places[name, None if offset is None else counts(offset)] = _place(info)
    return tensors, others, places


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of the named class."""
    if value.__class__ is not Record or value.name != name or value.args or value.state.__class__ is not dict:
        raise Refused(f"does not hold a `{name.rsplit('.', 1)[-1]}` where one belongs")
    return value.state


def _dict(fields: Mapping[str, Any], name: str) -> dict[Any, Any]:
    if fields.get(name).__class__ is not dict:
        raise Refused(f"has no table `{name}`; it was written by an older torch or for another storage")
    return fields[name]


def _place(info: Any) -> _Place:
    fields = _fields(info, _INFO)
    if fields.get("transform_descriptors"):
        raise Refused("describes compressed data, which is not read")
    file, offset, length = (fields.get(name) for name in ("relative_path", "offset", "length"))
    if file.__class__ is not str or offset.__class__ is not int or length.__class__ is not int:
        raise Refused("holds a place that is not a file name and two numbers")
    if offset < 0 or length < 0:
        raise Refused("holds a place before the beginning of a file")
    return _Place(file, offset, length)


def _tensor(name: str, entry: Record, parts: _Parts) -> tuple[str, tuple[int, ...], _Chunks]:
    fields = _fields(entry, _META + "TensorStorageMetadata")
    properties = fields.get("properties")
    state = properties.state if properties.__class__ is Record else None
    kind = state[0] if state.__class__ is tuple and state else None
    dtype = _DTYPES.get(kind.name) if kind.__class__ is Global else None
    if dtype is None:
        raise Refused(f"describes `{shown(name)}` with a dtype that is not known")
    chunks = fields.get("chunks")
    if chunks.__class__ is not list or not 0 < len(chunks) <= _MAX_CHUNKS:
        raise Refused(f"describes `{shown(name)}` without parts, or with more than {_MAX_CHUNKS}")
    return dtype, *parts.read(name, counts(fields.get("size")), chunks)


class _Parts:
    """Reads and checks the parts of tensors, in time that the pickle has paid for.

    Args:
        steps: instructions that the pickle took.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.pairs = steps, _MAX_PAIRS

    def read(self, name: str, shape: tuple[int, ...], chunks: list[Any]) -> tuple[tuple[int, ...], _Chunks]:
        """Shape, and offsets and sizes of the parts; Refused unless they cover the tensor exactly.

        Elements that are not written would be memory of this process.
        """
        self.steps -= len(chunks) * (_STEPS_PER_PART + len(shape))
        if self.steps < 0:
            raise Refused("describes more parts of tensors than it holds; several tensors share them")
        parts = [_fields(chunk, _META + "ChunkStorageMetadata") for chunk in chunks]
        boxes = [(counts(part.get("offsets")), counts(part.get("sizes"))) for part in parts]
        if any(len(offset) != len(shape) or len(size) != len(shape) for offset, size in boxes):
            raise Refused(f"describes parts of `{shown(name)}` with another number of axes")
        inside = all(o + n <= m for offset, size in boxes for o, n, m in zip(offset, size, shape, strict=True))
        filled = [(offset, size) for offset, size in boxes if 0 not in size]
        if not inside or sum(math.prod(size) for _, size in filled) != math.prod(shape):
            raise Refused(f"describes parts that do not cover `{shown(name)}` of shape {shown(shape)}")
        if len(filled) > 1:
            start = np.array([offset for offset, _ in filled])
            stop = start + np.array([size for _, size in filled])
            if not _in_grid(start, stop) and self._overlap(start, stop):
                raise Refused(f"describes parts of `{shown(name)}` that overlap")
        return shape, boxes

    def _overlap(self, start: np.ndarray, stop: np.ndarray) -> bool:
        """Whether any two parts overlap, by comparing all pairs; `start` and `stop` have shape (parts, axes)."""
        count, axes = start.shape
        self.pairs -= count * count * axes
        if self.pairs < 0:
            raise Refused("describes tensors in more odd pieces than any training run makes")
        meet = np.ones((count, count), bool)
        for axis in range(axes):
            meet &= start[:, None, axis] < stop[None, :, axis]
        return np.count_nonzero(meet & meet.T) != count  # each meets itself only


def _in_grid(start: np.ndarray, stop: np.ndarray) -> bool:
    """Whether cuts through the whole tensor, axis after axis, lie between all parts, so that none overlap.

    So do FSDP, tensor parallelism and both together cut. Sorting finds it where comparing pairs would be quadratic.
    """
    label = np.zeros(len(start), int)  # parts with different labels do not overlap
    for a, b in zip(start.T, stop.T, strict=True):
        order = np.lexsort((b, a, label))
        same = label[order][1:] == label[order][:-1]
        low, high = a[order], b[order]
        other = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
        if np.any(same & other & (low[1:] < high[:-1])):
            continue
        label[order] = np.cumsum(np.concatenate(([False], ~same | other)))
    return bool(label.max() == len(label) - 1)


class _Reader:
    """The data files, each opened once."""

    def __init__(self, files: Mapping[str, tuple[int, Path]], crc: bool, stack: contextlib.ExitStack) -> None:
        self.files = files
        self.crc = crc
        self.stored: list[tuple[int, Entry]] | None = None
        self.stack = stack
        self.opened: dict[str, tuple[int, int]] = {}
        self.safetensors: dict[str, dict[str, Source] | None] = {}

    def archive(self, place: _Place) -> Any:
        """The value of the torch archive at a place."""
        part, path = self.files[place.file]
        fd, size = self._open(place.file)
        if place.offset + place.length > size:
            raise BankError(
                f"`{shown(path)}` has {size} bytes, but `.metadata` places a tensor at bytes {place.offset} to "
                f"{place.offset + place.length}. It is truncated; copy it again."
            )
        return read_archive(fd, place.offset, place.length, path, part=part, crc=self.crc, stored=self.stored)

    def table(self, place: _Place) -> dict[str, Source] | None:
        """The tensors of a file in the safetensors format, None for the usual one of archives behind each other."""
        if place.file not in self.safetensors:
            part, path = self.files[place.file]
            fd, size = self._open(place.file)
            plain = size >= 9 and read_range(fd, 8, 1, path) == b"{"
            self.safetensors[place.file] = read_safetensors(path, part)[0] if plain else None
        return self.safetensors[place.file]

    def _open(self, file: str) -> tuple[int, int]:
        if file not in self.opened:
            self.opened[file] = self.stack.enter_context(open_regular(self.files[file][1]))
        return self.opened[file]


def _source(
    folder: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    boxes: _Chunks,
    places: Mapping[tuple[str, Any], _Place],
    reader: _Reader,
) -> Source:
    pieces = []
    for offset, size in boxes:
        place = places.get((name, offset)) or (places.get((name, None)) if len(boxes) == 1 else None)
        if place is None:
            raise BankError(f"`{shown(folder)}`: `.metadata` does not say where `{shown(name)}` lies. Copy it again.")
        part = _part(name, place, reader)
        if part.dtype != dtype or part.shape != size:
            held, said = f"{part.dtype} {shown(part.shape)}", f"{dtype} {shown(size)}"
            raise BankError(
                f"`{shown(folder / place.file)}` holds {held} for `{shown(name)}`, but `.metadata` says {said}. The "
                "files belong to different checkpoints; copy the folder again."
            )
        whole = len(boxes) == 1 and size == shape
        pieces.append(part.pieces[0] if whole else replace(part.pieces[0], at=offset))
    return Source(dtype, shape, tuple(pieces))


def _part(name: str, place: _Place, reader: _Reader) -> Source:
    path = reader.files[place.file][1]
    table = reader.table(place)
    try:
        found = reader.archive(place) if table is None else table.get(name)
    except Refused as error:
        raise BankError(f"`{shown(path)}`, `{shown(name)}`: {error}. Nothing was run.") from None
    if not isinstance(found, Source):
        raise BankError(f"`{shown(path)}` does not hold the tensor `{shown(name)}`. Copy the folder again.")
    return found

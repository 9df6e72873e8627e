"""Safetensors files that are written in pieces, in any order, without ever holding a model in memory.

All offsets follow from names, shapes and dtypes, so the files get their final size before the first number is
computed (a full disk is noticed then), blocks are written where they belong as they come, and the header is written
last, into room that was left for it. Imports no torch: startup time is part of a merge's time.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcsc.bank.extents import ITEMSIZE
from lcsc.bank.layout import Entry, Layout
from lcsc.bank.rows import to_float32
from lcsc.bank.safetensors_file import DTYPES, MAX_HEADER
from lcsc.core.errors import ConfigError, NonFiniteError
from lcsc.core.files import preallocate, writing

#: dtype name -> its tag in a safetensors header
TAGS = {name: tag for tag, name in DTYPES.items()}
#: bytes after which the system is asked to begin writing to disk, so that the final fsync finds little left to do
FLUSH_BYTES = 16 * 2**20
#: elements that are rounded at a time; scratch stays in the processor's cache
ROUND_ELEMENTS = 2**16


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to write: name, dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are: file name, first byte from the start of the file, dtype name."""

    file: str
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Run:
    """Flat positions [start, stop) that lie in C order, of one dtype, at `offset` of `file`."""

    start: int
    stop: int
    file: str
    offset: int
    dtype: str


class FlatMap:
    """From flat positions of a layout to bytes of files. Tied tensors that are stored twice map to both places."""

    def __init__(self, layout: Layout, places: Mapping[str, Place], ties: Mapping[str, str]) -> None:
        entries = {entry.name: entry for entry in layout.entries}
        self._entries = layout.entries
        own = [(entry, places[entry.name]) for entry in layout.entries]
        twins = [(entries[kept], places[name]) for name, kept in ties.items() if name in places]
        self._tracks = [_join(own), *([_one(entry, place)] for entry, place in twins)]
        self._starts = [[run.start for run in track] for track in self._tracks]

    def pieces(self, start: int, stop: int) -> Iterator[Run]:
        """The runs that hold positions [start, stop), cut to them."""
        for track, starts in zip(self._tracks, self._starts, strict=True):
            for run in track[max(0, bisect.bisect_right(starts, start) - 1) :]:
                if run.start >= stop:
                    break
                a, b = max(run.start, start), min(run.stop, stop)
                if a < b:
                    yield Run(a, b, run.file, run.offset + (a - run.start) * ITEMSIZE[run.dtype], run.dtype)

    def name_at(self, position: int) -> str:
        """Name of the tensor that holds a flat position."""
        return self._entries[bisect.bisect_right(self._entries, position, key=lambda entry: entry.start) - 1].name


def _one(entry: Entry, place: Place) -> Run:
    return Run(entry.start, entry.stop, place.file, place.offset, place.dtype)


def _join(rows: Sequence[tuple[Entry, Place]]) -> list[Run]:
    """Neighbours in both the layout and the file become one run, so that a block is one write."""
    runs: list[Run] = []
    for entry, place in rows:
        run = _one(entry, place)
        if run.start == run.stop:
            continue
        last = runs[-1] if runs else None
        if (
            last
            and (last.file, last.dtype, last.stop) == (run.file, run.dtype, run.start)
            and last.offset + (last.stop - last.start) * ITEMSIZE[last.dtype] == run.offset
        ):
            runs[-1] = Run(last.start, run.stop, last.file, last.offset, last.dtype)
        else:
            runs.append(run)
    return runs


def parse_size(text: str) -> int:
    """Bytes in a size such as `500MB`, `5GB` (decimal units, as the Hugging Face libraries count) or `1000000`.

    Raises:
        ConfigError: no size, or zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(TB|GB|MB|KB|)", text.strip(), re.IGNORECASE)
    power = {"": 0, "KB": 3, "MB": 6, "GB": 9, "TB": 12}
    size = int(float(found[1]) * 10 ** power[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(f"`max_shard_size` is `{text}`; write a size such as 500MB or 5GB.")
    return size


def plan_files(specs: Sequence[Spec], stem: str, max_shard_bytes: int) -> dict[str, list[Spec]]:
    """File name -> its tensors in file order; several files when they are larger than `max_shard_bytes`.

    Wide dtypes come first, so that every tensor is aligned to its own item size, then names. A tensor above the limit
    gets a file of its own. Names and split are those of the Hugging Face libraries.
    """
    shards: list[list[Spec]] = []
    shard: list[Spec] = []
    size = 0
    for spec in sorted(specs, key=lambda spec: (-ITEMSIZE[spec.dtype], spec.name)):
        if spec.nbytes > max_shard_bytes:
            shards.append([spec])
            continue
        if size + spec.nbytes > max_shard_bytes:
            shards.append(shard)
            shard, size = [], 0
        shard.append(spec)
        size += spec.nbytes
    if shard or not shards:
        shards.append(shard)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}


def index_bytes(files: Mapping[str, Sequence[Spec]]) -> bytes:
    """The index that says which tensor is in which file."""
    total = sum(spec.nbytes for specs in files.values() for spec in specs)
    weight_map = {spec.name: file for file, specs in files.items() for spec in specs}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def header_bytes(specs: Sequence[Spec], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The length field and JSON header of a safetensors file, filled with spaces to a multiple of 8 and to `room`.

    Raises:
        ConfigError: longer than our own reader accepts, or a dtype that the format lacks.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for spec in specs:
        if spec.dtype not in TAGS:
            raise ConfigError(f"`{spec.name}` is {spec.dtype}, which safetensors files cannot hold.")
        table[spec.name] = {
            "dtype": TAGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(math.ceil(len(text) / 8) * 8, room - 8)
    if length > MAX_HEADER:
        raise ConfigError(
            f"the file's header would take {length} bytes, more than the {MAX_HEADER} that are read. "
            "Use fewer checkpoints with `every` or `last`."
        )
    return length.to_bytes(8, "little") + text.ljust(length)


def round_to(values_C: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 numbers as the bits of another float dtype (bfloat16 as uint16), rounded to nearest, ties to even.

    What is too large for the dtype becomes Inf, see `overflows`.
    """
    if dtype == "float32":
        return values_C
    if dtype == "bfloat16":
        bits_C = values_C.view(np.uint32)
        out_C = np.empty(values_C.shape, np.uint16)
        for a in range(0, len(bits_C), ROUND_ELEMENTS):
            part = bits_C[a : a + ROUND_ELEMENTS]
            up = part >> np.uint32(16)
            up &= np.uint32(1)  # the last bit that stays decides ties
            up += np.uint32(0x7FFF)
            up += part
            up >>= np.uint32(16)
            out_C[a : a + ROUND_ELEMENTS] = up
        return out_C
    with np.errstate(over="ignore"):
        return values_C.astype(dtype)


def overflows(bits_C: np.ndarray, dtype: str) -> int | None:
    """Index of the first Inf among rounded numbers, None when there is none."""
    if dtype == "bfloat16":
        bad_C = (bits_C & np.uint16(0x7F80)) == 0x7F80
    elif dtype == "float16":
        bad_C = np.isinf(bits_C)
    else:
        return None
    return int(bad_C.argmax()) if bad_C.any() else None


def places_of(files: Mapping[str, Sequence[Spec]], data_starts: Mapping[str, int]) -> dict[str, Place]:
    """Where each tensor of planned files lies, given the first data byte of each file."""
    places = {}
    for file, specs in files.items():
        at = data_starts[file]
        for spec in specs:
            places[spec.name] = Place(file, at, spec.dtype)
            at += spec.nbytes
    return places


class ModelWriter:
    """The weight files of one model, open for writing in any order.

    Args:
        folder: an existing, empty folder.
        files: file name -> tensors, from `plan_files`.
        layout: where the combined tensors lie in a flat row.
        ties: tied name -> the name whose numbers it shares; written twice if both are in `files`.
        metadata: the header's metadata, or something that is at least as long: what is known only at the end (digests)
            goes into the room this leaves.

    Raises:
        ConfigError: the files cannot be made, as on a full disk.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Sequence[Spec]],
        layout: Layout,
        ties: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        self._folder, self._files = folder, files
        self._rooms = {file: len(header_bytes(specs, metadata)) for file, specs in files.items()}
        self._places = places_of(files, self._rooms)
        self._map = FlatMap(layout, self._places, ties)
        self._dirty: dict[str, tuple[int, int]] = {}
        self._fds: dict[str, int] = {}
        for file, specs in files.items():
            size = self._rooms[file] + sum(spec.nbytes for spec in specs)
            with writing(folder / file):
                self._fds[file] = os.open(folder / file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                preallocate(self._fds[file], size)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self._rooms[file] + sum(spec.nbytes for spec in specs) for file, specs in self._files.items())

    def put(self, start: int, values_C: np.ndarray) -> float:
        """Write finite float32 numbers at flat positions [start, start + C), rounded to each tensor's dtype.

        Returns:
            Sum of the squared rounding errors.

        Raises:
            NonFiniteError: a number is too large for the dtype it is stored in; the tensor is named.
            ConfigError: the disk is full.
        """
        error = 0.0
        for run in self._map.pieces(start, start + len(values_C)):
            exact_C = values_C[run.start - start : run.stop - start]
            bits_C = round_to(exact_C, run.dtype)
            bad = overflows(bits_C, run.dtype)
            if bad is not None:
                raise NonFiniteError(
                    f"`{self._map.name_at(run.start + bad)}` reaches {exact_C[bad]:.6g}, too large for {run.dtype}. "
                    "Write it with dtype=float32."
                )
            if ITEMSIZE[run.dtype] < 4:
                off_C = to_float32(bits_C, run.dtype) - exact_C
                error += float(np.vdot(off_C, off_C))
            self._write(run.file, run.offset, bits_C)
        return error

    def put_raw(self, name: str, bits: np.ndarray) -> None:
        """Write a whole tensor's raw bits."""
        place = self._places[name]
        self._write(place.file, place.offset, np.ascontiguousarray(bits).reshape(-1))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the headers and the index; the files are complete afterwards."""
        for file, specs in self._files.items():
            head = header_bytes(specs, metadata, self._rooms[file])
            assert len(head) == self._rooms[file], "the final metadata is longer than what was announced"
            self._write(file, 0, np.frombuffer(head, np.uint8))
        if len(self._files) > 1:
            stem = next(iter(self._files)).rsplit("-", 3)[0]
            with writing(self._folder):
                (self._folder / f"{stem}.safetensors.index.json").write_bytes(index_bytes(self._files))
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _write(self, file: str, offset: int, values: np.ndarray) -> None:
        view, done = values.reshape(-1).view(np.uint8).data, 0
        with writing(self._folder / file):
            while done < len(view):
                done += os.pwrite(self._fds[file], view[done:], offset + done)
        self._flush(file, offset, offset + len(view))

    def _flush(self, file: str, start: int, stop: int) -> None:
        """Let the system write what is complete while we compute on."""
        a, b = self._dirty.get(file, (start, start))
        a, b = (a, stop) if start == b else (start, stop)
        if b - a >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fds[file], a, b - a, os.POSIX_FADV_DONTNEED)  # begins the write-back of dirty pages
            a = b
        self._dirty[file] = (a, b)

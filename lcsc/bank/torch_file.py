"""Files that `torch.save` wrote: where their tensors lie, without running, importing or reading any of it.

The archive is checked by `zip_check`, its pickle is read as a description by `inert_pickle`, and the descriptions of
tensors become places in the file. Everything that `torch.load(weights_only=True)` reads as tensors is read, and in
addition the inert values that trainers put beside them (`argparse.Namespace`, numpy scalars, paths). torch itself is
not used: its loader under `FakeTensorMode` takes half a second for 700 tensors, and lets a pickle allocate memory.
Source of the tensor functions: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_utils.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.extents import ITEMSIZE, Piece, Source
from lcsc.bank.inert_pickle import Global, Record, Refused, counts, read_pickle
from lcsc.bank.shard_index import open_regular, read_range, shown
from lcsc.bank.zip_check import Entry, check_crc, read_zip
from lcsc.core.errors import BankError

#: Largest `data.pkl` that is read, in bytes; 100,000 tensors take 15 MB.
MAX_PICKLE = 32 << 20
#: pickle instructions that are carried out, beside those for each tensor (torch writes 32 to 40)
_BUDGET, _BUDGET_PER_ENTRY = 1_000_000, 50
_DEPTH = 100

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_BYTES = "torch.storage.UntypedStorage"
_STORAGE_NAMES = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()} | {_BYTES: "uint8"}
_DTYPES = {f"torch.{name}": name for name in ITEMSIZE}
_TENSORS = {f"torch._utils._rebuild_tensor{suffix}" for suffix in ("", "_v2", "_v3")}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_PLAIN_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_NAMESPACE = "argparse.Namespace"
_PATHS = {f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")}
_ENCODE = "_codecs.encode"
_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_SCALAR = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
#: names that a pickle may mention; everything else ends the reading
ALLOWED = frozenset(
    {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "torch.Size", "torch.device"}
    | {f"builtins.{name}" for name in ("set", "dict", "list", "int", "float", "str", "bool", "tuple")}
    | {_SUBCLASS, _NAMESPACE, _ENCODE, "numpy.dtype"}
    | _STORAGE_NAMES.keys()
    | _DTYPES.keys()
    | _TENSORS
    | _PARAMETERS
    | _PLAIN_TYPES
    | _PATHS
    | _SCALAR
)


@dataclass(frozen=True)
class TorchFile:
    """What `torch.load` would return, with every tensor replaced by its `Source`.

    `value` holds dict, list, tuple, str, bytes, int, float, bool, None and Source only. A namespace is a dict, a set a
    list, a path the tuple of its parts, a numpy scalar a number, a dtype or device its name.
    """

    value: Any


def read_torch(
    path: Path, part: int = 0, *, crc: bool = True, stored: list[tuple[int, Entry]] | None = None
) -> TorchFile:
    """Describe a torch file (the zip format, torch 1.6 and later). No tensor is built; optimizer states included.

    Args:
        path: the file.
        part: index of the file among the checkpoint's files, written into every piece.
        crc: compare the checksum of every tensor's bytes, which reads the whole file once. The checksum of the pickle
            is always compared.
        stored: receives `(part, entry)` of every storage, for those who compare later (`lcsc.bank.crc`).

    Raises:
        BankError: a format that is not read (named, with the remedy), a damaged or hostile archive, or a pickle that
            names anything but tensors and plain values.
    """
    with open_regular(path) as (fd, size):
        _refuse_other_formats(read_range(fd, 0, min(size, 512), path), size, path)
        try:
            return TorchFile(read_archive(fd, 0, size, path, part=part, crc=crc, stored=stored))
        except Refused as error:
            raise BankError(
                f"`{shown(path)}` {error}. Nothing was run. If you trust the file, rewrite it with "
                f"`lcsc bank convert {shown(path)} to=OUT allow_code=true`."
            ) from None


def read_archive(
    fd: int,
    start: int,
    size: int,
    path: Path,
    *,
    part: int,
    crc: bool,
    stored: list[tuple[int, Entry]] | None = None,
) -> Any:
    """As `read_torch`, for the archive in `size` bytes from `start` of an open file; returns the value.

    Raises:
        BankError: a damaged or hostile archive.
        Refused: a whole archive whose pickle is not read.
    """
    entries = read_zip(fd, start, size, path)
    if "constants.pkl" in entries:
        raise BankError(f"`{shown(path)}` is a TorchScript program, not weights; save its `state_dict()` with torch.")
    index = entries.get("data.pkl")
    if index is None:
        raise BankError(f"`{shown(path)}` is a zip archive without `data.pkl`, so not a torch file; check its name.")
    if index.size > MAX_PICKLE:
        raise BankError(f"`{shown(path)}` has a `data.pkl` of {index.size} bytes; at most {MAX_PICKLE} are read.")
    data = read_range(fd, index.offset, index.size, path)
    order = entries.get("byteorder")
    if order is not None and (order.size != 6 or read_range(fd, order.offset, 6, path) != b"little"):
        raise BankError(f"`{shown(path)}` was not written on a little-endian machine; save it again on one.")
    for entry in entries.values() if crc else (index,):
        check_crc(fd, entry, path)
    if stored is not None:
        stored += [(part, entry) for name, entry in entries.items() if name.startswith("data/")]
    value, count = read_pickle(data, ALLOWED, _BUDGET + _BUDGET_PER_ENTRY * len(entries))
    return _Resolver(entries, part, size, 100_000 + 2 * count, 2 * index.size).plain(value, 0)


def _refuse_other_formats(head: bytes, size: int, path: Path) -> None:
    """Raise BankError, with a sentence for each known format, unless the file begins like a zip archive."""
    convert = f"If you trust it, rewrite it with `lcsc bank convert {shown(path)} to=OUT allow_code=true`."
    if head[:4] == b"PK\3\4":
        return
    if size == 0:
        raise BankError(f"`{shown(path)}` is empty. Copy it again.")
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        raise BankError(f"`{shown(path)}` has the format of torch before 1.6, which runs code when read. {convert}")
    if head[257:262] == b"ustar":
        raise BankError(f"`{shown(path)}` is a tar archive, which is not read. Unpack it, or: {convert}")
    if head[:1] == b"\x80" and head[1] <= 5:
        raise BankError(f"`{shown(path)}` is a bare pickle, which runs code when read. {convert}")
    if head[:2] == b"\x1f\x8b":
        raise BankError(f"`{shown(path)}` is compressed by gzip. Unpack it with `gunzip` and read the result.")
    if head.startswith(b"version https://git-lfs"):
        raise BankError(f"`{shown(path)}` is a Git LFS pointer, not the file. Fetch it with `git lfs pull`.")
    if head[8:9] == b"{":
        raise BankError(f"`{shown(path)}` is a safetensors file with another name. Name it `*.safetensors`.")
    raise BankError(
        f"`{shown(path)}` is not a torch file (a zip archive begins with PK; this begins with "
        f"`{shown(head[:16].decode('latin-1'))}`). It is truncated, of another format, or a text pickle. {convert}"
    )


class _Resolver:
    """Turns what a pickle describes into plain values and Sources, within a number of steps and of copied bytes."""

    def __init__(self, entries: Mapping[str, Entry], part: int, size: int, steps: int, room: int) -> None:
        self.entries = entries
        self.part = part
        self.size = size
        self.steps = steps
        self.room = room

    def plain(self, value: Any, depth: int) -> Any:
        """The plain form of a described value; Refused when it holds itself or names what no value is."""
        self.steps -= 1
        if self.steps < 0 or depth > _DEPTH:
            raise Refused("holds values nested without end")
        kind = value.__class__
        if kind is dict:
            return {self.key(key): self.plain(item, depth + 1) for key, item in value.items()}
        if kind is list:
            return [self.plain(item, depth + 1) for item in value]
        if kind is tuple:
            return tuple(self.plain(item, depth + 1) for item in value)
        if kind is Record:
            return self.record(value, depth + 1)
        return value.name if kind is Global else value

    def key(self, key: Any) -> Any:
        if key.__class__ is Record or (key.__class__ is tuple and any(part.__class__ is Record for part in key)):
            raise Refused("has a dict with keys that are neither texts nor plain numbers")
        return key

    def record(self, record: Record, depth: int) -> Any:
        """The plain form of what would have been a call."""
        name, args = record.name, record.args
        if name in _TENSORS:
            return self.tensor(name, args)
        if name in _PARAMETERS and args:
            return self.plain(args[0], depth)
        if name == _SUBCLASS and len(args) == 4:
            return self.subclass(args, depth)
        if name == _NAMESPACE and not args:
            return self.plain({} if record.state is None else record.state, depth)
        if name in _PATHS:
            return self.plain(args, depth)
        if name == "torch.device" and all(part.__class__ in (str, int) for part in args):
            return ":".join(str(part) for part in args[:2])[:100]
        if name in ("torch.Size", "builtins.set", "collections.Counter") and args:
            return self.plain(args[0], depth)
        if name == _ENCODE:
            return self.encoded(args)
        if name in _SCALAR:
            return self.numpy_scalar(args)
        raise Refused(f"calls `{name}`, which does not make a tensor or a plain value")

    def encoded(self, args: tuple[Any, ...]) -> bytes:
        """Bytes, which the older pickle protocols write as the text of the same numbers."""
        text = args[0] if args else None
        if text.__class__ is not str or len(text) > self.room:
            raise Refused("holds bytes that are not written as a text")
        self.room -= len(text)
        try:
            return text.encode("latin-1")
        except UnicodeError:
            raise Refused("holds bytes that are not written as a text") from None

    def numpy_scalar(self, args: tuple[Any, ...]) -> int | float | bool:
        """A numpy scalar, (dtype, bytes), as a Python number."""
        kind, raw = args if len(args) == 2 else (None, None)
        dtype = _number_type(kind)
        if raw.__class__ is Record and raw.name == _ENCODE:
            raw = self.encoded(raw.args)
        if dtype is None or raw.__class__ is not bytes or len(raw) != dtype.itemsize:
            raise Refused("holds a numpy object that is not a number")
        return np.frombuffer(raw, dtype)[0].item()

    def subclass(self, args: tuple[Any, ...], depth: int) -> Any:
        """A tensor with attributes: function, class, arguments, attributes (which are not read)."""
        function, kind, arguments, _ = args
        if function.__class__ is not Global or arguments.__class__ is not tuple:
            raise Refused("holds a tensor that is made by something that is not a name")
        if kind.__class__ is not Global or kind.name not in _PLAIN_TYPES:
            raise Refused(f"holds a tensor of the class `{shown(getattr(kind, 'name', kind))}`")
        return self.plain(Record(function.name, arguments), depth)

    def tensor(self, name: str, args: tuple[Any, ...]) -> Source:
        """(storage, offset, size, stride, requires_grad, hooks[, dtype][, metadata]) as a place in the file."""
        third = name.endswith("_v3")
        if len(args) < (7 if third else 4) or any(extra for extra in args[(7 if third else 6) :]):
            raise Refused("holds a tensor with arguments that are not known (a conjugate or negative view, say)")
        storage, offset, shape, stride = args[:4]
        dtype, entry, count = self.storage(storage)
        if third:
            wanted = args[6].name if args[6].__class__ is Global else None
            if wanted not in _DTYPES:
                raise Refused(f"holds a tensor with the dtype `{shown(wanted)}`")
            dtype, count = _DTYPES[wanted], count * ITEMSIZE[dtype] // ITEMSIZE[_DTYPES[wanted]]
        shape, stride = counts(shape), counts(stride)
        if len(shape) != len(stride) or offset.__class__ is not int or offset < 0:
            raise Refused(f"holds a tensor with shape {shown(shape)}, stride {shown(stride)} and offset {offset}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        numel = 1
        for n in shape:
            numel *= n
        if (numel and last >= count) or numel * ITEMSIZE[dtype] > self.size:
            raise Refused(f"holds a tensor with shape {shown(shape)} that does not fit its {count} stored numbers")
        place = entry.offset + (offset * ITEMSIZE[dtype] if numel else 0)
        strides = None if not numel or _is_contiguous(shape, stride) else stride
        return Source(dtype, shape, (Piece(self.part, place, shape, strides),))

    def storage(self, storage: Any) -> tuple[str, Entry, int]:
        """dtype, entry and number of elements of ('storage', class, key, device, elements)."""
        saved = storage.args[0] if storage.__class__ is Record and storage.name == "persistent" else None
        if saved.__class__ is not tuple or len(saved) != 5 or saved[0] != "storage":
            raise Refused("holds a tensor without storage")
        _, kind, key, _, count = saved
        dtype = _STORAGE_NAMES.get(kind.name) if kind.__class__ is Global else None
        entry = self.entries.get(f"data/{key}") if key.__class__ is str else None
        if dtype is None or entry is None or count.__class__ is not int or count < 0:
            raise Refused(f"holds a tensor in the storage `{shown(key)}`, which is not in the file")
        if count * ITEMSIZE[dtype] > entry.size:
            raise Refused(f"says that the storage `{key}` has {count} numbers, but {entry.size} bytes are stored")
        return dtype, entry, count


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True


def _number_type(kind: Any) -> np.dtype | None:
    """A pickled numpy dtype, (name, align, copy) and a state with the byte order, if it is a little-endian number."""
    if kind.__class__ is not Record or kind.name != "numpy.dtype" or not kind.args or kind.args[0] not in _NUMBERS:
        return None
    state = kind.state
    little = state is None or (state.__class__ is tuple and len(state) > 1 and state[1] in ("<", "|", "="))
    return np.dtype(kind.args[0]).newbyteorder("<") if little else None


__all__ = ["ALLOWED", "TorchFile", "read_archive", "read_torch"]

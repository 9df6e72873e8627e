"""The tensors in a pickle without running anything the pickle asks for. Needs numpy only, and nothing of lcsc.

A pickle is a program: it names callables and calls them. Here every name is looked up in a table of stand-ins of our
own; nothing is imported and no class of the file comes to life. Modules keep their `_parameters`, `_buffers` and
`_modules` as plain data, tensors are described by storage, offset, shape and strides. Formats: the `_rebuild_*`
reductions of torch/_utils.py, the zip and the legacy layout of torch/serialization.py, numpy's array reductions, and
modules that carry their own source (`torch_utils.persistence` of EDM and its relatives), whose source is not looked at.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
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
    "UntypedStorage": "uint8",
}
#: dtype name -> numpy dtype with the same bits
BITS = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8")},
    **{name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "uint8", "bool")},
    "bfloat16": np.dtype("u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
}


class Incomplete(Exception):
    """Tensors are there, or may be, that cannot be had without running the file's code."""


class Storage:
    """Numbers that tensors are cut from; `data` (uint8) comes after the pickle in the legacy layout."""

    def __init__(self, dtype: str, numel: int, data: np.ndarray | None = None) -> None:
        self.dtype, self.numel, self.data = dtype, numel, data


class Tensor:
    """Elements `offset + sum(index * stride)` of a storage."""

    def __init__(self, storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str) -> None:
        if not isinstance(storage, Storage) or dtype not in BITS or len(shape) != len(stride):
            raise Incomplete(f"a tensor of dtype {dtype!r} in no plain storage")
        self.storage, self.offset, self.shape, self.stride, self.dtype = storage, offset, shape, stride, dtype

    def array(self) -> np.ndarray:
        """Raw bits, shape `self.shape`; a view where possible."""
        if self.storage.data is None or min((*self.shape, *self.stride, self.offset), default=0) < 0:
            raise pickle.UnpicklingError("a tensor without data, or of negative size")
        flat = self.storage.data.view(BITS[self.dtype])
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, flat.dtype)
        if last >= flat.size:
            raise pickle.UnpicklingError(f"a tensor reaches to element {last} of a storage of {flat.size}")
        strides = tuple(s * flat.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


class Opaque:
    """What stands in for every object of a class we do not know: it keeps what it is given and does nothing."""

    path = ""
    args: tuple[Any, ...]
    state: dict[str, Any]
    items: dict[Any, Any]
    values: list[Any]

    def __new__(cls, *_: Any, **__: Any) -> Opaque:
        self = super().__new__(cls)
        self.args, self.state, self.items, self.values = (), {}, {}, []
        return self

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.state = {**self.state, **part}
            elif part is not None:
                self.args = (*self.args, part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.values.append(value)

    def extend(self, values: Any) -> None:
        self.values.extend(values)

    def add(self, value: Any) -> None:
        self.values.append(value)


def mapping(value: Any) -> Mapping[Any, Any] | None:
    """The items of a dict or of the stand-in for a subclass of one, None for anything else."""
    if isinstance(value, Opaque):
        first = next((arg for arg in value.args if isinstance(arg, Mapping)), {})
        return {**first, **value.items} or None
    return value if isinstance(value, Mapping) else None


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, tuple(shape), tuple(stride), getattr(storage, "dtype", ""))


def _tensor_v3(storage: Any, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Any:
    return Tensor(storage, offset, tuple(shape), tuple(stride), getattr(dtype, "path", "").removeprefix("torch."))


def _subclass(rebuild: Callable[..., Any], _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    return rebuild(*args) if rebuild in (_tensor, _tensor_v3, _first) else Opaque(args)


def _first(data: Any, *_: Any) -> Any:
    return data


def _reconstruct(cls: Any, _base: Any, state: Any) -> Any:
    made = cls() if isinstance(cls, type) and issubclass(cls, Opaque) else Opaque()
    made.items.update(state if isinstance(state, Mapping) else {})
    return made


def _newobj(cls: Any, *args: Any) -> Any:
    return cls(*args) if isinstance(cls, type) and issubclass(cls, Opaque) else Opaque(args)


def _persistent(meta: Any) -> Opaque:
    made = Opaque()
    state = (mapping(meta) or {}).get("state")
    made.state = dict(mapping(state) or {})
    return made


class _Dtype(Opaque):
    """numpy.dtype: its name comes as an argument, its byte order in the state."""

    def bits(self) -> np.dtype:
        name = str(self.args[0])
        order = next((a[1] for a in self.args[1:] if isinstance(a, tuple) and len(a) > 1), "<")
        if name[:1] not in "fiub" or order not in ("<", ">", "=", "|"):
            raise Incomplete(f"a numpy array of dtype {name!r}")
        return np.dtype(name).newbyteorder(">" if order == ">" else "<")

    def __setstate__(self, state: Any) -> None:
        self.args = (*self.args, state)


class _Array(Opaque):
    """numpy.ndarray as `_reconstruct` and `__setstate__` make it: (version, shape, dtype, is_fortran, bytes)."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.made = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    """A numpy array's bytes as a tensor in C order, little-endian."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise Incomplete("a numpy array of objects")
    array = np.frombuffer(data, dtype.bits()).reshape(tuple(shape), order=order)  # type: ignore[call-overload]
    array = np.array(array, dtype.bits().newbyteorder("<"), order="C")  # also for no dimensions
    storage = Storage(array.dtype.name, array.size, array.reshape(-1).view(np.uint8))
    return Tensor(storage, 0, tuple(shape), tuple(s // array.itemsize for s in array.strides), array.dtype.name)


def _nested(data: Any) -> Any:
    """torch.storage._load_from_bytes: a legacy torch file inside a pickle."""
    file = io.BytesIO(bytes(data) if isinstance(data, bytearray) else data)
    if Unpickler(file).load() != MAGIC:
        raise Incomplete("a storage in a layout other than torch's legacy one")
    return _legacy(file, data)


def _decode(text: str, encoding: str = "latin1") -> bytes:
    """_codecs.encode, which is how protocol 2 writes bytes."""
    if encoding != "latin1":
        raise Incomplete(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _decode,
    "torch.storage._load_from_bytes": _nested,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    **{f"{module}.set": set for module in ("builtins", "__builtin__")},
    **{f"{module}._reconstructor": _reconstruct for module in ("copyreg", "copy_reg")},
    **{f"{module}.__newobj__": _newobj for module in ("copyreg", "copy_reg")},
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": lambda *_: 0 for core in ("core", "_core")},  # counters; never weights
    **{f"numpy.{core}.numeric._frombuffer": _from_bytes for core in ("core", "_core")},
}


class Unpickler(pickle.Unpickler):
    """pickle.Unpickler that knows stand-ins only."""

    storages: Callable[..., Any] | None = None

    def find_class(self, module: str, name: str, /) -> Any:
        path = f"{module}.{name}"
        if name == "_reconstruct_persistent_obj":
            return _persistent
        return _KNOWN[path] if path in _KNOWN else type(name.rpartition(".")[2], (Opaque,), {"path": path})

    def persistent_load(self, pid: Any, /) -> Any:
        if not isinstance(pid, tuple) or not pid:
            raise Incomplete("a reference of an unknown kind")
        if pid[0] == "module":  # torch's legacy layout: a class with its source, which is not looked at
            return pid[1]
        if pid[0] != "storage" or self.storages is None:
            raise Incomplete(f"a reference of the kind {str(pid[0])!r}")
        name = getattr(pid[1], "path", "").rpartition(".")[2]
        if name not in _STORAGES or not isinstance(pid[4], int):
            raise Incomplete(f"a storage of the kind {name!r}")
        return self.storages(_STORAGES[name], str(pid[2]), pid[4], pid[5] if len(pid) > 5 else None)


def read(file: BinaryIO, size: int) -> Any:
    """The value in a torch zip, legacy torch or pickle file, made of stand-ins.

    Raises:
        Incomplete: something that stand-ins cannot follow.
        pickle.UnpicklingError, EOFError, zipfile.BadZipFile: a damaged file, or none of these formats.
    """
    if file.read(4) == b"PK\x03\x04":
        return _zip(file, size)
    file.seek(0)
    value = Unpickler(file).load()
    return _legacy(file, None) if isinstance(value, int) and value == MAGIC else value


def _legacy(file: BinaryIO, memory: bytes | None) -> Any:
    """What follows the magic number: version, system, object, keys, storages (torch.serialization._legacy_save)."""
    if Unpickler(file).load() != PROTOCOL:
        raise pickle.UnpicklingError("an unknown version of torch's legacy layout")
    system = Unpickler(file).load()
    if not isinstance(system, Mapping) or not system.get("little_endian", True):
        raise Incomplete("a file from a big-endian machine")
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []

    def storage(dtype: str, key: str, numel: int, view: Any) -> Storage:
        root = roots.setdefault(key, Storage(dtype, numel))
        if view is None:
            return root
        part = Storage(dtype, int(view[2]))
        views.append((part, root, int(view[1])))
        return part

    unpickler = Unpickler(file)
    unpickler.storages = storage
    value = unpickler.load()
    for key in Unpickler(file).load():
        root = roots[str(key)]
        numel = int.from_bytes(file.read(8), "little")
        length = numel * BITS[root.dtype].itemsize
        if memory is None:
            root.data = np.frombuffer(_exactly(file, length), np.uint8)
        else:  # a slice of what the outer pickle holds anyway
            root.data = np.frombuffer(memory, np.uint8)[file.tell() : file.tell() + length]
            file.seek(length, io.SEEK_CUR)
        if root.data.size != length:
            raise EOFError("the file ends inside a tensor")
    for part, root, start in views:
        width = BITS[root.dtype].itemsize
        part.data = root.data[start * width : (start + part.numel) * width] if root.data is not None else None
    return value


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise EOFError(f"the file ends {length - len(data)} bytes early")
    return data


def _zip(file: BinaryIO, size: int) -> Any:
    """torch's zip layout: `<name>/data.pkl` and `<name>/data/<key>`, stored without compression."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        root = next((name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")), None)
        if root is None or any(i.compress_type != zipfile.ZIP_STORED or i.file_size > size for i in entries.values()):
            raise zipfile.BadZipFile("the archive holds no data.pkl, or compressed entries, which torch never writes")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise Incomplete("a file from a big-endian machine")
        cache: dict[str, Storage] = {}

        def storage(dtype: str, key: str, numel: int, _view: Any) -> Storage:
            if key not in cache:
                info = entries.get(f"{root}data/{key}")
                if info is None or info.file_size < numel * BITS[dtype].itemsize:
                    raise zipfile.BadZipFile(f"the archive holds less than {numel} numbers for storage {key!r}")
                data = np.frombuffer(archive.read(info), np.uint8)
                cache[key] = Storage(dtype, numel, data[: numel * BITS[dtype].itemsize])
            return cache[key]

        unpickler = Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        unpickler.storages = storage
        return unpickler.load()


def tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a module stand-in or of a name -> tensor mapping; empty when it is neither.

    Raises:
        Incomplete: some of its tensors are hidden in objects that stand-ins cannot follow.
    """
    if isinstance(value, Opaque) and "_parameters" in value.state:
        return dict(_module(value, ""))
    items = mapping(value)
    if not items or not all(isinstance(key, str) for key in items):
        return {}
    items = {key: getattr(item, "made", item) for key, item in items.items()}
    found = {key: item for key, item in items.items() if isinstance(item, Tensor)}
    hidden = [key for key, item in items.items() if isinstance(item, Opaque)]
    if found and hidden:
        raise Incomplete(f"`{hidden[0]}` is of the class `{type(items[hidden[0]]).path}`")
    return found


def _module(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` would give: parameters, persistent buffers, then the modules inside."""
    state = getattr(module, "state", {})
    transient = state.get("_non_persistent_buffers_set", ())
    if "_parameters" not in state:
        raise Incomplete(f"`{prefix}` holds no parameters of its own but is of the class `{type(module).path}`")
    for group in ("_parameters", "_buffers"):
        for name, item in (mapping(state.get(group)) or {}).items():
            if isinstance(item, Tensor):
                if group == "_parameters" or name not in transient:
                    yield prefix + name, item
            elif item is not None:
                kind = getattr(type(item), "path", type(item).__name__)
                raise Incomplete(f"`{prefix}{name}` is of the class `{kind}`")
    for name, inner in (mapping(state.get("_modules")) or {}).items():
        if inner is not None:
            yield from _module(inner, f"{prefix}{name}.")

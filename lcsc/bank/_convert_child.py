"""The process that reads one file for `lcsc.bank.convert`: jail first, file second. Run by its path with `python -I`.

Its one argument is JSON: `source`, `output` and `answer` are open file descriptors, `size` the bytes of the source,
`real` whether to unpickle for real, `code` a folder for imports, `site` folders where numpy and torch are found,
`metadata` what goes into the output's header. The answer is one JSON object: `status` is "ok" (with `part`, `tensors`,
`bytes`), "none" (no tensors without running code), "damaged", "failed" or "jail", each with `why`.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

#: Where a training file keeps the network people want, best first (EDM, EDM2; StyleGAN; DiT, Lightning).
ORDER = ("ema", "net", "G_ema", "model", "state_dict")
#: dtype name -> safetensors' name and bytes of one number
TAGS = {
    **{"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)},
    **{"float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "bool": ("BOOL", 1)},
    **{"int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1)},
    **{"uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "uint8": ("U8", 1)},
}
GIB = 2**30
#: name -> (dtype name, shape, function that gives the bytes)
Found = dict[str, tuple[str, tuple[int, ...], Callable[[], memoryview]]]


def sibling(name: str) -> ModuleType:
    """A module beside this file, loaded by path: nothing of lcsc itself is imported here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"no `{name}.py` beside `{__file__}`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def choose(value: Any, items_of: Callable[[Any], Any], tensors_of: Callable[[Any], Any], depth: int = 2) -> Any:
    """(path of keys, tensors) of the network in an unpickled value; tensors are empty when there is none."""
    items = items_of(value) or {}
    for key in ORDER if depth else ():
        if key in items:
            path, found = choose(items[key], items_of, tensors_of, depth - 1)
            if found:
                return (key, *path), found
    return (), tensors_of(value)


def read_inert(file: BinaryIO, size: int, inert: ModuleType) -> tuple[tuple[str, ...], Found]:
    """Tensors by stand-ins; nothing of the file is executed."""
    import numpy as np

    path, tensors = choose(inert.read(file, size), inert.mapping, inert.tensors)

    def bits(tensor: Any) -> Callable[[], memoryview]:
        return lambda: np.ascontiguousarray(tensor.array()).reshape(-1).view(np.uint8).data

    return path, {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in tensors.items()}


def read_real(file: BinaryIO, torch: ModuleType) -> tuple[tuple[str, ...], Found]:
    """Tensors by real unpickling, which runs what the file asks for."""
    import numpy as np

    head = file.read(4)
    file.seek(0)
    # storages inside a plain pickle come through here, also those that were on a GPU
    torch.storage._load_from_bytes = lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    if head == b"PK\x03\x04" or _is_legacy(file):
        value = torch.load(file, map_location="cpu", weights_only=False)
    else:
        value = pickle.load(file)

    def as_tensor(item: Any) -> Any:
        if isinstance(item, np.ndarray) and item.dtype.kind in "fiub":
            return torch.from_numpy(item.astype(item.dtype.newbyteorder("=")))
        return item

    def tensors_of(item: Any) -> dict[str, Any]:
        item = item.state_dict() if isinstance(item, torch.nn.Module) else item
        if not isinstance(item, Mapping):
            return {}
        arrays = {name: as_tensor(value) for name, value in item.items()}
        return {str(name): t.detach() for name, t in arrays.items() if isinstance(t, torch.Tensor)}

    def bits(tensor: Any) -> Callable[[], memoryview]:
        return lambda: memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    path, tensors = choose(value, lambda item: item if isinstance(item, Mapping) else None, tensors_of)
    return path, {name: (str(t.dtype)[len("torch.") :], tuple(t.shape), bits(t)) for name, t in tensors.items()}


def _is_legacy(file: BinaryIO) -> bool:
    """Whether the file begins with the magic number of torch's legacy layout: a pickled integer, any protocol."""
    head = file.read(64)
    file.seek(0)
    return (0x1950A86A20F9469CFC6C).to_bytes(10, "little") in head


def write(found: Found, metadata: Mapping[str, str], out: int) -> int:
    """Write a safetensors file, wide numbers first so that all are aligned; returns its bytes."""
    for name, (dtype, _, _) in found.items():
        if dtype not in TAGS:
            raise TypeError(f"`{name}` has the dtype {dtype}, which safetensors cannot hold")
    order = sorted(found, key=lambda name: (-TAGS[found[name][0]][1], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape, _ = found[name]
        start, end = end, end + math.prod(shape) * TAGS[dtype][1]
        header[name] = {"dtype": TAGS[dtype][0], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    _put(out, memoryview(len(text).to_bytes(8, "little") + text))
    for name in order:
        _put(out, found[name][2]())
    return 8 + len(text) + end


def _put(out: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(out, data) :]


def attempt(job: Mapping[str, Any]) -> dict[str, Any]:
    """Go to jail, read, write; the answer."""
    sys.path += [folder for folder in job["site"] if folder not in sys.path]
    jail, inert = sibling("_jail"), sibling("_inert")
    torch = importlib.import_module("torch") if job["real"] else None
    size = job["size"]
    more = 4 * size + 2 * GIB if torch else 3 * size + GIB
    try:
        jail.enter(max_bytes_written=4 * size + 2**20, max_bytes_more=more)
    except (jail.JailError, OSError) as error:
        return {"status": "jail", "why": str(error)}
    if job["code"] is not None:
        sys.path.insert(0, job["code"])
    try:
        with os.fdopen(job["source"], "rb") as file:
            path, found = read_real(file, torch) if torch else read_inert(file, size, inert)
            if not found:
                return {"status": "none", "why": f"it holds no network, neither at the top nor as {', '.join(ORDER)}"}
            try:
                length = write(found, {**job["metadata"], "lcsc_part": ".".join(path)}, job["output"])
            except OSError as error:
                return {"status": "disk", "why": str(error)}
            return {"status": "ok", "part": ".".join(path), "tensors": len(found), "bytes": length}
    except inert.Incomplete as error:
        return {"status": "none", "why": str(error)}
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        return {"status": "damaged", "why": str(error) or type(error).__name__}
    except MemoryError:
        return {"status": "failed", "why": f"it asks for more than {more} bytes of memory"}
    except BaseException as error:  # whatever the file's code raises, SystemExit too
        disk = isinstance(error, OSError) and not torch  # real code may raise anything
        return {"status": "failed" if torch or disk else "none", "why": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer the job in the first argument and leave without running anything the file may have left behind."""
    job = json.loads(sys.argv[1])
    answer = {key: value if isinstance(value, int) else str(value)[:500] for key, value in attempt(job).items()}
    os.write(job["answer"], json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    main()

"""The rest of the corpus: safetensors headers, shard indices, special files, DCP folders; and the child process."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

from hostile import Case, greedy, payloads, tensor_lies, tensor_pickle, torch_zip, zips
from hostile_packs import packs

MEMORY = 200 << 20
SECONDS = 1.0
#: kinds of audit events that reading a file has no reason to raise
EVENTS = ("import", "exec", "compile", "pickle", "subprocess", "os", "socket", "ctypes", "marshal", "shutil", "urllib")


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors(header, data=16, length=None) -> bytes:
    """A safetensors file with any header (a value or its text) before `data` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def headers() -> dict[str, bytes]:
    """Safetensors files that lie."""
    a, good = entry(), {"a": entry()}
    name = "n" * 1_000_000
    digits = b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,16]}}'
    wide = b"x" * 15_000_000 + "\U0001f600".encode()
    return {
        "length-2^63": safetensors(good, length=1 << 63),
        "length-2^64-1": safetensors(good, length=(1 << 64) - 1),
        "length-100MB": safetensors(good, length=100_000_001),
        "length-plus-1": safetensors(good, data=0, length=len(json.dumps(good)) + 1),
        "length-0": safetensors(b"", length=0),
        "length-inside": safetensors(good, length=5),
        "no-bytes": b"",
        "seven-bytes": b"\0" * 7,
        "eight-zeros": b"\0" * 8,
        "not-utf-8": safetensors(b'{"\xff\xfe":1}'),
        "not-json": safetensors(b"{nonsense}"),
        "space-before": safetensors(b" " + json.dumps(good).encode()),
        "byte-order-mark": safetensors("\ufeff{}".encode(), data=0),
        "text-behind": safetensors(json.dumps(good).encode() + b"x"),
        "half-surrogate": safetensors(json.dumps({"\ud800": entry()}).encode()),
        "list": safetensors(b"[]", data=0),
        "number": safetensors(b"1", data=0),
        "twice": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(a).encode(),) * 2)),
        "field-twice": safetensors(b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        "field-missing": safetensors({"a": {"dtype": "F32", "shape": [4]}}),
        "field-more": safetensors({"a": a | {"stride": [1]}}),
        "tensor-is-list": safetensors({"a": [a]}),
        "dtype-unknown": safetensors({"a": entry(dtype="F128")}),
        "dtype-list": safetensors({"a": entry(dtype=["F32"])}),
        "dtype-f4": safetensors({"a": entry(0, 2, (4,), "F4")}, data=2),
        "dtype-f6": safetensors({"a": entry(0, 3, (4,), "F6_E2M3")}, data=3),
        "shape-negative": safetensors({"a": entry(shape=(-4,))}),
        "shape-two-negatives": safetensors({"a": entry(shape=(-2, -2))}),
        "shape-float": safetensors({"a": entry(shape=(4.0,))}),
        "shape-bool": safetensors({"a": entry(0, 4, (True,))}, data=4),
        "shape-text": safetensors({"a": entry(shape=("4",))}),
        "shape-null": safetensors({"a": a | {"shape": None}}),
        "shape-minus-zero": safetensors(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', data=0),
        "shape-wraps": safetensors({"a": entry(shape=(1 << 62, 4, 4))}),
        "shape-wraps-to-fit": safetensors({"a": entry(shape=((1 << 62) + 1, 4))}),
        "shape-2^64": safetensors({"a": entry(shape=(1 << 64, 0), end=0)}, data=0),
        "shape-10^5-digits": safetensors(digits % (b"9" * 100_000)),
        "shape-many-axes": safetensors({"a": entry(0, 4, [1] * 100_000)}, data=4),
        "shape-disagrees": safetensors({"a": entry(shape=(5,))}),
        "offset-float": safetensors({"a": a | {"data_offsets": [0, 16.0]}}),
        "offset-bool": safetensors({"a": entry(0, 1, (1,), "U8") | {"data_offsets": [False, True]}}, data=1),
        "offset-three": safetensors({"a": a | {"data_offsets": [0, 16, 16]}}),
        "offset-negative": safetensors({"a": entry(-16, 0)}),
        "offset-backwards": safetensors({"a": entry(16, 0)}),
        "offset-beyond": safetensors({"a": entry(1 << 63, (1 << 63) + 16)}),
        "offset-2^64": safetensors({"a": entry((1 << 64) - 16, 1 << 64)}),
        "overlap": safetensors({"a": a, "b": entry(8, 24)}, data=24),
        "same-bytes": safetensors({"a": a, "b": a}),
        "hole": safetensors({"a": a, "b": entry(20, 36)}, data=36),
        "hole-first": safetensors({"a": entry(4, 20)}, data=20),
        "bytes-behind": safetensors(good, data=17),
        "no-tensor-but-bytes": safetensors({}, data=4),
        "truncated": safetensors(good, data=15),
        "metadata-number": safetensors(good | {"__metadata__": {"step": 1}}),
        "metadata-nested": safetensors(good | {"__metadata__": {"a": {"b": "c"}}}),
        "metadata-text": safetensors(good | {"__metadata__": "x"}),
        "metadata-twice": safetensors(b'{"__metadata__":{"a":"1","a":"2"}}', data=0),
        "nan": safetensors(b'{"a":NaN}'),
        "deep-lists": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "deep-objects": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "deep-few": safetensors(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
        "names-10^6": safetensors(b"{" + b'"a":[],' * 1_000_000 + b'"b":[]}'),
        "numbers-10^6": safetensors(b'{"a":[' + b"1," * 5_000_000 + b"1]}"),
        "names-32768": safetensors({f"a{i}": entry(0, 0, (0,)) for i in range(32_768)}, data=1),
        "long-name": safetensors({name: entry(shape=(5,))}),
        "wide-text": safetensors(b'{"__metadata__":{"a":"' + wide + b'"}}', data=1),
        "ansi": safetensors({"\x1b[31mred`": entry(shape=(5,))}),
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


def indices() -> dict[str, object]:
    """Shard indices whose names lead elsewhere, or that are damaged (text or value)."""
    names = ["../x.safetensors", "/etc/passwd", "..\\x.safetensors", "C:\\x", "C:x", "sub/x.safetensors", "", ".", ".."]
    names += ["\0", "x.safetensors\0", "n" * 300, "absent.safetensors", "link-out", "link-nowhere", "link-loop", "fifo"]
    names += ["folder", "/dev/zero", "zero", "socket", "link-absolute", "blob-of-another"]
    lies: dict[str, object] = {f"name-{i}-{name[:8]}": {"weight_map": {"w": name}} for i, name in enumerate(names)}
    return lies | {
        "second-name": {"weight_map": {"a": "good.safetensors", "b": "../x"}},
        "not-a-text": {"weight_map": {"a": ["good.safetensors"]}},
        "no-map": {"metadata": {}},
        "empty-map": {"weight_map": {}},
        "map-is-list": {"weight_map": ["good.safetensors"]},
        "twice": b'{"weight_map":{"a":"good.safetensors","a":"good.safetensors"}}',
        "not-json": b"{weight_map}",
        "empty": b"",
        "deep": b'{"weight_map":' + b"[" * 200_000,
        "names-10^6": b'{"weight_map":{' + b'"a":"g",' * 1_000_000 + b'"b":"g"}}',
        "names-240000": {"weight_map": {f"a{i}": "good.safetensors" for i in range(240_000)} | {"b": "../x"}},
        "nested-10^6": b'{"weight_map":[' + b"[]," * 3_000_000 + b"[]]}",
        "huge": b'{"weight_map":{"a":"' + b"x" * (40 << 20) + b'"}}',
    }


def mixture(count: int) -> bytes:
    """A LitEma file in which no EMA belongs to a raw tensor."""
    names = ["model_ema.decay", "model_ema.num_updates"]
    names += [f"{head}{n}" for head in ("model_ema.x", "m.y.") for n in range(count)]
    table = {name: entry(4 * i, 4 * i + 4, (1,)) for i, name in enumerate(names)}
    return safetensors(table, data=4 * len(names))


def metadata() -> dict[str, bytes]:
    """`.metadata` of torch.distributed.checkpoint in which a few parts are those of many tensors."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    def made(boxes, shape, tensors, offset=None, share=list):
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
        kind, size = TensorProperties(dtype=torch.float32), torch.Size(shape)
        names = [f"t{i}" for i in range(tensors)]
        whole = Metadata({name: TensorStorageMetadata(kind, size, share(chunks)) for name in names}, None, {})
        place = _StorageInfo("__0_0.distcp", 0, 10)
        whole.storage_data = {MetadataIndex(name, offset): place for name in names}
        return pickle.dumps(whole, 4)

    rows = [((i,), (1,)) for i in range(2048)]
    wide = [((i, *(0,) * 63), (1,) * 64) for i in range(2048)]
    return {
        "one-list-of-parts": made(rows, (2048,), 500, share=lambda chunks: chunks),
        "parts-in-many-lists": made(rows, (2048,), 200),
        "parts-of-many-axes": made(wide, (2048, *(1,) * 63), 20),
        "empty-parts": made([((0,), (0,))] * 2048, (0,), 200, share=lambda chunks: chunks),
        "one-place-for-all-parts": made(rows, (2048,), 1),
    }


def special(folder: Path) -> dict[str, Path]:
    """Things that are not regular files, in a folder that has a good file too."""
    folder.mkdir()
    outside = folder.parent / "outside.safetensors"
    for path in (folder / "good.safetensors", outside):
        path.write_bytes(safetensors({"a": entry()}))
    blob = folder.parent / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(outside.read_bytes())
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    for name, target in {
        "link-out": "../outside.safetensors",
        "link-absolute": str(outside),
        "link-nowhere": "nothing",
        "link-loop": "link-loop",
        "zero": "/dev/zero",
        "blob-of-another": str(blob),
    }.items():
        (folder / name).symlink_to(target)
    names = ("fifo", "folder", "link-nowhere", "link-loop", "zero", "absent", "n" * 300, "\0")
    return {f"special-{i}": folder / name for i, name in enumerate(names)} | {"device": Path("/dev/zero")}


def truncations(good: bytes) -> dict[str, bytes]:
    """A file cut at every percent, and at each of its last hundred bytes."""
    cuts = {len(good) * percent // 100 for percent in range(100)} | set(range(len(good) - 100, len(good)))
    return {f"cut-{cut}": good[:cut] for cut in sorted(cuts)}


def corpus(folder: Path, good_torch: bytes, good_safetensors: bytes) -> list[Case]:
    """Write every hostile file below `folder`."""
    cases = []

    def put(reader: str, name: str, data: bytes, suffix: str) -> None:
        path = folder / f"{len(cases)}{suffix}"
        path.write_bytes(data)
        cases.append(Case(f"{reader} {name}", reader, str(path)))

    (folder / "canaries").mkdir()
    suffixes = (".pt", ".pth", ".bin", ".ckpt")
    for name, data in (payloads(folder) | greedy()).items():
        put("torch", f"bare {name}", data, suffixes[len(cases) % 4])
        put("safetensors", f"bare {name}", data, ".safetensors")
        put("torch", f"zipped {name}", torch_zip(data), suffixes[len(cases) % 4])
        dcp = folder / f"{len(cases)}-dcp"
        dcp.mkdir()
        (dcp / ".metadata").write_bytes(data)
        (dcp / "__0_0.distcp").write_bytes(torch_zip(data))
        cases.append(Case(f"dcp {name}", "dcp", str(dcp)))
    for name, data in metadata().items():
        dcp = folder / f"{len(cases)}-dcp"
        dcp.mkdir()
        (dcp / ".metadata").write_bytes(data)
        (dcp / "__0_0.distcp").write_bytes(torch_zip(tensor_pickle(shape="K\1\x85", stride="K\1\x85")))
        cases.append(Case(f"dcp {name}", "dcp", str(dcp)))
    for name, data in tensor_lies().items():
        pickled = torch_zip(data)
        put("torch", f"tensor {name}", pickled, ".pt")
    for name, data in zips().items():
        put("torch", f"zip {name}", data, ".pt")
    for name, data in headers().items():
        put("safetensors", name, data, ".safetensors")
    put("bank", "mixture", mixture(6000), ".safetensors")
    for name, data in packs().items():
        put("pack", f"pack {name}", data, ".safetensors")
    for name, data in truncations(good_safetensors).items():
        put("safetensors", name, data, ".safetensors")
    for name, data in truncations(good_torch).items():
        put("torch", name, data, ".pt")
    for name, path in special(folder / "special").items():
        cases += [Case(f"{reader} {name}", reader, str(path)) for reader in ("safetensors", "torch", "index", "dcp")]
    for name, value in indices().items():
        path = folder / "special" / f"{len(cases)}.index.json"
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        cases.append(Case(f"index {name}", "index", str(path)))
    return cases


def read_all(cases: list[Case]) -> dict:
    """Give every case to its reader, in one child process.

    Returns:
        `rows`: (name, error class or "accepted", message, CPU seconds) of each case; `grown`: bytes by which the
        process's peak memory grew over all of them; `opened`: every path opened; `events`: every other audit event
        of an import, a call of `exec` or `pickle`, a process or a connection.
    """
    folder = Path(cases[0].path).parent
    job = folder / "cases.json"
    job.write_text(json.dumps([[case.name, case.reader, case.path] for case in cases]))
    done = subprocess.run(
        [sys.executable, __file__, str(job)], capture_output=True, text=True, timeout=120, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _memory(field: str) -> int:
    """Bytes, as Linux counts them for this process (`ru_maxrss` would begin at the parent's peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _child(job: str) -> None:
    import copyreg
    import resource
    import signal
    import time

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from lcsc.bank.dcp_file import read_dcp
    from lcsc.bank.find import find_groups
    from lcsc.bank.pack_read import open_pack
    from lcsc.bank.safetensors_file import read_safetensors
    from lcsc.bank.shard_index import read_index
    from lcsc.bank.torch_file import read_torch

    copyreg.add_extension("posix", "system", 0x42)  # what the EXT payloads call
    opened, events = set(), set()
    watching = [False]

    def watch(event: str, args: tuple) -> None:
        if watching[0] and event == "open":
            opened.add(str(args[0]))
        elif watching[0] and event.split(".")[0] in EVENTS:
            events.add(f"{event} {args}")

    sys.addaudithook(watch)
    readers = {"safetensors": read_safetensors, "torch": read_torch, "index": read_index, "dcp": read_dcp}
    readers["bank"] = find_groups
    readers["pack"] = open_pack
    # a bomb ends this process, not the machine
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 4 * MEMORY,) * 2)
    base = _memory("VmRSS")
    rows = []
    for name, reader, path in json.loads(Path(job).read_text()):
        signal.alarm(30)  # a reader that blocks on a pipe
        start = time.process_time()
        watching[0] = True
        try:
            readers[reader](Path(path))
            kind, message = "accepted", ""
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        watching[0] = False
        rows.append((name, kind, message, time.process_time() - start))
    grown = _memory("VmHWM") - base
    print(json.dumps({"rows": rows, "grown": grown, "opened": sorted(opened), "events": sorted(events)}))


if __name__ == "__main__":
    _child(sys.argv[1])

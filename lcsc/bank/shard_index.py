"""Which file holds which tensor (`*.index.json`), and the checks a file must pass before it is opened.

A checkpoint comes from a stranger. A name inside it must not lead out of its folder, and what it leads to must be a
regular file: a named pipe would block for ever and `/dev/zero` never ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcsc.core.errors import BankError

#: Largest JSON text that is parsed, in bytes. The largest index known (a model of 10^12 parameters) has 15 MB.
MAX_JSON = 32 << 20
#: Largest number of tensors of one index; the model above has 140,000.
MAX_NAMES = 250_000
#: Lists and objects that an index may hold beside its names (they stand in its metadata).
_MAX_NESTED = 1_000
_BRIEF = reprlib.Repr()  # also stops at lists nested in lists
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def shown(value: object, limit: int | None = None) -> str:
    """A name or value from a file as one printable line: control characters escaped, long ones cut.

    Paths keep their 4096 characters, other things 120.
    """
    limit = limit or (4096 if isinstance(value, os.PathLike) else 120)
    text = str(value) if isinstance(value, (str, os.PathLike, Exception)) else _BRIEF.repr(value)
    text = text[: limit + 1]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace("`", "'")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def regular_file(path: Path) -> int:
    """Size of a regular file in bytes, found without opening it, so that it never blocks.

    Symbolic links are followed (see `plain_file` for names that stand inside a checkpoint).

    Raises:
        BankError: nothing there, a folder, a named pipe, a device, a socket, a link to nowhere, or no permission.
    """
    try:
        info = os.stat(path)
    except FileNotFoundError:
        why = "is a link to nowhere" if os.path.islink(path) else "does not exist"
        raise BankError(f"`{shown(path)}` {why}; a checkpoint file was expected there. Copy it again.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise BankError(f"`{shown(path)}` cannot be looked at: {reason}. Check the name and its permissions.") from None
    if not stat.S_ISREG(info.st_mode):
        raise BankError(f"`{shown(path)}` is {_kind(info.st_mode)}; only regular files are read. Point at the file.")
    return info.st_size


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """File descriptor and size of a regular file, open for `os.pread`; closed when the block ends.

    Raises:
        BankError: as `regular_file`, also when the path became something else between the check and the opening.
    """
    regular_file(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BankError(f"`{shown(path)}` cannot be opened: {error.strerror}. Check its permissions.") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise BankError(f"`{shown(path)}` became {_kind(info.st_mode)} while it was opened; leave it alone.")
        yield fd, info.st_size
    finally:
        os.close(fd)


def read_range(fd: int, offset: int, size: int, path: Path) -> bytes:
    """Exactly `size` bytes of an open file from `offset`; raises BankError when it ends before."""
    parts, done = [], 0
    while done < size:
        part = os.pread(fd, size - done, offset + done)
        if not part:
            raise BankError(f"`{shown(path)}` ended while it was read: it changed. Leave it alone, or copy it again.")
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def plain_file(folder: Path, name: str) -> Path:
    """The file that a name inside a checkpoint means: a plain name of a regular file in `folder`.

    Symbolic links are followed only if they end inside `folder`, with one exception: in a Hugging Face cache the
    files of `<models--org--name>/snapshots/<revision>/` are links to `<models--org--name>/blobs/<hash>`, and those
    blobs (a file directly in `blobs` of the same repository folder, named by 40 or 64 hexadecimal digits) are read.

    Args:
        folder: where the checkpoint (for a shard, its index) lies.
        name: taken from the checkpoint, so not to be trusted.

    Raises:
        BankError: a name with a path in it (`..`, absolute, `/`, backslash, drive), a link that leads out of the
            folder, a missing file, or one that is not a regular file.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]|^[A-Za-z]:", name):
        raise BankError(
            f"`{shown(folder)}` names the file `{shown(name)}`; only plain names of files in the same folder are "
            "followed. Do not use this checkpoint unless you know why it points elsewhere."
        )
    path = folder / name
    regular_file(path)
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise BankError(f"`{shown(path)}` cannot be resolved: {error}. Copy the checkpoint again.") from None
    if not real.is_relative_to(root) and not _is_cache_blob(root, real):
        raise BankError(
            f"`{shown(path)}` is a link out of its folder, to `{shown(real)}`; links inside a checkpoint must stay "
            "in its folder. Replace the link by a copy of the file if you trust it."
        )
    return path


def _is_cache_blob(root: Path, real: Path) -> bool:
    for revision in (root, *root.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and "--" in repository.name:
            return real.parent == repository / "blobs" and bool(_BLOB.fullmatch(real.name))
    return False


def strict_json(raw: bytes, path: Path, *, objects: int, names: int) -> dict[str, Any]:
    """Parse a JSON object whose size in memory is bounded before it is parsed.

    Args:
        raw: the text, UTF-8, at most `MAX_JSON` bytes.
        path: file it comes from, for the message.
        objects: most lists and objects together.
        names: most strings and numbers together, roughly.

    Raises:
        BankError: not JSON, not UTF-8, not an object, a key that stands twice, or too many parts.
    """
    # Counting is a memory scan; it keeps `[[[[...` or 10^7 names from becoming Python objects.
    if raw.count(b"{") + raw.count(b"[") > objects or raw.count(b",") + raw.count(b":") > 2 * names:
        raise BankError(f"`{shown(path)}` holds more names than any model ({names} at most). It is not a checkpoint.")
    escaped = b"\\u" in raw
    limit = MAX_JSON if raw.isascii() and not escaped else MAX_JSON // 4  # one wide character makes all four bytes
    if len(raw) > limit:
        raise BankError(f"`{shown(path)}` has {len(raw)} bytes of JSON; at most {limit} are read. Copy it again.")
    try:
        integers = _integer if b"-0" in raw else None
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=integers)
        if escaped:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is not text
    except UnicodeError:
        raise BankError(f"`{shown(path)}` holds text that is not UTF-8. The file is damaged; copy it again.") from None
    except RecursionError:
        raise BankError(f"`{shown(path)}` holds lists nested without end. It is not a checkpoint.") from None
    except ValueError as error:
        raise BankError(f"`{shown(path)}` does not hold valid JSON: {error}. Copy it again.") from None
    if not isinstance(value, dict):
        raise BankError(f"`{shown(path)}` holds a JSON {type(value).__name__}, not an object. Copy it again.")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"`{shown(twice)}` stands in it twice")
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> plain file name, from a `*.safetensors.index.json` or `*.bin.index.json`.

    Every file named is checked by `plain_file` (no path, no link out of the folder, there, and regular) but not
    opened; whether each tensor is in its shard is for the reader of the shard.

    Raises:
        BankError: damaged JSON, no `weight_map`, a name that stands twice, more than `MAX_NAMES` names, or a file
            name that is not plain.
    """
    with open_regular(path) as (fd, size):
        if size > MAX_JSON:
            raise BankError(f"`{shown(path)}` has {size} bytes; an index has at most {MAX_JSON}. Is it the index?")
        raw = read_range(fd, 0, size, path)
    value = strict_json(raw, path, objects=_MAX_NESTED, names=MAX_NAMES)
    weights = value.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise BankError(f"`{shown(path)}` has no `weight_map` of tensor names to file names. Copy the index again.")
    files: set[str] = set()
    for name, file in weights.items():
        if file.__class__ is not str:
            raise BankError(f"`{shown(path)}` names no file for `{shown(name)}`, but {shown(file)}. Copy it again.")
        files.add(file)
    for file in sorted(files):
        plain_file(path.parent, file)
    return weights

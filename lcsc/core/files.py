"""Files that are either absent or complete: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcsc.core.errors import ConfigError, LcscError, OutputExistsError

#: a full disk, a full quota, a file larger than the file system holds
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_dir(path: Path) -> None:
    """Make a rename or creation inside `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` atomically; an older file under that name is replaced whole.

    Raises:
        ConfigError: see `writing`.
    """
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(path):
        try:
            with open(temp, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
        fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a plain value as indented JSON, atomically; NaN and Inf are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that appears under its final name only when the block ends without an error.

    What killed processes left of earlier tries for the same path is removed.

    Raises:
        OutputExistsError: `path` exists already.
        ConfigError: see `writing`.
    """
    if path.exists() or path.is_symlink():
        raise OutputExistsError(
            f"output `{path}` exists already. Nothing is overwritten; choose another path or remove it."
        )
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_left(path.parent, f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp")
        lock = make_locked(temp)
    try:
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        for folder in (temp, *(f for f in temp.rglob("*") if f.is_dir())):
            fsync_dir(folder)
        taken = path.exists()  # while we were writing
        if not taken:
            try:
                os.rename(temp, path)
            except OSError as error:
                taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
                if not taken:
                    raise
        if taken:
            raise OutputExistsError(f"output `{path}` appeared while it was being written; nothing is overwritten.")
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    fsync_dir(path.parent)


def make_locked(path: Path, mode: int = 0o777) -> int:
    """Make a folder that has its name only when it is locked; the system lets go of it however the process ends.

    Returns:
        The descriptor that holds the lock, also in processes that are forked.
    """
    bare = path.with_name(f"{path.name}.new")
    bare.mkdir(mode)
    lock = os.open(bare, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        bare.rename(path)
    except OSError:
        os.close(lock)
        bare.rmdir()
        raise
    return lock


def drop_left(folder: Path, pattern: str) -> None:
    """Remove the folders of `make_locked` that fit a pattern and that nobody holds any more."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # in use, or a file
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors on writing `path` into one sentence.

    Raises:
        ConfigError: no room, no permission, or another fault of the disk.
    """
    try:
        yield
    except LcscError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise ConfigError(
                f"`{path}` cannot be written: {error.strerror}, {free_bytes(path)} bytes are free. Make room, or write "
                "elsewhere."
            ) from error
        raise ConfigError(f"`{path}` cannot be written: {error.strerror}. Choose another path.") from error


def free_bytes(path: Path) -> int:
    """What is free on the disk of a path that need not exist yet, nor its folders."""
    return shutil.disk_usage(next(parent for parent in path.resolve().parents if os.path.exists(parent))).free


def preallocate(fd: int, size: int) -> None:
    """Give the file its size and, where the system can, its place on the disk."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)


def refuse_inside(bank: Path, to: Path) -> None:
    """Raise ConfigError where a path to write lies inside the folder of the checkpoints."""
    if bank.is_dir() and bank.resolve() in to.resolve().parents:
        raise ConfigError(
            f"`to` is `{to}`, inside the bank `{bank}`, where the next scan would take it for a checkpoint. "
            "Choose a path outside."
        )

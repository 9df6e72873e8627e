"""Files that are either absent or complete: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcsc.core.errors import OutputExistsError


def fsync_dir(path: Path) -> None:
    """Make a rename or creation inside `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` atomically; an older file under that name is replaced whole."""
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
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

    Raises:
        OutputExistsError: `path` exists already.
    """
    if path.exists() or path.is_symlink():
        raise OutputExistsError(
            f"output `{path}` exists already. Nothing is overwritten; choose another path or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temp.mkdir()
    try:
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        for folder in (temp, *(f for f in temp.rglob("*") if f.is_dir())):
            fsync_dir(folder)
        if path.exists():  # taken while we were writing
            raise OutputExistsError(f"output `{path}` appeared while it was being written; nothing is overwritten.")
        os.rename(temp, path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    fsync_dir(path.parent)

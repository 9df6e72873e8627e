"""A bank as one file that the workers of a machine map, and as bytes for workers that cannot see its files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.pack import write_pack
from lcsc.bank.pack_read import map_pack, on_network
from lcsc.core.digests import value_digest
from lcsc.core.errors import BankError, ConfigError, LcscError
from lcsc.core.files import preallocate, writing
from lcsc.search.setup import open_bank

#: Bytes that are compared at a time.
_BLOCK = 1 << 26
#: Times that `forget` looks whether the file is in use.
_TRIES = 20


def pack_section(section: Mapping[str, Any], bank: CheckpointBank) -> dict[str, Any]:
    """The `bank` section of a configuration, for a packed copy of `bank`.

    What the section selects is applied when the rows are packed, and not again when they are opened.

    Args:
        section: what opened `bank`.
        bank: the driver's.

    Returns:
        The section; its `path` is the copy's name, which tells it from copies of other banks. Put a folder before it.
    """
    held = [bank.digest, _dtype(bank), bank.kind, bank.rate, list(bank.rates), bank.arch]
    return {
        **section,
        **dataclasses.asdict(Selection()),
        "component": None,
        "weights": "ema:*" if bank.rates else None,
        "path": f"lcsc-bank-{value_digest(held)[:32]}.safetensors",
    }


def _dtype(bank: CheckpointBank) -> str:
    """Of a copy's rows: the numbers that the bank works with, so that it works with the same ones from there."""
    return bank.dtype if bank.storage == "resident" else "float32"


def _write(bank: CheckpointBank, to: Path) -> None:
    write_pack(bank, to, _dtype(bank), note_rounding=False)


# ------------------------------------------------------------------------------------------------------ on one machine


def share_bank(
    section: Mapping[str, Any], bank: CheckpointBank, folder: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    """The `bank` section of a worker's configuration: of a packed copy where that saves memory, else as it is.

    Only rows that lie in the CPU's memory are worth it.

    Args:
        section: what opens `bank`.
        bank: the driver's.
        folder: where the copy goes; it exists.
        note: hears why each worker will hold the rows for itself.
    """
    if bank.storage != "resident" or bank.device != "cpu" or bank.kind == "lora":
        return dict(section)
    if map_pack(bank.path, bank.rows, bank.layout, bank.dtype) is not None:
        return dict(section)  # it is one already
    if on_network(folder):
        note(f"note: `{folder}` lies on a network file system, so each worker holds the bank's rows for itself")
        return dict(section)
    own = {**pack_section(section, bank), "storage": "resident"}
    own["path"] = str(folder.resolve() / own["path"])
    try:
        if not _is_copy(own, bank):
            Path(own["path"]).unlink(missing_ok=True)
            _write(bank, Path(own["path"]))
    except LcscError as error:  # a full disk: slower beats not at all
        note(f"note: each worker holds the bank's rows for itself: {error}")
        return dict(section)
    return own


def _is_copy(section: Mapping[str, Any], bank: CheckpointBank) -> bool:
    """Whether the copy of an earlier start is there and is this bank."""
    try:
        found = open_bank({"bank": section})
        mapped = map_pack(found.path, found.rows, found.layout, bank.dtype) is not None
        return mapped and found.digest == bank.digest
    except (LcscError, OSError):
        return False


# ------------------------------------------------------------------------------------------------------ over a network


@contextlib.contextmanager
def packed(bank: CheckpointBank) -> Iterator[np.ndarray]:
    """The bytes of a packed copy, uint8, mapped from a file that is gone behind the block.

    Raises:
        ConfigError: the bank is none that can be packed.
    """
    with tempfile.TemporaryDirectory(prefix="lcsc-pack-") as folder:
        path = Path(folder) / "bank.safetensors"
        try:
            _write(bank, path)
        except BankError as error:
            raise ConfigError(f"this bank cannot be sent to workers: {error} Use `bank=path` of the engine.") from error
        yield np.asarray(np.memmap(path, mode="r"))


def unpack_once(data: np.ndarray, path: Path) -> IO[bytes]:
    """Have `data` in the file `path`, written by one process of this machine and used by all.

    Args:
        data: uint8.
        path: on a local disk.

    Returns:
        An open file; `forget` spares `path` until it is closed.

    Raises:
        ConfigError: no room.
    """
    lock = open(path.with_suffix(".lock"), "ab")  # noqa: SIM115 - held as long as the bank is in use
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not _holds(path, data):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _holds(path, data):  # else another process was faster
            part = path.with_suffix(".part")
            with writing(path), open(part, "wb") as file:
                preallocate(file.fileno(), data.nbytes)  # a full disk shows up before the first byte
                file.write(data.data)
            os.replace(part, path)
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def forget(path: Path) -> None:
    """Remove what `unpack_once` wrote, unless a process uses it still."""
    if not path.with_suffix(".lock").exists():
        return
    with open(path.with_suffix(".lock"), "rb") as lock:
        for _ in range(_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                path.with_suffix(".part").unlink(missing_ok=True)
                return
            time.sleep(0.1)  # who was killed just now is not gone yet


def _holds(path: Path, data: np.ndarray) -> bool:
    if not path.is_file() or path.stat().st_size != data.nbytes:
        return False
    found = np.memmap(path, mode="r")
    blocks = range(0, data.nbytes, _BLOCK)
    return all(np.array_equal(found[at : at + _BLOCK], data[at : at + _BLOCK]) for at in blocks)

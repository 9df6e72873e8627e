"""A bank as bytes, for workers that cannot see its files, and back to one file that a machine's workers share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.bank.pack import write_pack
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.files import preallocate, writing
from lcsc.search.setup import open_bank

#: Bytes that are compared at a time.
_BLOCK = 1 << 26
#: Times that `forget` looks whether the file is in use.
_TRIES = 20


def pack_section(section: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The `bank` section of a configuration, for a pack of all that it selects."""
    everything = {"component": None, "start": None, "stop": None, "every": 1, "last": None}
    weights = section["weights"] if section["weights"] == "ema:*" else None
    return {**section, **everything, "weights": weights, "path": str(path)}


@contextlib.contextmanager
def packed(bank: CheckpointBank) -> Iterator[np.ndarray]:
    """The bytes of `lcsc.bank.pack`, uint8, mapped from a file that is gone behind the block.

    Raises:
        ConfigError: the bank is none that a pack holds to the bit.
    """
    with tempfile.TemporaryDirectory(prefix="lcsc-pack-") as folder:
        path = Path(folder) / "bank.safetensors"
        try:  # rows in the dtype of use can be mapped; float32 holds every narrower one
            write_pack(bank, path, "float32" if bank.dtype == "float32" else None)
            same = open_bank({"bank": pack_section(bank.config, path)}).digest == bank.digest
        except BankError as error:
            raise ConfigError(f"this bank cannot be sent to workers: {error} Use `bank=path` of the engine.") from error
        if not same:
            raise ConfigError(
                f"the bank `{bank.path}` cannot be sent to workers: a pack would round its numbers. Put it where every "
                "node sees it, and use `bank=path` of the engine."
            )
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

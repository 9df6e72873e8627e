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

#: Folder beside run directories, for copies that their workers share.
BANKS = ".banks"
#: Bytes that are compared at a time.
_BLOCK = 1 << 26
#: Times that `forget` looks whether the copy is in use.
TRIES = 20


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
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The `bank` section of a worker's configuration: of a packed copy where that saves memory, else as it is.

    Only rows that lie in the CPU's memory are worth it. Searches that run at a time share one copy.

    Args:
        section: what opens `bank`.
        bank: the driver's.
        folder: where copies lie; copies that nobody uses any more are removed from it.
        note: hears why each worker will hold the rows for itself.

    Returns:
        The section, and what to call when the workers are gone.
    """
    alone = dict(section), lambda: None
    if bank.storage != "resident" or bank.device != "cpu" or bank.kind == "lora":
        return alone
    if map_pack(bank.path, bank.rows, bank.layout, bank.dtype) is not None:
        return alone  # it is one already
    if on_network(folder):
        note(f"note: `{folder}` lies on a network file system, so each worker holds the bank's rows for itself")
        return alone
    own = {**pack_section(section, bank), "storage": "resident"}
    path = folder.resolve() / own["path"]
    own["path"] = str(path)
    try:
        with writing(path):
            lock = _held(path, lambda: _is_copy(own, bank), lambda: _write(bank, path))
    except LcscError as error:  # a full disk: slower beats not at all
        note(f"note: each worker holds the bank's rows for itself: {error}")
        _tidy(folder)
        return alone
    return own, lambda: _leave(path, lock)


#: Copies that no search of this process uses now, by path; None where they are not kept.
_kept: dict[Path, IO[bytes]] | None = None


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Inside, the copy that the last search of this process used waits for the next one, as in a sweep."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        waiting, _kept = _kept, None
        for path, lock in waiting.items():
            _leave(path, lock)


def _leave(path: Path, lock: IO[bytes]) -> None:
    if _kept is None:
        lock.close()
        forget(path, tries=1)
        _tidy(path.parent)
        return
    others, _kept[path] = [(other, _kept.pop(other)) for other in list(_kept)], lock
    for other, held in others:
        held.close()
        if other != path:
            forget(other, tries=1)


def _tidy(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is in use
        folder.rmdir()


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

    def write() -> None:
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            preallocate(file.fileno(), data.nbytes)  # a full disk shows up before the first byte
            file.write(data.data)
        os.replace(part, path)

    with writing(path):
        return _held(path, lambda: _holds(path, data), write)


def _holds(path: Path, data: np.ndarray) -> bool:
    if not path.is_file() or path.stat().st_size != data.nbytes:
        return False
    found = np.memmap(path, mode="r")
    blocks = range(0, data.nbytes, _BLOCK)
    return all(np.array_equal(found[at : at + _BLOCK], data[at : at + _BLOCK]) for at in blocks)


# --------------------------------------------------------------------------------------------------- one copy for all


def _held(path: Path, good: Callable[[], bool], write: Callable[[], None]) -> IO[bytes]:
    """Have a good file at `path`, written by one of all who ask at a time; their lock on it."""
    for other in path.parent.glob("lcsc-bank-*.lock"):  # left by who was killed
        if other != path.with_suffix(".lock"):
            forget(other.with_suffix(path.suffix), tries=1)
    lock = _lock(path, fcntl.LOCK_SH)
    if good():
        return lock
    while True:
        lock.close()
        lock = _lock(path, fcntl.LOCK_EX)
        try:
            if not good():  # else another was faster
                _remove(path)
                write()
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _current(lock, path):  # nobody was in between and found it unused
                return lock
        except BaseException:
            lock.close()
            forget(path, tries=1)
            raise


def forget(path: Path, tries: int = TRIES) -> None:
    """Remove a copy, unless somebody uses it still.

    Args:
        path: of the copy.
        tries: looks, a tenth of a second apart.
    """
    for _ in range(tries if path.with_suffix(".lock").exists() else 0):
        with contextlib.suppress(OSError):
            with _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _remove(path)
                path.with_suffix(".lock").unlink()
            return
        time.sleep(0.1)  # who was killed just now is not gone yet


def _remove(path: Path) -> None:
    """The copy, and what whoever was killed while writing it left."""
    for left in (path, path.with_suffix(".part"), *path.parent.glob(f".{path.name}.*.tmp")):
        left.unlink(missing_ok=True)


def _lock(path: Path, how: int) -> IO[bytes]:
    """The lock of a copy, in a file that is removed with it; raises BlockingIOError where `how` says not to wait."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder was removed just now
            lock = open(path.with_suffix(".lock"), "ab")  # noqa: SIM115 - held as long as the bank is in use
            try:
                fcntl.flock(lock, how)
                if _current(lock, path):
                    return lock
            except BaseException:
                lock.close()
                raise
            lock.close()


def _current(lock: IO[bytes], path: Path) -> bool:
    """Whether a lock is the one that others find."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path.with_suffix(".lock")))
    return False

"""How much memory a bank takes, and which storage fits. All numbers are bytes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from lcsc.bank.content import CHUNK
from lcsc.bank.stream import default_threads
from lcsc.core.errors import ConfigError, did_you_mean

#: ways to hold a bank, best first
STORAGES = ("resident", "delta", "streamed")
#: share of the free memory that a bank may take before the next storage is chosen
SHARE = 0.8
#: list entries, paths and open files of one checkpoint
PER_CHECKPOINT = 3000
#: Python, torch 2.13 (CPU build), numba and the compiled kernels, measured (benchmarks/results/memory.json)
LOADED_BYTES = 360_000_000


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has free, or what its control group leaves."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def process_bytes() -> int:
    """What a process with torch and the compiled kernels holds before it reads a bank (more with a CUDA build)."""
    return max(LOADED_BYTES, psutil.Process(os.getpid()).memory_info().rss)


def bank_bytes(num_checkpoints: int, num_parameters: int, storage: str, itemsize: int = 4, outputs: int = 1) -> int:
    """What a bank and `outputs` candidates built from it add to a process.

    Args:
        num_checkpoints: K.
        num_parameters: P.
        storage: `resident` (K rows of `itemsize` bytes a number), `delta` (a float32 anchor and K rows of bfloat16)
            or `streamed` (blocks of the files).
        itemsize: bytes of one number of a resident row.
        outputs: float32 rows that receive the candidates.
    """
    rows = {"resident": num_checkpoints * itemsize, "delta": 4 + 2 * num_checkpoints, "streamed": 0}[storage]
    blocks = (default_threads() + 1) * min(CHUNK, num_parameters) * (8 * 4 + outputs * 12)
    return num_parameters * (rows + 4 * outputs) + blocks + num_checkpoints * PER_CHECKPOINT


def predicted_peak(num_checkpoints: int, num_parameters: int, storage: str | None = None) -> dict[str, int]:
    """Peak memory of a process that holds the bank and one candidate, by storage (all three when None)."""
    base = process_bytes()
    names = STORAGES if storage is None else (storage,)
    return {name: base + bank_bytes(num_checkpoints, num_parameters, name) for name in names}


def choose_device(wanted: str, num_checkpoints: int, num_parameters: int, itemsize: int = 4) -> tuple[str, int]:
    """Where the rows lie, and the memory that is free there.

    Args:
        wanted: a torch device, or `auto`: the GPU where there is one and the rows (or their differences) fit into it.
        num_checkpoints, num_parameters, itemsize: as for `bank_bytes`.

    Raises:
        ConfigError: a GPU was asked for and torch finds none.
    """
    if wanted == "cpu":
        return "cpu", available_bytes()
    import torch

    if not torch.cuda.is_available():
        if wanted == "auto":
            return "cpu", available_bytes()
        raise ConfigError(f"`bank.device` is `{wanted}`, but torch finds no such device. Use `cpu` or `auto`.")
    try:
        device = torch.device("cuda" if wanted == "auto" else wanted)
        free = torch.cuda.mem_get_info(device)[0]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"`bank.device` is `{wanted}`, which torch refuses. Use `cpu`, `cuda` or `auto`.") from error
    smallest = min(bank_bytes(num_checkpoints, num_parameters, s, itemsize) for s in ("resident", "delta"))
    if wanted == "auto" and smallest > SHARE * free:
        return "cpu", available_bytes()
    return str(device), free


def choose_storage(
    wanted: str, num_checkpoints: int, num_parameters: int, itemsize: int = 4, free: int | None = None
) -> str:
    """The storage to use: the one asked for, or with `auto` the best that fits in the free memory.

    Args:
        wanted: a storage or `auto`.
        num_checkpoints, num_parameters, itemsize: as for `bank_bytes`.
        free: bytes to fit into; None asks the machine.

    Raises:
        ConfigError: no such storage.
    """
    if wanted in STORAGES:
        return wanted
    if wanted != "auto":
        raise ConfigError(f"no bank storage named `{wanted}`.{did_you_mean(wanted, ('auto', *STORAGES))}")
    room = SHARE * (available_bytes() if free is None else free)
    fitting = [s for s in STORAGES if bank_bytes(num_checkpoints, num_parameters, s, itemsize) <= room]
    return fitting[0] if fitting else "streamed"

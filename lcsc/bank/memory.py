"""How much memory a bank takes, and which storage fits. All numbers are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lcsc.bank.content import CHUNK
from lcsc.bank.layout import Layout
from lcsc.bank.rows import Row, long_blocks
from lcsc.bank.stream import default_threads
from lcsc.core.errors import ConfigError, did_you_mean

#: ways to hold a bank, best first
STORAGES = ("resident", "delta", "streamed")
#: share of the free memory that a bank may take before the next storage is chosen
SHARE = 0.8
#: list entries, paths and open files of one checkpoint
PER_CHECKPOINT = 3000
#: two sums and a mark of one content chunk (`rows.Checksums`)
PER_CHUNK = 17
#: Python, torch 2.13 (CPU build), numba and the compiled kernels, measured (benchmarks/results/memory.json)
LOADED_BYTES = 360_000_000
#: the same and what a search imports on its way (diffusers, scipy, scikit-learn, nevergrad), measured there
SEARCH_BYTES = 850_000_000
#: float32 rows that a search holds while it exports, measured there: the live network, the winner's tensors, the
#: network that they are loaded back into and its file, and what is left unused in between
EXPORT_ROWS = 4.5
#: what drawing the report takes on top, when the rows of the export are free again
REPORT_BYTES = 60_000_000


@dataclass(frozen=True)
class Extent:
    """What the memory of a bank depends on.

    Args:
        num_checkpoints: K.
        num_parameters: P.
        num_chunks: content chunks of one checkpoint (`lcsc.bank.content`).
        long: numbers in the blocks that hold more than a chunk, because a tensor in strides is read as a whole.
    """

    num_checkpoints: int
    num_parameters: int
    num_chunks: int = 0
    long: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Row], layout: Layout) -> Extent:
        """The extent of some rows with these columns."""
        tables = list({id(row.table): row.table for row in rows}.values())
        chunks = sum(-(-(entry.stop - entry.start) // CHUNK) for entry in layout.entries)
        return cls(len(rows), layout.num_parameters, chunks, long_blocks(layout, tables))


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has free, or what its control group leaves."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def bank_bytes(extent: Extent, storage: str, itemsize: int = 4, outputs: int = 1) -> int:
    """What a bank and `outputs` candidates built from it add to a process.

    Args:
        extent: of the bank.
        storage: `resident` (K rows of `itemsize` bytes a number), `delta` (a float32 anchor and K rows of bfloat16)
            or `streamed` (blocks of the files).
        itemsize: bytes of one number of a resident row.
        outputs: float32 rows that receive the candidates.
    """
    K, P, buffers = extent.num_checkpoints, extent.num_parameters, default_threads() + 1
    rows = {"resident": K * itemsize, "delta": 4 + 2 * K, "streamed": 0}[storage]
    blocks = buffers * min(CHUNK, P) * (8 * 4 + outputs * 12)
    long = sorted(extent.long, reverse=True)
    if storage == "streamed":  # a row and the sums in each buffer, and while these are used again the numbers as stored
        work = 4 * outputs * P + sum(long[:buffers]) * (4 + outputs * 12) + sum(long[buffers : 2 * buffers - 1]) * 4
    else:  # read before there is a candidate: the numbers as stored; for differences two rows as well
        work = max(4 * outputs * P, sum(long[: buffers - 1]) * (12 if storage == "delta" else 4))
    return P * rows + work + blocks + K * (PER_CHECKPOINT + PER_CHUNK * extent.num_chunks)


def bank_peak(extent: Extent, storage: str) -> int:
    """Peak memory of a process that holds the bank and one candidate and does nothing else."""
    return LOADED_BYTES + bank_bytes(extent, storage)


def search_peak(extent: Extent, storage: str) -> int:
    """Peak memory of `lcsc search` on the CPU, without what depends on more than the bank.

    It covers the libraries (a CPU build of torch), the bank, the network, its export and the report; not the
    activations of a batch, a detector larger than the built-in ones, and the data.
    """
    beside = max(REPORT_BYTES, int(4 * (EXPORT_ROWS - 1) * extent.num_parameters))  # one row is the bank's candidate
    return SEARCH_BYTES + beside + bank_bytes(extent, storage)


def choose_device(wanted: str, extent: Extent, itemsize: int = 4) -> tuple[str, int]:
    """Where the rows lie, and the memory that is free there.

    Args:
        wanted: a torch device, or `auto`: the GPU where there is one and the rows (or their differences) fit into it.
        extent, itemsize: as for `bank_bytes`.

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
    smallest = min(bank_bytes(extent, s, itemsize) for s in ("resident", "delta"))
    if wanted == "auto" and smallest > SHARE * free:
        return "cpu", available_bytes()
    return str(device), free


def choose_storage(wanted: str, extent: Extent, itemsize: int = 4, free: int | None = None) -> str:
    """The storage to use: the one asked for, or with `auto` the best that fits in the free memory.

    Args:
        wanted: a storage or `auto`.
        extent, itemsize: as for `bank_bytes`.
        free: bytes to fit into; None asks the machine.

    Raises:
        ConfigError: no such storage.
    """
    if wanted in STORAGES:
        return wanted
    if wanted != "auto":
        raise ConfigError(f"no bank storage named `{wanted}`.{did_you_mean(wanted, ('auto', *STORAGES))}")
    room = SHARE * (available_bytes() if free is None else free)
    fitting = [s for s in STORAGES if bank_bytes(extent, s, itemsize) <= room]
    return fitting[0] if fitting else "streamed"

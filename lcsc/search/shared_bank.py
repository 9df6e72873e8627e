"""One copy of a bank for all worker processes of a machine: packed once, and mapped by each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.pack import write_pack
from lcsc.bank.pack_read import map_pack, on_network
from lcsc.core.errors import LcscError

#: Name of the packed bank in the folder that workers share.
NAME = "bank.safetensors"


def share_bank(
    section: Mapping[str, Any], bank: CheckpointBank, folder: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    """The `bank` section of a worker's configuration: of a packed copy where that saves memory, else as it is.

    Only rows that lie in the CPU's memory are worth it. What the section selects is applied when the rows are packed,
    and not again when they are opened.

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
    own = {
        **section,
        "path": str((folder / NAME).resolve()),
        "component": None,
        "weights": "ema:*" if bank.rates else None,
        **dataclasses.asdict(Selection()),
        "storage": "resident",
    }
    try:
        if not _holds(own, bank):
            (folder / NAME).unlink(missing_ok=True)
            write_pack(bank, folder / NAME, bank.dtype, note_rounding=False)
    except LcscError as error:  # a full disk: slower beats not at all
        note(f"note: each worker holds the bank's rows for itself: {error}")
        return dict(section)
    return own


def _holds(section: Mapping[str, Any], bank: CheckpointBank) -> bool:
    """Whether the copy of an earlier start is there and is this bank."""
    try:
        found = CheckpointBank.open(
            section["path"], weights=section["weights"], dtype=bank.dtype, storage=section["storage"]
        )
        mapped = map_pack(found.path, found.rows, found.layout, bank.dtype) is not None
        return mapped and found.digest == bank.digest
    except (LcscError, OSError):
        return False

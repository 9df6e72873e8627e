"""`lcsc bank pack`: a bank as one file that opens in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lcsc.bank import CheckpointBank
from lcsc.bank.pack import write_pack
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words, read_selection


def main(words: Sequence[str]) -> None:
    """`from=PATH to=FILE.safetensors [dtype=...] [component= weights= start= stop= every= last=]`."""
    defaults = {"from": None, "to": None, "dtype": None, "component": None, "weights": None}
    settings = parse_words(words, {**defaults, "start": None, "stop": None, "every": "1", "last": None})
    path, to = Path(need(settings, "from")), Path(need(settings, "to"))
    bank = CheckpointBank.open(
        path,
        select=read_selection(settings),
        component=settings["component"],
        weights=settings["weights"],
        storage="streamed",
    )
    for note in bank.notes:
        print(note)
    began = time.perf_counter()
    with passing("pack", unit="columns") as progress:
        dtype = write_pack(bank, to, settings["dtype"], progress)
    print(
        f"packed: {to} ({bank.num_checkpoints} checkpoints x {bank.layout.num_parameters:,} {dtype}, "
        f"{to.stat().st_size / 1e9:.3g} GB, {time.perf_counter() - began:.1f} s)"
    )

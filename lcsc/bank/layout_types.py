"""What finding returns: checkpoints, and groups of them that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcsc.bank.crc import Stored
from lcsc.bank.extents import Table

#: components that denoise; where exactly one of them is there, it is the one to combine
DENOISERS = ("unet", "transformer", "prior", "controlnet", "denoiser", "dit")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One network at one step.

    Args:
        step: training step (or epoch, or thousands of images, as the run counts; a note says so).
        path: the file, or of several files their folder (their index where the folder holds several steps).
        files: files that the pieces of `table` count in.
        table: tensor name -> place; checkpoints with equal tables share one object.
        format: `safetensors`, `torch` or `dcp`.
        kind: `raw`, `ema` or `lora`.
        rate: EMA rate as written, None when nothing says it.
        component: name of the network in its checkpoint (`unet`), None when it is the only one.
        arch: `{"class", "config"}` from config.json, None when there is none.
        metadata: texts of the safetensors header, and `adapter_config` (JSON) of a PEFT folder.
        filled: names of an EMA whose tensors are raw ones, because the file has no EMA of them (LitEma and buffers).
        stored: checksums that torch's archives have of their bytes, None for other formats.
    """

    step: int
    path: Path
    files: tuple[Path, ...]
    table: Table
    format: str
    kind: str
    rate: str | None = None
    component: str | None = None
    arch: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    filled: frozenset[str] = frozenset()
    stored: Stored | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Group:
    """Checkpoints of one network, one kind and one EMA rate, in step order."""

    component: str | None
    kind: str
    rate: str | None
    layout: str
    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`unet raw`, `ema 0.9999`: how a table and an error name the group."""
        return " ".join(part for part in (self.component, self.kind, self.rate) if part)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps, increasing."""
        return tuple(item.step for item in self.checkpoints)

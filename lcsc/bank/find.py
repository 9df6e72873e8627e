"""Checkpoints under a path, whatever trainer saved them, in groups that are never mixed: component, kind and EMA rate.

Reads names and headers only. What is passed over is said in the groups' notes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc.bank.keys import unfilled
from lcsc.bank.layout_choice import choose
from lcsc.bank.layout_folder import Unit
from lcsc.bank.layout_read import Loaded, Pool, is_lora, load_set, read_arch
from lcsc.bank.layout_types import DENOISERS, Checkpoint, Group
from lcsc.bank.layout_walk import Found, nothing, walk
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError

__all__ = ["DENOISERS", "Checkpoint", "Group", "choose", "find_groups"]


def find_groups(path: str | Path, *, problems: list[BankError] | None = None, crc: bool = False) -> list[Group]:
    """All checkpoints under a path, without any setting.

    Args:
        path: folder of steps, one checkpoint's folder, or one file.
        problems: receives what is wrong with single checkpoints, which are left out; None raises the first.
        crc: compare the checksums of torch files, which reads them whole.

    Returns:
        Groups by component; raw before EMA.

    Raises:
        BankError: nothing found, a step that stands twice, or a damaged or hostile file. Of components that no search
            combines (a VAE beside a UNet) a damaged file is a note.
    """
    found = walk(Path(path))
    return _Builder(found, problems, crc).build(Path(path))


class _Builder:
    """Reads the sets that were found and sorts them into groups."""

    def __init__(self, found: Found, problems: list[BankError] | None, crc: bool) -> None:
        self.found, self.problems, self.crc = found, problems, crc
        self.pool = Pool()
        self.arch = functools.lru_cache(maxsize=256)(self._arch)
        #: component, kind, rate -> step -> checkpoint
        self.rows: dict[tuple[str | None, str, str | None], dict[int, Checkpoint]] = {}
        self.layouts: dict[tuple[str | None, str, str | None], str] = {}
        self.inside: dict[tuple[str | None, str, str | None], dict[str, None]] = {}
        self.units: dict[str, str] = {}
        self.failed: dict[str | None, BankError] = {}
        self.again: dict[str, int] = {}
        self.unread: list[BankError] = []

    def _arch(self, folder: Path) -> tuple[Mapping[str, Any] | None, str | None, str | None]:
        arch, library, rate = read_arch(folder)
        return self.pool.arch(arch), library, rate

    # ---------------------------------------------------------------------------------------------- reading

    def build(self, path: Path) -> list[Group]:
        units = self.found.units
        bases = {unit.name.base for unit in units if unit.hint == "files" and _has_number(unit)}
        bases = bases or {unit.name.base for unit in units if unit.hint == "files"}
        several = len(bases) > 1
        for component, error in self.found.broken:
            self.keep(component, error)
        # files without a number come last, so that they can be recognised as a step that is there already
        for unit in sorted(units, key=lambda unit: not _has_number(unit)):
            component = (unit.name.base or None) if several and unit.hint == "files" else unit.component
            if not _has_number(unit) and unit.hint == "files" and not unit.name.last and unit.name.base not in bases:
                self.found.pass_over("no step in the name", [unit.files.label])
                continue
            try:
                self.add(unit, component, load_set(unit.files, crc=self.crc))
            except BankError as error:
                self.fail(component, unit, error)
        self.raise_failed()
        again = (f"{label} (step {step})" for label, step in self.again.items())
        self.found.pass_over("a step that is there already", again)
        if not any(self.rows.values()):
            raise self.unread[0] if self.unread else nothing(path, self.found)
        return self.groups()

    def fail(self, component: str | None, unit: Unit, error: BankError) -> None:
        """Keep an error until all is read: of a component that is not combined it is a note only."""
        if not _has_number(unit) and unit.hint == "files" and len(self.found.units) > 1:
            self.unread.append(error)
            self.found.notes[f"passed over, it cannot be read: {error}"] = None
        else:
            self.keep(component, error)

    def keep(self, component: str | None, error: BankError) -> None:
        """Put an error where it waits until all is read."""
        if self.problems is not None:
            self.problems.append(error)
        else:
            self.failed.setdefault(component, error)

    def raise_failed(self) -> None:
        """Raise the first error of a component that may be combined; drop the others with a note."""
        components = {key[0] for key in self.rows} | self.failed.keys()
        wanted = {component for component in components if component in DENOISERS} or components
        for component, error in self.failed.items():
            if component in wanted:
                raise error
            for key in [key for key in self.rows if key[0] == component]:
                del self.rows[key]
            self.found.notes[f"`{shown(component)}` is left out: {error}"] = None

    def add(self, unit: Unit, component: str | None, loaded: Loaded) -> None:
        """Sort the networks of one set into groups."""
        step, counted = _step(unit, loaded)
        if step is None and len(self.found.units) > 1 and unit.hint == "files":
            self.found.pass_over("no step in the name or the file", [unit.files.label])
            return
        if step is None:
            step = 0
            self.found.notes[f"{shown(unit.files.label)} names no step; it counts as step 0"] = None
        arch, library, rate = self.arch(unit.files.folder)
        both, stored = any(part.kind == "ema" for part in loaded.parts), self.pool.stored(loaded.stored)
        for part in loaded.parts:
            kind = part.kind or ("raw" if both else unit.kind or "raw")
            if lora := is_lora(part.table):
                kind = "lora"
            own = "/".join(name for name in (component, part.component) if name) or None
            key = (own, kind, (part.rate or unit.rate or rate) if kind == "ema" else None)
            item = Checkpoint(
                step=step,
                path=unit.files.main if unit.hint == "files" else unit.files.path,
                files=loaded.files,
                table=self.pool.table(part.table),
                format=loaded.format,
                kind=kind,
                rate=key[2],
                component=own,
                arch=None if lora else arch,
                metadata=self.pool.metadata(loaded.metadata),
                filled=self.pool.names(part.filled),
                stored=stored,
            )
            if self.place(key, item, unit, counted):
                self.layouts.setdefault(key, _layout(unit, loaded, library))
                self.inside.setdefault(key, {}).update(dict.fromkeys(loaded.passed[:20]))

    def place(self, key: tuple[str | None, str, str | None], item: Checkpoint, unit: Unit, counted: str) -> bool:
        """Put a checkpoint into its group, unless its step is there already."""
        rows = self.rows.setdefault(key, {})
        if item.step in rows and not _has_number(unit):
            self.again[unit.files.label] = item.step
            return False
        if item.step in rows:
            error = BankError(
                f"step {item.step} stands twice: `{rows[item.step].path}` and `{item.path}`. A bank holds one "
                "checkpoint a step; move one away."
            )
            self.fail(key[0], unit, error)
            return False
        units = self.units.setdefault(str(key), counted)
        if units != counted:
            raise BankError(
                f"`{shown(item.path)}` names its {counted} and other checkpoints beside it their {units}, and nothing "
                "inside says more. Rename the files so that all names end in the step."
            )
        rows[item.step] = item
        return True

    # ---------------------------------------------------------------------------------------------- groups

    def groups(self) -> list[Group]:
        """The groups, with their notes."""
        keys = sorted(self.rows, key=lambda key: (key[0] or "", ("raw", "ema", "lora").index(key[1]), key[2] or ""))
        keys = [key for key in keys if self.rows[key]]
        names = {key[0] for key in keys}
        shared = [*self.found.notes, *self.found.passed_notes()]
        every = {step for key in keys for step in self.rows[key]}
        found = []
        for key in keys:
            component = "model" if key[0] is None and len(names) > 1 and "model" not in names else key[0]
            rows = [self.rows[key][step] for step in sorted(self.rows[key])]
            notes = [*shared, *self.own_notes(key, every - self.rows[key].keys())]
            found.append(Group(component, key[1], key[2], self.layouts[key], tuple(rows), tuple(notes)))
        return found

    def own_notes(self, key: tuple[str | None, str, str | None], missing: set[int]) -> list[str]:
        """What is to be said of one group alone."""
        notes = []
        if inside := list(self.inside[key]):
            notes.append(f"passed over inside: {', '.join(inside[:6])}" + (" ..." if len(inside) > 6 else ""))
        if buffers := unfilled(list(self.rows[key].values())):
            name = shown(min(buffers))
            what = f"tensors (such as `{name}`) have" if len(buffers) > 1 else f"tensor (`{name}`) has"
            notes.append(f"{len(buffers)} {what} no EMA in any file; the raw weights' stand in both")
        if missing:
            few = ", ".join(map(str, sorted(missing)[:5])) + (" ..." if len(missing) > 5 else "")
            notes.append(f"steps that only other weights have: {few}")
        if self.units[str(key)] == "epoch":
            notes.append("the numbers are epochs (neither names nor files give steps)")
        if self.layouts[key] == "EDM (converted)":
            notes.append("the numbers are thousands of images, as EDM counts")
        if self.layouts[key] == "ema-pytorch PostHocEMA":
            notes.append("the rates are the indices of its EMAs; the files do not say their widths")
        formats = sorted({item.format for item in self.rows[key].values()})
        if len(formats) > 1:
            notes.append(f"several formats: {', '.join(formats)}")
        return notes


def _has_number(unit: Unit) -> bool:
    return unit.name.step is not None or unit.name.epoch is not None


def _step(unit: Unit, loaded: Loaded) -> tuple[int | None, str]:
    """The step and what it was counted in; a name's step comes before the file's, a file's step before an epoch."""
    name = unit.name
    if name.step is not None and not (name.loose and loaded.counts_epochs):
        return name.step, "step"
    if loaded.step is not None:
        return loaded.step, "step"
    if name.step is not None or name.epoch is not None:
        return (name.epoch if name.step is None else name.step), "epoch"
    return None, "step"


def _layout(unit: Unit, loaded: Loaded, library: str | None) -> str:
    """The name of the layout, as the scan prints it."""
    stem = unit.files.stem
    if loaded.format == "dcp":
        return "torch DCP"
    if loaded.writer:
        posthoc = loaded.writer == "ema-pytorch" and unit.rate is not None
        return "ema-pytorch PostHocEMA" if posthoc else loaded.writer
    if stem.startswith("network-snapshot-"):
        return "EDM (converted)"
    if unit.hint == "pipeline":
        return "diffusers pipelines"
    if library == "transformers":
        return "transformers"
    if unit.hint == "trainer":
        return "accelerate trainer"
    if library == "diffusers":
        return "diffusers components"
    if (unit.name.rate and stem.startswith("ema_")) or stem == f"model{unit.name.step or 0:06d}":
        return "openai"
    sharded = "sharded " if len(loaded.files) > 1 or unit.files.index else ""
    return f"{sharded}{'safetensors' if loaded.format == 'safetensors' else 'torch files'}"

"""One checkpoint's folder: which networks lie in it, directly or in the folders of its components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lcsc.bank.layout_files import DCP, Listing, WeightSet, is_accelerate_model, list_folder, passed_names, prefer
from lcsc.bank.names import Name, parse, parse_component
from lcsc.core.errors import BankError


@dataclass(frozen=True, slots=True)
class Unit:
    """One set of weights of one step, not read yet.

    Args:
        files: what to read.
        name: what the name with the step says.
        hint: how it lies there: `pipeline`, `component`, `trainer`, `folder`, `files` or `dcp`.
        component: name of the network, None when it is the only one.
        kind: `ema` or `raw` where a name says so, else None.
        rate: EMA rate where a name says so.
    """

    files: WeightSet
    name: Name
    hint: str
    component: str | None = None
    kind: str | None = None
    rate: str | None = None


@dataclass
class Contents:
    """What a checkpoint's folder holds; without units and broken components it is no checkpoint's folder."""

    units: list[Unit] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[tuple[str | None, BankError]] = field(default_factory=list)


def dcp_set(folder: Path) -> WeightSet:
    """A folder of torch.distributed.checkpoint as a set of weights."""
    return WeightSet(folder, folder.name, DCP, (".metadata",))


def read_contents(folder: Path, name: Name, listing: Listing | None = None) -> Contents:
    """The networks of one checkpoint's folder.

    Args:
        folder: the folder.
        name: what its name says; its step is that of the weights in it.
        listing: the folder's listing where it is at hand.
    """
    found, listing = Contents(), listing or list_folder(folder)
    if listing.dcp:
        found.units.append(Unit(dcp_set(folder), name, "dcp", None, name.kind, name.rate))
        found.passed += passed_names(listing) + listing.folders
        return found
    if listing.unfinished:
        found.passed.append(f"{folder.name} (an unfinished save: no .metadata)")
        return found
    direct, notes, states = prefer(listing.sets)
    if _is_run(direct, name):
        return found
    trainer = bool(states) or "scheduler.bin" in listing.others
    for item in direct:
        found.units.append(_direct(item, name, "trainer" if trainer else "folder", is_second(item, direct)))
    found.passed += passed_names(listing)
    found.states += states
    found.notes += notes
    hint = "pipeline" if "model_index.json" in listing.others else "trainer" if trainer else "component"
    for sub in listing.folders:
        try:
            _add_component(folder / sub, name, hint, found)
        except BankError as error:  # whether it matters depends on the component
            found.broken.append((parse_component(sub)[0], error))
    if hint == "component" and any(unit.kind == "ema" for unit in found.units):
        found.units = [replace(unit, hint="trainer") if unit.hint == "component" else unit for unit in found.units]
    return found


def _is_run(sets: Sequence[WeightSet], name: Name) -> bool:
    """Whether files say that they are of other steps than their folder: it is a run's, and its name ends in a number.

    One file whose name ends in a number of its own (`flux1`) may be a network's name.
    """
    others = []
    for item in sets:
        own = parse(item.stem)
        number = own.step if own.step is not None else own.epoch
        if number is not None and number not in (name.step, name.epoch) and not is_second(item, sets):
            others.append(own)
    return len(others) > 1 or any(own.marked or not own.base for own in others)


def is_second(item: WeightSet, sets: Sequence[WeightSet]) -> bool:
    """Whether a file is accelerate's second or later model: `model_1` beside `model`."""
    plain = {"model", "pytorch_model"}
    return is_accelerate_model(item.stem) and any(other.stem in plain for other in sets)


def _direct(item: WeightSet, name: Name, hint: str, second: bool) -> Unit:
    own = parse(item.stem)
    if own.step is not None and own.step == name.step and not second:
        component, kind, rate = own.base or None, own.kind, own.rate
    else:
        component, kind, rate = parse_component(item.stem)
    return Unit(item, name, hint, component, kind or name.kind, rate or name.rate)


def _add_component(folder: Path, name: Name, hint: str, found: Contents) -> None:
    """Add the networks of a component's folder."""
    if parse(folder.name).state and hint != "pipeline":
        found.states.append(f"{folder.name}/")
        return
    listing = list_folder(folder)
    component, kind, rate = parse_component(folder.name)
    kind, rate = kind or name.kind, rate or name.rate
    if listing.dcp:
        found.units.append(Unit(dcp_set(folder), name, "dcp", component, kind, rate))
        return
    chosen, notes, states = prefer(listing.sets)
    if not chosen or _is_run(chosen, name):
        found.passed.append(f"{folder.name}/")
        return
    plain = [item for item in chosen if parse_component(item.stem)[0] is None]
    if len(plain) == 1 and len(chosen) > 1:
        found.passed += [f"{folder.name}/{item.label}" for item in chosen if item is not plain[0]]
        chosen = plain
    for item in chosen:
        inner = parse_component(item.stem)
        own = component if len(chosen) == 1 else f"{component or folder.name}/{item.stem}"
        found.units.append(Unit(item, name, hint, own, kind or inner[1], rate or inner[2]))
    others = passed_names(listing) + [f"{name}/" for name in listing.folders]
    found.passed += [f"{folder.name}/{name}" for name in others]
    found.notes += [f"{folder.name}: {note}" for note in notes]
    found.states += [f"{folder.name}/{state}" for state in states]

"""Parts by name: a file in a room is found, configured, listed and tested because it is there.

    @register("sampler", "euler", source="arXiv:2206.00364, Algorithm 1 without the correction")
    @dataclass(frozen=True)
    class Euler: ...

A part is a dataclass; its fields are its configuration. One class may stand under several names, each
with its own preset fields (`register("searcher", "cma", source=..., optimizer="CMA")`).
Packages outside lcsc add parts with entry points in the group `lcsc.<kind>s`, whose value is the module
or the class.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lcsc.core.errors import ConfigError, UnknownPart, did_you_mean

#: kind -> room whose modules are imported to find the kind's parts.
ROOMS: dict[str, str] = {
    "operator": "lcsc.operators",
    "searcher": "lcsc.searchers",
    "model": "lcsc.models",
    "sampler": "lcsc.samplers",
    "metric": "lcsc.metrics",
    "detector": "lcsc.metrics",
    "dataset": "lcsc.datasets",
    "objective": "lcsc.objectives",
    "trainer": "lcsc.training",
    "engine": "lcsc.search.engines",
}

Cls = TypeVar("Cls", bound=type)


@dataclasses.dataclass(frozen=True)
class Part:
    """One registered name: its class, preset fields and where the idea comes from."""

    kind: str
    name: str
    cls: type
    source: str
    preset: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """First line of the class docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0] if self.cls.__doc__ else ""

    def fields(self) -> list[tuple[str, Any, Any]]:
        """`(name, resolved type, default)` of every configurable field, presets applied.

        A field without a default has `dataclasses.MISSING` as default.
        """
        hints = typing.get_type_hints(self.cls)
        rows = []
        for field in dataclasses.fields(self.cls):
            if not field.init or field.metadata.get("internal"):
                continue
            if field.name in self.preset:
                default = self.preset[field.name]
            elif field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            else:
                default = field.default
            rows.append((field.name, hints[field.name], default))
        return rows


_PARTS: dict[str, dict[str, Part]] = {kind: {} for kind in ROOMS}
_DISCOVERED: set[str] = set()


def register(kind: str, name: str, *, source: str, **preset: Any) -> Callable[[Cls], Cls]:
    """Class decorator that files a dataclass as the part `name` of `kind`.

    Raises:
        ConfigError: unknown kind, empty source, not a dataclass, or the name is taken by another class.
    """
    if kind not in ROOMS:
        raise ConfigError(f"no kind of part named `{kind}`.{did_you_mean(kind, ROOMS)}")
    if not source:
        raise ConfigError(f"{kind} `{name}` has no source. Cite the paper, or say `lcsc` if it is ours.")

    def file(cls: Cls) -> Cls:
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"{kind} `{name}` must be a dataclass, got {cls!r}. Put @dataclass below @register.")
        old = _PARTS[kind].get(name)
        if old is not None and old.cls.__qualname__ != cls.__qualname__:
            raise ConfigError(f"{kind} `{name}` is registered twice: {old.cls!r} and {cls!r}. Rename one.")
        _PARTS[kind][name] = Part(kind, name, cls, source, preset)
        return cls

    return file


def discover(kind: str) -> dict[str, Part]:
    """All parts of `kind`, by name; imports the room's modules and the entry points once."""
    if kind not in ROOMS:
        raise ConfigError(f"no kind of part named `{kind}`.{did_you_mean(kind, ROOMS)}")
    if kind not in _DISCOVERED:
        room = importlib.import_module(ROOMS[kind])
        for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
            importlib.import_module(module.name)
        for entry in entry_points(group=f"lcsc.{kind}s"):
            try:
                entry.load()
            except Exception as error:
                raise ConfigError(
                    f"plug-in {kind} `{entry.name}` from `{entry.value}` failed to import: {error}. "
                    "Mend or uninstall the package that provides it."
                ) from error
        _DISCOVERED.add(kind)
    return dict(sorted(_PARTS[kind].items()))


def part(kind: str, name: str) -> Part:
    """The part filed under `name`; raises `UnknownPart` with the nearest name."""
    parts = discover(kind)
    if name not in parts:
        raise UnknownPart(f"no {kind} named `{name}`.{did_you_mean(name, parts)}")
    return parts[name]


def build(kind: str, name: str | Mapping[str, Any], **fields: Any) -> Any:
    """Make the part `name` with `fields` over its presets.

    `name` may also be a mapping with a `name` key, as it stands in a run's configuration.

    Raises:
        UnknownPart: no such part.
        ConfigError: a field the part does not have.
    """
    if isinstance(name, Mapping):
        fields = {**{k: v for k, v in name.items() if k != "name"}, **fields}
        name = str(name["name"])
    found = part(kind, name)
    known = {field.name for field in dataclasses.fields(found.cls) if field.init}
    for key in fields:
        if key not in known:
            raise ConfigError(f"{kind} `{name}` has no field `{key}`.{did_you_mean(key, known)}")
    return found.cls(**{**found.preset, **fields})


def describe(kind: str, obj: Any) -> dict[str, Any]:
    """The plain mapping that `build` makes `obj` of again: its name and fields.

    An object of a class nobody registered goes by its class name; it can be compared, but not built.
    """
    for name, found in discover(kind).items():
        if found.cls is type(obj) and all(getattr(obj, key) == value for key, value in found.preset.items()):
            return {"name": name, **{field: plain(getattr(obj, field)) for field, _, _ in found.fields()}}
    fields = dataclasses.asdict(obj) if dataclasses.is_dataclass(obj) and not isinstance(obj, type) else {}
    return {"name": type(obj).__name__, **plain(fields)}


def plain(value: Any) -> Any:
    """`value` with mappings as dicts and sequences as lists, as JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value

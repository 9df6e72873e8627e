"""The shape of a configuration; every part's own section comes from its dataclass."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lcsc.core import registry
from lcsc.search.budget import Budget


@dataclasses.dataclass
class BankConfig:
    """Where the checkpoints are and which to take; see `lcsc.bank.Selection`."""

    path: str = MISSING
    component: Optional[str] = None  # noqa: UP045 - OmegaConf reads this spelling on every version
    start: Optional[int] = None  # noqa: UP045
    stop: Optional[int] = None  # noqa: UP045
    every: int = 1
    last: Optional[int] = None  # noqa: UP045
    weights: Optional[str] = None  # noqa: UP045
    dtype: str = "float32"
    storage: str = "auto"
    device: str = "auto"


def _budget_config() -> type:
    """Budget as a config section: the same fields, types and defaults, mutable for OmegaConf."""
    hints = typing.get_type_hints(Budget)
    fields: list[Any] = []
    for f in dataclasses.fields(Budget):
        # a mapping that may gain keys from the command line has to be untyped; Budget checks it
        kind = Any if f.default is None else hints[f.name]
        fields.append((f.name, kind, dataclasses.field(default=f.default, default_factory=f.default_factory)))  # type: ignore[call-overload]
    return dataclasses.make_dataclass("BudgetConfig", fields)


BudgetConfig = _budget_config()


@dataclasses.dataclass
class Config:
    """One experiment: how its bank is trained and how it is searched."""

    name: str = MISSING
    seed: int = 0
    runs_dir: str = "runs"
    run_dir: Optional[str] = None  # noqa: UP045
    fork: bool = False
    train_if_missing: bool = False
    quiet: bool = False
    network: Any = None
    trainer: Any = None
    bank: BankConfig = dataclasses.field(default_factory=BankConfig)
    model: Any = None
    dataset: Any = None
    sampler: Any = None
    metric: Any = None
    other_metrics: list[Any] = dataclasses.field(default_factory=list)
    operator: Any = None
    searcher: Any = None
    objective: Any = None
    engine: Any = None
    search: BudgetConfig = dataclasses.field(default_factory=BudgetConfig)  # type: ignore[valid-type]


#: Sections that decide what a search computes; the rest is about where and how loudly it runs.
SEARCH_SECTIONS = (
    *("seed", "bank", "model", "dataset", "sampler", "metric", "other_metrics"),
    *("operator", "searcher", "objective", "search"),
)


def node_of(part: registry.Part) -> type:
    """A dataclass with `name` and the part's fields, for OmegaConf to type-check against."""
    fields: list[Any] = [("name", str, dataclasses.field(default=part.name))]
    for name, kind, default in part.fields():
        if default is dataclasses.MISSING:
            fields.append((name, kind, dataclasses.field(default=MISSING)))
        elif isinstance(default, (list, dict)):
            fields.append((name, kind, dataclasses.field(default_factory=lambda value=default: value)))
        else:
            fields.append((name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(f"{part.cls.__name__}Config", fields)


#: What `store_parts` has filed, by kind and name: a second composition in the process files only what is new.
_STORED: dict[tuple[str, str], registry.Part] = {}


def store_parts() -> None:
    """File the schema and every registered part in Hydra's ConfigStore."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for kind in registry.ROOMS:
        for part in registry.discover(kind).values():
            if _STORED.get((kind, part.name)) != part:
                store.store(group=kind, name=part.name, node=node_of(part))
                _STORED[kind, part.name] = part

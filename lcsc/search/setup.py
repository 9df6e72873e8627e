"""From a plain configuration to the objects of a search. Knows no configuration library."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank, Selection
from lcsc.core import registry
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.objectives.base import Objective
from lcsc.search.loop import Budget, Problem

#: Distributions whose version can change a score.
VERSIONS = ("lcsc", "torch", "numpy", "scipy", "diffusers", "nevergrad", "safetensors")

#: Raised when a search takes other steps than before, so that no older journal is continued.
PROTOCOL = 2

#: Kinds of parts that an objective may hold, in a field of that name; beside them `other_metrics`.
PARTS = ("model", "sampler", "metric", "dataset")


def open_bank(config: Mapping[str, Any]) -> CheckpointBank:
    """The bank of a configuration's `bank` section."""
    bank = config["bank"]
    select = Selection(bank["start"], bank["stop"], bank["every"], bank["last"])
    how = {key: bank[key] for key in ("component", "weights", "dtype", "storage", "device")}
    return CheckpointBank.open(Path(bank["path"]), select=select, **how)


def build_objective(config: Mapping[str, Any]) -> Objective:
    """The objective of a configuration, with those of `PARTS` that it has an internal field for.

    The others are not even built, so what an objective does not use need not fit it.
    """
    cls = registry.part("objective", str(config["objective"]["name"])).cls
    wanted = {f.name for f in dataclasses.fields(cls) if f.init and f.metadata.get("internal")}
    parts: dict[str, Any] = {kind: registry.build(kind, config[kind]) for kind in PARTS if kind in wanted}
    if "other_metrics" in wanted:
        parts["other_metrics"] = tuple(registry.build("metric", other) for other in config["other_metrics"])
    return registry.build("objective", config["objective"], **parts)  # type: ignore[no-any-return]


def build_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a search but its bank: the arguments of `Problem`, checked.

    Raises:
        LcscError: a part or a setting is not as it should be.
    """
    SeedRange(config["seed"], Purpose.SEARCH)  # refuses a bad seed before anything is done with it
    return {
        "operator": registry.build("operator", config["operator"]),
        "searcher": registry.build("searcher", config["searcher"]),
        "budget": Budget(**config["search"]),
        "objective": build_objective(config),
        "seed": config["seed"],
    }


def build_problem(config: Mapping[str, Any]) -> Problem:
    """Everything a search needs.

    Args:
        config: plain values with the sections bank, operator, searcher, objective, model, sampler, metric,
            other_metrics, dataset, search and seed.

    Raises:
        LcscError: a part, a setting or a checkpoint is not as it should be.
    """
    return Problem(bank=open_bank(config), **build_parts(config))


def describe_problem(problem: Problem) -> dict[str, Any]:
    """The plain configuration that `build_problem` makes `problem` of again; a run is found by it."""
    objective = problem.objective
    kinds = [kind for kind in PARTS if hasattr(objective, kind)]
    return {
        "seed": problem.seed,
        "bank": problem.bank.config,
        **{kind: registry.describe(kind, getattr(objective, kind)) for kind in kinds},
        "other_metrics": [registry.describe("metric", other) for other in getattr(objective, "other_metrics", ())],
        "operator": registry.describe("operator", problem.operator),
        "searcher": registry.describe("searcher", problem.searcher),
        "objective": registry.describe("objective", objective),
        "search": dataclasses.asdict(problem.budget),
    }


def fingerprints(problem: Problem) -> dict[str, Any]:
    """What must agree for two searches to be the same: bank contents, evaluator and library versions."""
    versions: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    prints = {"bank": problem.bank.digest, "evaluator": problem.objective.circumstances(), "versions": versions}
    return {**prints, "protocol": PROTOCOL}

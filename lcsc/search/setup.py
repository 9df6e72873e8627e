"""From a plain configuration to the objects of a search. Knows no configuration library."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.shard_index import shown
from lcsc.core import registry
from lcsc.core.errors import ConfigError
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Choices, SearchSpace
from lcsc.objectives.base import Objective, joint_space
from lcsc.operators.base import ReadsMore
from lcsc.search.budget import Budget, check_budget
from lcsc.search.problem import Problem, task_of

#: Distributions whose version can change a score.
VERSIONS = ("lcsc", "torch", "numpy", "scipy", "diffusers", "nevergrad", "safetensors")

#: Raised when a search takes other steps than before, so that no older journal is continued.
PROTOCOL = 2

#: Kinds of parts that an objective may hold, in a field of that name; beside them `other_metrics`.
PARTS = ("model", "sampler", "metric", "dataset")

#: Objectives that run what a setting of theirs names, and that setting.
RUNNERS = {"command": "command", "function": "function"}


def open_bank(config: Mapping[str, Any]) -> CheckpointBank:
    """The bank of a configuration's `bank` section."""
    bank = config["bank"]
    select = Selection(bank["start"], bank["stop"], bank["every"], bank["last"])
    how = {key: bank[key] for key in ("component", "weights", "dtype", "storage", "device")}
    return CheckpointBank.open(Path(bank["path"]), select=select, **how)


def parts_of(objective: str) -> set[str]:
    """The sections of a configuration, beside its own, that an objective of that name is made of."""
    cls = registry.part("objective", objective).cls
    return {f.name for f in dataclasses.fields(cls) if f.init and f.metadata.get("internal")}


def build_objective(config: Mapping[str, Any]) -> Objective:
    """The objective of a configuration, with those of `PARTS` that it has an internal field for.

    The others are not even built, so what an objective does not use need not fit it.
    """
    wanted = parts_of(str(config["objective"]["name"]))
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


def check_before_training(parts: Mapping[str, Any]) -> None:
    """Raise what a search would raise later, when its checkpoints are there, as far as it does not depend on them.

    The searcher is started on two coordinates in place of the unknown ones, so that one which needs a derivative that
    the objective does not have, or an optimizer that nobody knows, costs no training.

    Args:
        parts: what `build_parts` made.

    Raises:
        ConfigError: objective, budget and searcher do not fit one another.
    """
    objective, budget = parts["objective"], parts["budget"]
    check_budget(objective, parts["operator"], budget)
    unknown = Box("unknown", 2, choices=Choices((0.0, 1.0), (1, 2), 4))
    space = joint_space(SearchSpace((unknown,)), objective)
    parts["searcher"].start(task_of(objective, parts["operator"], budget, space, parts["seed"]))


def build_problem(config: Mapping[str, Any], *, trust: bool = False) -> Problem:
    """Everything a search needs.

    Args:
        config: plain values with the sections bank, operator, searcher, objective, model, sampler, metric,
            other_metrics, dataset, search and seed.
        trust: whether code that the configuration names may run: a command, a function, a part that is not lcsc's own.
            A run.json names whatever its writer liked.

    Raises:
        LcscError: a part, a setting or a checkpoint is not as it should be, or names code and is not trusted.
    """
    if not trust:
        refuse_code(config)
    return Problem(bank=open_bank(config), **build_parts(config))


def refuse_code(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where a configuration names code that is not lcsc's own; nothing of it is run or imported."""
    objective = config["objective"]
    field = RUNNERS.get(str(objective["name"]))
    named = f"the {field} `{shown(objective.get(field), 2000)}`" if field else None
    for kind, name in _named_parts(config):
        cls = registry.part(kind, name).cls
        if named is None and cls.__module__.partition(".")[0] != "lcsc":
            named = f"{kind} `{shown(name)}` of the package `{cls.__module__}`"
    if named:
        raise ConfigError(
            f"the configuration asks to run {named}, and nothing that a run's files name is run unasked. If you trust "
            "it, add `trust=true` (in Python: `trust=True`)."
        )


def _named_parts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and name of all parts of a search that a configuration names."""
    kinds = [kind for kind in ("operator", "searcher", "objective", *PARTS) if config.get(kind) is not None]
    rows = [(kind, config[kind]) for kind in kinds] + [("metric", other) for other in config.get("other_metrics") or ()]
    named = [(kind, str(section["name"])) for kind, section in rows]
    return named + [("detector", str(row["detector"])) for kind, row in rows if kind == "metric" and "detector" in row]


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
    """What must agree for two searches to be the same: contents of what is read, evaluator and library versions."""
    versions: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    prints = {"bank": problem.bank.digest, "evaluator": problem.objective.circumstances(), "versions": versions}
    operator = problem.operator
    others = dict(operator.other_checkpoints(problem.bank)) if isinstance(operator, ReadsMore) else {}
    return {**prints, **({"others": others} if others else {}), "protocol": PROTOCOL}

"""Models that an operator made of one checkpoint, made again and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import read_source
from lcsc.bank.shard_index import shown
from lcsc.core import registry
from lcsc.core.errors import BankError, ConfigError, LcscError
from lcsc.export.exported import Exported, check_metadata, check_parents, check_tensors, difference
from lcsc.export.transform import bits_of, planned_model, remade
from lcsc.models.network import saved_config
from lcsc.operators.surgery import Plan, Transforms, candidate


def compare_remade(bank: CheckpointBank, model: Exported) -> None:
    """Carry the recipe's plan out again, and compare recipe, configuration and every tensor.

    Args:
        bank: opened with the recipe's steps alone.
        model: its recipe is sound.

    Raises:
        BankError: the first difference.
        ConfigError: the operator is not lcsc's own, or makes nothing of one checkpoint.
    """
    check_parents(bank, model)  # first, because a changed parent explains all else
    _refuse_foreign(model)
    try:
        operator = registry.build("operator", {**model.recipe["settings"], "name": model.recipe["operator"]})
        plan = operator.plan(bank, model.recipe["point"] or None)
    except (LcscError, KeyError, TypeError, ValueError, IndexError) as error:
        raise BankError(f"the recipe of `{model.folder}` cannot be carried out again: {error}") from error
    _check_others(model, plan)
    _check_recipe(model, plan.recipe)
    facts: list[dict[str, Any]] = []
    same = model.recipe.get("dtype") == "same"
    kinds, tensors = (_streamed if same else _in_memory)(bank, plan, model, facts)
    ties = plan.ties(bank)
    twins = {name: twin for name, twin in ties.items() if name not in model.sources}
    check_tensors(model, kinds, ties)
    check_metadata(model, twins)
    for name, tensor in tensors:
        wanted = bits_of(tensor).tobytes()
        for twin in (name, *(t for t, of in ties.items() if of == name)):
            if twin in model.sources and wanted != read_source(model.files, model.sources[twin]).tobytes():
                raise BankError(difference(model, twin))
    _check_recipe(model, {"pieces": facts})


def _refuse_foreign(model: Exported) -> None:
    """Raise ConfigError for an operator of a package that a stranger's file names, or one that plans nothing."""
    settings = model.recipe["settings"]
    cls = registry.part("operator", str(settings["name"])).cls
    if cls.__module__.partition(".")[0] != "lcsc" or not issubclass(cls, Transforms):
        raise ConfigError(
            f"`{model.folder}` was made by the operator `{shown(settings['name'])}` of `{cls.__module__}`, which is "
            "not made again here; operators of lcsc that make a model of one checkpoint are."
        )


Made = tuple[Mapping[str, tuple[str, tuple[int, ...]]], Iterator[tuple[str, Tensor]]]


def _streamed(bank: CheckpointBank, plan: Plan, model: Exported, facts: list[dict[str, Any]]) -> Made:
    """As `lcsc transform` made it: kinds by name, and tensors one piece at a time."""
    wanted = planned_model(bank, plan)
    if sha256(wanted.config or b"").hexdigest() != model.recipe.get("config_sha256"):
        raise BankError(f"config.json of `{model.folder}` is not what the recipe gives. Make the model again.")
    kinds = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in wanted.specs}
    return kinds, remade(bank, plan, wanted, facts)


def _in_memory(bank: CheckpointBank, plan: Plan, model: Exported, facts: list[dict[str, Any]]) -> Made:
    """As a search exported it: float32, whole."""
    made = candidate(plan, bank)
    assert made.arch is not None
    config = model.folder / "config.json"
    text = json.dumps(saved_config(made.arch)[1], indent=2) + "\n"
    if not config.is_file() or config.read_text(encoding="utf-8") != text:
        raise BankError(f"`{config}` is not what the recipe gives. Restore it, or export the model again.")
    facts += made.recipe["pieces"]
    weights = made.weights()
    kinds = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in weights.items()}
    return kinds, iter(weights.items())


def _check_others(model: Exported, plan: Plan) -> None:
    """Raise BankError where a further checkpoint that the model was made of is another one by now."""
    recorded = model.recipe.get("sources")
    for tag, (other, row) in plan.others.items():
        was = recorded.get(tag) if isinstance(recorded, dict) else None
        if isinstance(was, dict) and was.get("content") != other.parent(row)["content"]:
            raise BankError(
                f"the checkpoint of step {other.steps[row]}, `{other.rows[row].path}`, changed since `{model.folder}` "
                "was made of it. Restore it, or make the model again."
            )


def _check_recipe(model: Exported, wanted: Mapping[str, Any]) -> None:
    """What the operator says of its model is what the recipe says."""
    for key, value in wanted.items():
        if model.recipe.get(key) != registry.plain(value):
            raise BankError(
                f"the recipe of `{model.folder}` says `{key}` {shown(model.recipe.get(key))}, but its settings give "
                f"{shown(value)}. It was edited; make the model again."
            )

"""A candidate as a folder of files, proven by loading it back and scoring it again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.bank import CheckpointBank
from lcsc.bank.lora_modules import copied_at
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.files import new_directory, writing
from lcsc.core.seeds import Purpose
from lcsc.core.space import Point
from lcsc.export.card import model_card
from lcsc.export.folder import bank_config
from lcsc.export.lora import write_candidate
from lcsc.export.transform import transform_model
from lcsc.export.weights import read_weights, write_weights
from lcsc.models.flat import distinct_tensors
from lcsc.models.network import NETWORKS, load_network
from lcsc.objectives.base import Objective
from lcsc.operators.base import Candidate, Operator
from lcsc.operators.surgery import Transforms, told
from lcsc.recycling.experts import as_in_files
from lcsc.samplers.times import Retimed

#: Largest relative difference between the artefact's score and the run's. On the machine of the search they are equal
#: to the last bit; other processors and thread counts sum in another order.
TOLERANCE = 1e-4
#: what adapters, which have no other, are asked for as
FORMAT, MAX_SHARD_SIZE = "diffusers", "5GB"


def export_model(
    *,
    bank: CheckpointBank,
    operator: Operator,
    objective: Objective,
    seed: int,
    point: Point,
    expected: Mapping[str, Any],
    info: Mapping[str, Any],
    report: Mapping[str, Any],
    to: Path,
    format: str = FORMAT,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> float:
    """Write the candidate at `point` to the new folder `to`: weights with their recipe, config.json and a model card.

    Adapters are written as the library that wrote the checkpoints keeps them.

    The folder is loaded back and scored on the report seeds before it gets its name.

    Args:
        expected: the run's report record of this candidate (`value`, `num_images`).
        info: run.json.
        report: the `report` section of the summary.

    Returns:
        The score of the folder that was written.

    Raises:
        OutputExistsError: `to` exists.
        ConfigError: no such format or size, or one of these for an adapter.
        EvaluationError: what was loaded back is not what was scored; nothing is left behind.
    """
    with bank.on_cpu():  # not every GPU gives the bits that `lcsc verify` will make
        candidate = operator.apply(bank, point)
        weights = candidate.weights()
    if candidate.adapter is not None:
        _check_plain(format, max_shard_size)
    levels = searched_levels(objective)
    recipe = {
        **candidate.recipe,
        **_plan_again(bank, operator, point),
        **_origin(bank, candidate.recipe),
        "arch": candidate.arch,
        "run_id": info["run_id"],
        "evaluator": {**info["fingerprints"]["evaluator"], **({"levels": levels} if levels else {})},
        "score": {key: expected[key] for key in ("value", "se", "num_images")},
    }
    with writing(to), new_directory(to) as folder:
        if candidate.adapter is None:
            write_weights(weights, candidate.arch, recipe, folder, format=format, max_shard_size=max_shard_size)
        else:
            write_candidate(folder, bank, recipe)
        loaded = _load_back(folder, to, candidate, weights, format)
        value = _score_again(_candidate_of(candidate, loaded), objective, seed, expected)
        same = "exactly the run's" if value == expected["value"] else f"{value - expected['value']:+.2g} from the run's"
        sentence = f"Loaded back from these files it scores {value:.6g}, {same}."
        text = model_card(info, recipe, report, sentence, candidate.adapter and candidate.adapter.library)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return value


def export_in_dtypes(
    *,
    bank: CheckpointBank,
    operator: Operator,
    objective: Objective,
    seed: int,
    point: Point,
    expected: Mapping[str, Any],
    info: Mapping[str, Any],
    to: Path,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> float:
    """Write a model that an operator made of one checkpoint, every tensor in the checkpoint's dtype, layer by layer.

    The search scored it with float32 weights, so the folder may score a little differently; nothing is refused for it.

    Args:
        bank, operator, objective, seed, point, expected, info, to, max_shard_size: as for `export_model`.

    Returns:
        The score of the folder that was written.

    Raises:
        ConfigError: the operator combines checkpoints.
        OutputExistsError: `to` exists.
        EvaluationError: the folder cannot be scored.
    """
    if not isinstance(operator, Transforms):
        raise ConfigError(
            "`dtype` is `same`, but the winner combines checkpoints, which is scored and exported as float32. "
            "Leave `dtype` out, or write the coefficients with `lcsc combine ... dtype=same`."
        )
    own = _own(bank, operator, point)
    score = {key: expected[key] for key in ("value", "se", "num_images")}
    said = {"run_id": info["run_id"], "evaluator": info["fingerprints"]["evaluator"], "score": score}
    command = f"lcsc export run=... to={to.name} dtype=same"
    transform_model(bank, operator, to, point=own, said=said, max_shard_size=max_shard_size, command=command)
    with bank.on_cpu():
        candidate = operator.apply(bank, point)
        loaded = _named_as(candidate.weights(), load_network(to))
    again = _candidate_of(candidate, loaded)
    return objective(again, seed=seed, purpose=Purpose.REPORT, images=range(expected["num_images"])).value


def _check_plain(format: str, max_shard_size: str) -> None:
    """Raise ConfigError where an adapter is asked for in another form than its own."""
    if (format, max_shard_size) != (FORMAT, MAX_SHARD_SIZE):
        raise ConfigError(
            f"`format` is `{format}` and `max_shard_size` is `{max_shard_size}`, but an adapter is one file in the "
            "format of the library that wrote the checkpoints. Leave both out."
        )


def _own(bank: CheckpointBank, operator: Operator, point: Point) -> Point:
    """A point without the objective's own boxes."""
    return {box.name: point[box.name] for box in operator.space(bank).boxes}


def _plan_again(bank: CheckpointBank, operator: Operator, point: Point) -> dict[str, Any]:
    """What the recipe of a model says that is no combination of checkpoints, so that it can be made again."""
    if not isinstance(operator, Transforms):
        return {}
    own = _own(bank, operator, point)
    return told(operator, own, operator.plan(bank, own))


def _origin(bank: CheckpointBank, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoints that a recipe is about."""
    parents = [dict(parent) for parent in bank.parents if parent["step"] in recipe["steps"]]
    copied = {"copied": said} if (said := copied_at(bank, recipe.get("rank"))) else {}
    return {"bank": bank_config(bank), "parents": parents, **copied, "lcsc_version": importlib.metadata.version("lcsc")}


def searched_levels(objective: Objective) -> dict[str, list[float]]:
    """The noise levels that were searched with the weights, by number of network calls; part of what was scored.

    Args:
        objective: at the point whose levels are wanted (`lcsc.objectives.base.tuned`).

    Returns:
        Falling levels by NFE, as text; empty where the samplers run on their own.
    """
    members = getattr(objective, "members", (objective,))
    samplers = [getattr(member, "sampler", None) for member in members]
    return {str(sampler.nfe()): sampler.levels() for sampler in samplers if isinstance(sampler, Retimed)}


def _score_again(candidate: Candidate, objective: Objective, seed: int, expected: Mapping[str, Any]) -> float:
    """The score of what was loaded back; raises EvaluationError when it is not the run's."""
    value = objective(candidate, seed=seed, purpose=Purpose.REPORT, images=range(expected["num_images"])).value
    if abs(value - expected["value"]) > TOLERANCE * abs(expected["value"]):
        raise EvaluationError(
            f"the exported model scores {value}, the run reported {expected['value']}. "
            "The bank, a library or the machine changed since the search; nothing was kept."
        )
    return value


def _load_back(
    folder: Path, to: Path, candidate: Candidate, weights: Mapping[str, Tensor], format: str
) -> dict[str, Tensor]:
    """The folder's tensors, by the library its users load it with where the class is one of `NETWORKS`.

    Raises:
        EvaluationError: they are not `weights`.
    """
    network = candidate.arch is not None and candidate.arch["class"] in NETWORKS and format == "diffusers"
    loaded = _named_as(weights, load_network(folder)) if network else read_weights(folder)
    if wrong := sorted(set(loaded) ^ set(weights)) or [n for n in weights if not torch.equal(loaded[n], weights[n])]:
        raise EvaluationError(
            f"`{to}` does not load back as it was written: {wrong[:10]}. Check the disk; nothing was kept."
        )
    return loaded


def _named_as(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as `weights` calls them; of those that it ties and `weights` has once, that one."""
    twins = {name for _, names in distinct_tensors(net) if set(names) & set(weights) for name in names}
    tensors = as_in_files(type(net).__name__, net.state_dict(), weights)
    return {name: tensor for name, tensor in tensors.items() if name in weights or name not in twins}


def _candidate_of(candidate: Candidate, tensors: Mapping[str, Tensor]) -> Candidate:
    """A candidate with the given tensors in place of its own."""

    def write(theta_P: Tensor) -> None:
        candidate.layout.flatten(tensors, theta_P)

    return dataclasses.replace(candidate, write=write)

"""A lost pipeline stage rebuilt from its neighbours: CheckFree. N = lost stages, P = flat parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.lora import refuse_lora
from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import plain, register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, Plan, candidate, refuse_ties, row_of
from lcsc.recycling.rebuild import RULES, LostLayer, Mix, lost_layers, mix_by_rule
from lcsc.recycling.stages import NORMS, Stages, find_stages, neighbours, norm_weights, stage_norms

#: rules that weigh by gradients
WEIGHED = ("checkfree", "checkfree_plus")


@register("operator", "neighbor_recovery", source="arXiv:2506.15461 (CheckFree, CheckFree+)")
@dataclass(frozen=True)
class NeighborRecovery:
    """Rebuilds lost stages of a language model from the stages beside them; what is left null is searched.

    Without a search, null `rule` is `checkfree_plus` where norms of gradients are known and `average` where not. What
    the lost layers hold is not read: they may be full of NaN, or missing. Embedding and head are kept; in a pipeline
    the stages beside them hold copies of both.

    Args:
        lost: the lost stage, counted from 0, or a list of stages; their neighbours must not be lost.
        num_stages: equal stages that the layers are cut into; null takes one layer for each.
        rule: `average` (equal weights), `checkfree` (weights by `grad_norms`; inner stages only), `checkfree_plus` (the
            same, and the first and last stage copy their neighbour), `copy_previous`, `copy_next`, `skip` (a mean whose
            outputs are zero, so that the stage does nothing) or `random` (a new stage).
        weights: of the previous and the next stage instead of a rule's, or a list of such pairs, one a lost stage.
        scale: of the matrices that write into the residual stream.
        grad_norms: norms of the gradients of all stages, or a JSON file with a list, or with it under `grad_norms`, or
            with those of all layers under `layers`. Null takes what the trainer wrote beside the checkpoint
            (`trainer.gradient_norms=true`), if it did.
        norm_power: power of the norms in the weights: 1 as the authors' code has it, 2 squares them.
        lr_factor: factor of the learning rate for the rebuilt stages, which the recipe tells whoever trains on.
        step: training step of the checkpoint; null is the last.
        seed: of new stages.
    """

    lost: Any
    num_stages: int | None = None
    rule: str | None = None
    weights: Any = None
    scale: float | None = None
    grad_norms: Any = None
    norm_power: float = 1.0
    lr_factor: float = 1.1
    step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        listed = isinstance(self.lost, Sequence) and not isinstance(self.lost, str)
        stages = list(self.lost) if listed else [self.lost]
        if not stages or not all(type(s) is int and s >= 0 for s in stages) or len(set(stages)) < len(stages):
            raise ConfigError(f"`operator.lost` is `{self.lost}`; give a stage, counted from 0, or a list of them.")
        self.__dict__["lost"] = tuple(sorted(stages))
        if self.rule is not None and self.rule not in RULES:
            raise ConfigError(f"`operator.rule` is `{self.rule}`.{did_you_mean(str(self.rule), RULES)}")
        if self.rule is not None and self.weights is not None:
            raise ConfigError(f"`operator.rule` is `{self.rule}`, which has weights of its own. Leave `weights` out.")
        if self.rule == "skip" and self.scale is not None:
            raise ConfigError(f"`operator.scale` is {self.scale}, and `skip` scales by 0. Leave one of the two out.")
        if not all(np.isfinite(x) for x in (self.scale or 0.0, self.lr_factor)) or self.lr_factor <= 0:
            raise ConfigError(
                f"`operator.scale` and `lr_factor` are {self.scale} and {self.lr_factor}; they must be finite, the "
                "factor above 0."
            )
        norm_weights([1.0], self.norm_power)  # checks it
        _ = SeedRange(self.seed, Purpose.TRAIN)  # checks it

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Weights of the neighbours and share of a fresh stage, where no rule is set; scale, where none is set."""
        stages = self._stages(bank)
        N, num = len(self.lost), sum(len(neighbours(s, stages.num_stages)) for s in self.lost)
        boxes = []
        if self.rule is None and self.weights is None:
            boxes.append(Box("weights", num, -0.5, 1.5, scale=0.25))
        if self.scale is None and self.rule != "skip":
            boxes.append(Box("scale", N, 0.0, 1.5, scale=0.25))
        if self.rule is None and self.weights is None:
            boxes.append(Box("random", N, 0.0, 1.0, scale=0.1))
        return SearchSpace(tuple(boxes))

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Every rule that can be followed and is not excluded."""
        stages, space = self._stages(bank), self.space(bank)
        free, norms = self.rule is None and self.weights is None, self._norms(bank, stages)
        rows = []
        for rule in RULES if free else (self.rule,):
            if free and rule in WEIGHED and norms is None:
                continue
            if free and rule == "skip" and self.scale is not None:
                continue
            try:
                mixes = self._ruled(stages, rule or self._rule(norms), norms)
            except ConfigError:
                if not free:
                    raise
                continue  # a copy of the stage before the first, say
            values = {
                "weights": [w for mix in mixes for w in mix.weights],
                "scale": [mix.scale for mix in mixes],
                "random": [mix.random for mix in mixes],
            }
            point = {box.name: np.asarray(values[box.name], np.float64) for box in space.boxes}
            rows.append(Baseline(rule or "weights", rule or "weights as set", point))
        return rows

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The model with its lost stages rebuilt."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """How it is made; see `lcsc.operators.surgery`. A layer is made of the same layers of its neighbours."""
        stages, arch, row = self._stages(bank), need_arch(bank), row_of(bank, self.step)
        norms = self._norms(bank, stages)
        mixes = self._mixes(stages, point, norms)
        jobs = self._layers(stages, bank, mixes)
        refuse_ties(bank, {name for job in jobs for name in job.reads + tuple(job.names.values())})
        recipe = {
            "operator": "neighbor_recovery",
            "steps": [bank.steps[row]],
            "lost": list(self.lost),
            "num_stages": stages.num_stages,
            "rule": "searched" if "weights" in (point or {}) else self._rule(norms),
            "weights": [list(mix.weights) for mix in mixes],
            "scale": [mix.scale for mix in mixes],
            "random": [mix.random for mix in mixes],
            "grad_norms": norms,
            "norm_power": self.norm_power,
            "seed": self.seed,
            "train_on": {"fresh_optimizer_for_layers": [job.layer for job in jobs], "lr_factor": self.lr_factor},
            "point": plain({name: np.asarray(x).tolist() for name, x in (point or {}).items()}),
        }
        return Plan(row, arch, _pieces(jobs), recipe, settled=replace(self, grad_norms=norms))

    def pull_back(self, bank: CheckpointBank, point: Point, grad_P: Tensor) -> dict[str, np.ndarray]:
        """Inner products of the derivative with what each number multiplies."""
        stages, plan = self._stages(bank), self.plan(bank, point)
        own = {entry.name: entry.shape for entry in bank.layout.entries}
        grads = Layout.of(plan.shapes(own), bank.layout.ties).views(grad_P.cpu())
        kept, mixes = candidate(plan, bank).weights(), self._mixes(stages, point, self._norms(bank, stages))
        slopes = {"weights": [0.0] * sum(len(mix.weights) for mix in mixes)}
        slopes |= {name: [0.0] * len(self.lost) for name in ("scale", "random")}
        for job in self._layers(stages, bank, mixes):
            sources, scale = job.slopes(kept, grads, with_fresh="random" in point)
            slopes["scale"][job.place] += scale
            for k, slope in enumerate(sources[: len(job.mix.weights)]):
                slopes["weights"][job.first + k] += slope
            slopes["random"][job.place] += sum(sources[len(job.mix.weights) :])
        return {name: np.asarray(slopes[name]) for name in point}

    def other_checkpoints(self, bank: CheckpointBank) -> dict[str, str]:
        """See `lcsc.operators.base.ReadsMore`: of norms that lie in a file."""
        norms = self._norms(bank, self._stages(bank))
        told = norms is None or (self.grad_norms is not None and not isinstance(self.grad_norms, str))
        return {} if told else {"norms of gradients": value_digest(norms)}

    # ------------------------------------------------------------------------------------------------- details

    def _rule(self, norms: Sequence[float] | None) -> str:
        if self.weights is not None:
            return "weights"
        return self.rule or ("average" if norms is None else "checkfree_plus")

    def _stages(self, bank: CheckpointBank) -> Stages:
        """The model's stages; raises ConfigError for lost ones that it does not have, or that lack a neighbour."""
        names = list(bank.layout.shapes)
        refuse_lora(bank.layout.shapes, bank.path)
        stages = find_stages(need_arch(bank), names, bank.path, self.num_stages, self.lost)
        if self.lost[-1] >= stages.num_stages:
            raise ConfigError(
                f"`operator.lost` is {self.lost[-1]}, and the model has stages 0 to {stages.num_stages - 1}. Choose "
                "one, or set `operator.num_stages`."
            )
        for first, second in zip(self.lost, self.lost[1:], strict=False):
            if second == first + 1:
                raise ConfigError(
                    f"`operator.lost` has the neighbours {first} and {second}; a stage is rebuilt from living ones. "
                    "Take a checkpoint, or fewer and longer stages."
                )
        return stages

    def _norms(self, bank: CheckpointBank, stages: Stages) -> list[float] | None:
        """The norms of all stages, from the settings, a file, or what lies beside the checkpoint; None for none."""
        given, said, S = self.grad_norms, "`operator.grad_norms`", stages.num_stages
        if given is None:
            beside = bank.rows[row_of(bank, self.step)].files[0].parent / NORMS
            if beside.is_file():
                given = str(beside)
            elif self.rule in WEIGHED:
                raise ConfigError(
                    f"`operator.rule` is `{self.rule}`, which weighs by gradients, and `operator.grad_norms` is not "
                    f"set and no `{NORMS}` lies beside the checkpoint. Give the norms of all stages, train with "
                    "`trainer.gradient_norms=true`, or take `rule=average`."
                )
            else:
                return None
        if isinstance(given, str):
            said = f"{said} `{given}`"
            given = _read(given, said, len(stages.layers), S)
        if not _numbers(given, S):
            raise ConfigError(f"{said} must be a list of {S} numbers, one for each stage.")
        norm_weights(given)  # checks them
        return [float(x) for x in given]

    def _mixes(self, stages: Stages, point: Point | None, norms: Sequence[float] | None) -> list[Mix]:
        """What each lost stage is made of at a point, or as set."""
        mixes = self._ruled(stages, self._rule(norms), norms)
        if point is None:
            return mixes
        made, start = [], 0
        for n, mix in enumerate(mixes):
            stop = start + len(mix.weights)
            made.append(
                Mix(
                    tuple(map(float, point["weights"][start:stop])) if "weights" in point else mix.weights,
                    float(point["random"][n]) if "random" in point else mix.random,
                    float(point["scale"][n]) if "scale" in point else mix.scale,
                )
            )
            start = stop
        return made

    def _ruled(self, stages: Stages, rule: str, norms: Sequence[float] | None) -> list[Mix]:
        """What a rule, or the setting `weights` for `weights`, makes each lost stage of."""
        scale = 1.0 if self.scale is None else self.scale
        mixes = []
        for n, lost in enumerate(self.lost):
            if rule == "weights":
                mix = Mix(self._pair(n, lost, neighbours(lost, stages.num_stages)))
            else:
                mix = mix_by_rule(rule, lost, stages.num_stages, norms, self.norm_power)
            mixes.append(mix if rule == "skip" else replace(mix, scale=scale))
        return mixes

    def _pair(self, n: int, lost: int, beside: Sequence[int]) -> tuple[float, ...]:
        """The weights that are set for one lost stage."""
        given = self.weights
        nested = isinstance(given, Sequence) and bool(given) and isinstance(given[0], Sequence)
        if nested and len(given) == len(self.lost):
            given = given[n]
        fits = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
        if not fits or not all(isinstance(w, int | float) and np.isfinite(w) for w in given):
            raise ConfigError(
                f"`operator.weights` is `{self.weights}`; give [previous, next], or a list of such pairs, one a "
                "lost stage."
            )
        if unused := [s for s, w in zip((lost - 1, lost + 1), given, strict=True) if w and s not in beside]:
            raise ConfigError(f"`operator.weights` weighs stage {unused[0]}, which stage {lost} does not have; give 0.")
        return tuple(float(w) for s, w in zip((lost - 1, lost + 1), given, strict=True) if s in beside)

    def _layers(self, stages: Stages, bank: CheckpointBank, mixes: Sequence[Mix]) -> list[LostLayer]:
        """Every lost layer."""
        std = float(need_arch(bank)["config"].get("initializer_range") or 0.02)
        return list(lost_layers(stages, self.lost, mixes, bank.layout.shapes, std, self.seed))


def _numbers(given: Any, num: int) -> bool:
    """Whether it is a list of so many numbers."""
    fits = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == num
    return fits and all(isinstance(x, int | float) and not isinstance(x, bool) for x in given)


def _read(path: str, said: str, num_layers: int, num_stages: int) -> Any:
    """What a file says of the norms: a list, one under `grad_norms`, or that of the stages by one under `layers`."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{said} cannot be read as JSON: {error}. Give a file with a list.") from error
    if not isinstance(given, Mapping):
        return given
    if "layers" not in given:
        return given.get("grad_norms")
    layers = given["layers"]
    if not _numbers(layers, num_layers):
        raise ConfigError(f"{said} must have a list of {num_layers} numbers under `layers`, one for each layer.")
    norm_weights(layers)  # checks them
    return stage_norms(layers, num_stages)


def _pieces(jobs: Sequence[LostLayer]) -> tuple[Piece, ...]:
    """One for each layer of a stage: lost stages may share a neighbour, and no tensor is in two pieces.

    Neighbours are written as they were read; lost layers are not read.
    """
    return tuple(_piece([job for job in jobs if job.t == t]) for t in sorted({job.t for job in jobs}))


def _piece(jobs: Sequence[LostLayer]) -> Piece:
    reads = tuple(dict.fromkeys(name for job in jobs for name in job.reads))
    writes = {
        layer[role]: job.shapes[role] for job in jobs for layer in (*job.beside, job.names) for role in job.shapes
    }

    def make(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        made = {name: tensors[name] for name in reads}
        for job in jobs:
            made |= job.rebuilt(tensors)
        return made, facts

    facts = {"layers": [job.layer for job in jobs]}
    return Piece(reads, writes, make, facts)

"""The state of an optimizer carried over to a model whose tensors are copies of another's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.operators.surgery import Plan

State = Mapping[str, Any]


def carry_moments(plan: Plan, states: Mapping[str, State]) -> dict[str, dict[str, Any]]:
    """The states of the new model's parameters; a parameter that is new, such as a router's, gets none.

    Every expert gets the moments of the block it is a copy of (of its slice), as vision models are upcycled in
    arXiv:2212.05055; language models begin with a new optimizer there.

    Args:
        plan: of an operator that copies, such as `sparse_upcycling` without noise and dropped units.
        states: of the old parameters by their names in files, as `torch.optim` keeps them: tensors of the parameter's
            shape (`exp_avg`, `exp_avg_sq`), and anything else (`step`), which is kept as it is.

    Raises:
        ConfigError: a plan that does more than copy, or a state that is missing.
    """
    odd = {key: plan.recipe.get(key) for key in ("noise", "drop") if plan.recipe.get(key)}
    if plan.recipe.get("operator") != "sparse_upcycling" or odd or plan.recipe.get("scale") != 1:
        raise ConfigError(
            f"the moments of an optimizer are carried to copies alone, and this plan has {odd or 'other tensors'}. "
            "Begin with a new optimizer."
        )
    if missing := sorted({name for piece in plan.pieces for name in piece.reads} - set(states)):
        raise ConfigError(f"the optimizer has no state of `{missing[0]}`. Give those of all parameters by their names.")
    made: dict[str, dict[str, Any]] = {
        name: copy.deepcopy(dict(state)) for name, state in states.items() if name not in plan.gone
    }
    for piece in plan.pieces:
        first = states[piece.reads[0]]
        kinds = [key for key, value in first.items() if isinstance(value, Tensor) and value.ndim]
        others = {key: value for key, value in first.items() if key not in kinds}
        shapes = {name: states[name][kinds[0]].shape for name in piece.reads} if kinds else {}
        ones, _ = piece.make({name: torch.ones(shape) for name, shape in shapes.items()})
        copies = [name for name, tensor in ones.items() if bool((tensor == 1).all())]  # the others are new
        for name in copies:
            made[name] = copy.deepcopy(others)  # torch counts steps in place
        for kind in kinds:
            tensors, _ = piece.make({name: states[name][kind] for name in piece.reads})
            for name in copies:
                made[name][kind] = tensors[name].clone()
    return made

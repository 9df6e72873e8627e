"""A recipe's bank opened again: the same checkpoints, whatever came or went beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError, ConfigError


@dataclass(frozen=True)
class _Steps(Selection):
    """The steps of a recipe and no others, whatever lies beside them by now."""

    steps: tuple[int, ...] = ()

    def pick(self, found: Sequence[Any]) -> list[Any]:
        """See `Selection.pick`."""
        if not (kept := [f for f in found if f.step in self.steps]):
            raise BankError(
                f"the recipe takes steps {shown(list(self.steps))}, and there are only steps {found[0].step} to "
                f"{found[-1].step}. Restore the checkpoints, or give the right ones with bank=PATH."
            )
        return kept


def bank_settings(folder: Path, recipe: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """How to open the bank of a sound recipe again, as plain values.

    Args:
        folder: of the model, for messages.
        recipe: its recipe.
        path: where the checkpoints are now; None takes the recipe's path.

    Raises:
        ConfigError: the recipe has no path, and none is given.
    """
    config = recipe.get("bank")
    if not isinstance(config, dict):
        if path is None:
            raise ConfigError(f"the recipe of `{folder}` does not say where its checkpoints are. Add bank=PATH.")
        config = {}
    kept = {key: config[key] for key in ("path", "component", "weights", "dtype", "storage") if key in config}
    if kept.get("storage") == "delta":  # in the middle, if the recipe is older than the setting
        steps, rates, middle = recipe["steps"], recipe.get("rates"), len(recipe["steps"]) // 2
        anchor = config.get("anchor", steps[middle])
        at = middle if steps[middle] == anchor else steps.index(anchor)
        kept["anchor"] = [steps[at], rates[at] if rates else None]
    return {**kept, "steps": sorted(set(recipe["steps"]))} | ({} if path is None else {"path": str(path)})


def reopen(config: Mapping[str, Any]) -> CheckpointBank:
    """The bank of some `bank_settings`, with exactly their steps, as far as they are there.

    Raises:
        BankError: it cannot be opened, or none of its steps is there.
    """
    how = {key: config[key] for key in ("component", "weights", "dtype", "storage") if config.get(key) is not None}
    if how.get("storage") != "delta" and how.get("dtype", "float32") == "float32":
        how["storage"] = "streamed"  # the same bits as resident, and no memory
    try:
        bank = CheckpointBank.open(Path(config["path"]), select=_Steps(steps=tuple(config["steps"])), **how)
    except (KeyError, TypeError) as error:
        raise BankError(f"the recipe's bank is `{shown(dict(config))}`, which cannot be opened: {error!r}.") from error
    if "anchor" in config:
        step, rate = config["anchor"]
        rates = (rate is not None and bank.rates) or [None] * bank.num_checkpoints
        rows = list(zip(bank.steps, rates, strict=True))
        if (step, rate) not in rows:
            raise BankError(f"the recipe keeps differences to step {step}, which is not in `{bank.path}`. Restore it.")
        bank.anchor = rows.index((step, rate))
    return bank

"""How many steps a search takes: known once its baselines are scored."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc.search.frames import Record

#: Members of a baseline family that are scored on the select seeds, at most.
NUM_MEMBERS = 3


def best_members(baselines: Sequence[Record], count: int) -> dict[str, list[Record]]:
    """The `count` best of each family on the search seeds, of those that could be scored."""
    ranked = sorted((b for b in baselines if b["value"] is not None), key=lambda record: record["value"])
    families = dict.fromkeys(record["family"] for record in baselines if record["value"] is not None)
    return {name: [record for record in ranked if record["family"] == name][:count] for name in families}


def num_looks(baselines: Sequence[Record], num_finalists: int) -> int:
    """How many baselines get a second look; families share members, such as the last checkpoint."""
    best = best_members(baselines, min(NUM_MEMBERS, num_finalists))
    return len({tuple(record["vector"]) for members in best.values() for record in members})


def num_steps(num_baselines: int, num_trials: int, num_finalists: int, looks: int, num_families: int) -> int:
    """Baselines, trials, finalists, second looks, and the final scores of the winner and of each family."""
    return num_baselines + num_trials + min(num_finalists, num_trials) + looks + 1 + num_families

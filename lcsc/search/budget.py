"""How much a search may spend, and what it may spend it on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from lcsc.core.errors import ConfigError
from lcsc.objectives.base import Objective
from lcsc.operators.base import Operator
from lcsc.search.guards import check_guards
from lcsc.search.penalty import check_penalty
from lcsc.search.racing import check_race

#: What no score is near to, while its products with squared distances stay far from overflow.
MOST_PENALTY = 1e12


@dataclass(frozen=True)
class Budget:
    """How much a search may spend.

    Args:
        num_trials: proposals scored on the search seeds.
        num_images: images a trial.
        num_images_baselines: images of a baseline's first look, which tells whom of each family the second look is
            worth (`lcsc.search.first_look`). None takes `num_images`, and so do a number that is not below it, a race,
            which begins with a full score to beat, and a searcher that learns from these scores.
        num_finalists: best trials scored again on the select seeds; of each baseline family as many, but at most 3.
        num_images_select, num_images_report: images of those, and of the final scores.
        prefixes: sizes of a race, increasing and below `num_images`: trials are scored on so many images first and
            dropped when they cannot win. Empty scores all trials on all images.
        race_steps: numbers of training steps, increasing and below the objective's `num_steps`, where an objective
            trains its candidates: trials are scored on all images after so many steps, and dropped when they cannot win
            as with `prefixes`, which go without it. A trial that stays trains on to the same bits as without a race.
        drop_level: a trial is dropped when it beats the best one in less than this share of the paired bootstrap
            resamples of the images so far.
        guards: further metrics that veto a finalist, and the relative share by which each may be worse than the best
            baseline's, beside what chance explains, such as `{recall_digits: 0.05}`; None for no guards.
        penalty: what a searcher is told is a trial's score + `penalty` x (distance from the best baseline in weight
            space / distance from the last checkpoint to the mean of all)^2. The winner is chosen by scores alone.
        batch_size: proposals that are asked for together and told together, in order: the same search on every engine
            and any number of workers. None asks whenever a worker is free and tells each result when it comes, so that
            no worker waits for another; with one worker that is one after the other.
    """

    num_trials: int = 300
    num_images: int = 400
    num_finalists: int = 10
    num_images_select: int = 2000
    num_images_report: int = 4000
    prefixes: list[int] = field(default_factory=list)
    race_steps: list[int] = field(default_factory=list)
    drop_level: float = 0.05
    guards: dict[str, float] | None = None
    penalty: float = 0.0
    batch_size: int | None = None
    num_images_baselines: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("num_") and value is not None and value < 1:
                raise ConfigError(f"`search.{name}` is {value}; it must be at least 1.")
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ConfigError(f"`search.batch_size` is `{self.batch_size}`; it must be at least 1, or null.")
        sizes = [0, *self.prefixes, self.num_images]
        if any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ConfigError(
                f"`search.prefixes` is {self.prefixes}; it must increase, from above 0 to below `search.num_images`, "
                f"which is {self.num_images}."
            )
        if self.race_steps and self.prefixes:
            raise ConfigError(
                f"`search.prefixes` is {self.prefixes} and `search.race_steps` {self.race_steps}; a race is over "
                "images or over training steps. Leave one of the two out."
            )
        if any(a >= b for a, b in itertools.pairwise([0, *self.race_steps])):
            raise ConfigError(f"`search.race_steps` is {self.race_steps}; it must increase, from above 0.")
        if not 0 < self.drop_level < 0.5:
            raise ConfigError(f"`search.drop_level` is {self.drop_level}; it must lie between 0 and 0.5.")
        if not 0 <= self.penalty <= MOST_PENALTY:
            raise ConfigError(
                f"`search.penalty` is {self.penalty}; it must be a number from 0 to {MOST_PENALTY:g}. A few times the "
                "scores is much already."
            )
        if not isinstance(self.guards, dict | None):
            raise ConfigError(f"`search.guards` is `{self.guards}`; write shares by name: {{recall_digits: 0.05}}.")
        for name, share in (self.guards or {}).items():
            if not isinstance(share, int | float) or not share >= 0:
                raise ConfigError(f"`search.guards.{name}` is `{share}`; a share is a number of at least 0.")

    @property
    def race(self) -> str:
        """The setting that makes trials race and its value, for messages; empty where they do not."""
        given = [f"`search.{name}` {rungs}" for name in ("prefixes", "race_steps") if (rungs := getattr(self, name))]
        return "".join(given)

    @property
    def first_look(self) -> int | None:
        """Images of a baseline's first look where it is on fewer than a trial's; None where it is not."""
        few = self.num_images_baselines
        return None if few is None or few >= self.num_images or self.race else few


def check_budget(objective: Objective, operator: Operator, budget: Budget) -> None:
    """Raise ConfigError for a budget that does not fit the objective or the operator."""
    check_penalty(operator, budget.penalty, budget.race)
    for name in ("num_images", "num_images_baselines", "num_images_select", "num_images_report"):
        num, least = getattr(budget, name), objective.min_images
        if num is not None and num < least:
            raise ConfigError(
                f"`search.{name}` is {num}: too few images for `{objective.name}`; it needs at least {least}."
            )
    for other in getattr(objective, "other_metrics", ()):  # in full scores alone: nobody would know before the end
        for name in ("num_images_report", *(["num_images_select"] if budget.guards else [])):
            if (num := getattr(budget, name)) < other.min_samples:
                raise ConfigError(
                    f"`search.{name}` is {num}: too few images for `{other.name}` of `other_metrics`; it needs at "
                    f"least {other.min_samples}."
                )
    check_race(objective, budget.prefixes, budget.race_steps, budget.num_images)
    check_guards(objective, budget.guards or {})

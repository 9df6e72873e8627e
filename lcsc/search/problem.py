"""Everything a search is about, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from lcsc.bank import CheckpointBank
from lcsc.core.space import SearchSpace
from lcsc.objectives.base import Objective, joint_space, why_no_gradient, why_no_memory
from lcsc.operators.base import Operator
from lcsc.search.budget import Budget, check_budget
from lcsc.searchers.base import Searcher, Start, Task, learns


@dataclass(frozen=True)
class Problem:
    """Everything a search is about."""

    bank: CheckpointBank
    operator: Operator
    searcher: Searcher
    objective: Objective
    budget: Budget
    seed: int

    def __post_init__(self) -> None:
        check_budget(self.objective, self.operator, self.budget)

    def space(self) -> SearchSpace:
        """What is varied: the operator's boxes, then the objective's own."""
        return joint_space(self.operator.space(self.bank), self.objective)

    @property
    def first_look(self) -> int | None:
        """Images of a baseline's first look; None where it is on all, as for searchers that learn from its score."""
        return None if learns(self.searcher) else self.budget.first_look

    def task(self, starts: tuple[Start, ...] = ()) -> Task:
        """What the searcher is given."""
        return task_of(self.objective, self.operator, self.budget, self.space(), self.seed, starts)


def task_of(
    objective: Objective,
    operator: Operator,
    budget: Budget,
    space: SearchSpace,
    seed: int,
    starts: tuple[Start, ...] = (),
) -> Task:
    """What a searcher is given of these parts."""
    reasons = {"no_gradient": why_no_gradient(objective, operator), "no_memory": why_no_memory(objective)}
    return Task(space, budget.num_trials, seed, starts, min_images=objective.min_images, **reasons)

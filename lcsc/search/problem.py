"""Everything a search is about, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from lcsc.bank import CheckpointBank
from lcsc.core.space import SearchSpace
from lcsc.objectives.base import Objective, joint_space, why_no_gradient
from lcsc.operators.base import Operator
from lcsc.search.budget import Budget, check_budget
from lcsc.searchers.base import Searcher, Start, Task


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

    def task(self, starts: tuple[Start, ...] = ()) -> Task:
        """What the searcher is given."""
        reason = why_no_gradient(self.objective, self.operator)
        return Task(self.space(), self.budget.num_trials, self.seed, starts, reason, self.objective.min_images)

"""The search: floor, baselines, trials, selection, report. The same for every operator, searcher and objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.seeds import Purpose
from lcsc.core.space import Point, SearchSpace
from lcsc.objectives.base import Objective, why_no_gradient
from lcsc.operators.base import Baseline, Operator
from lcsc.search.evaluate import Evaluator
from lcsc.search.journal import Journal, Record
from lcsc.search.progress import Progress
from lcsc.searchers.base import Proposal, Searcher, Session, Start, Task

#: Consecutive failed trials after which the search stops: something is wrong with more than one candidate.
MAX_FAILURES = 20


@dataclass(frozen=True)
class Budget:
    """How much a search may spend.

    Args:
        num_trials: proposals scored on the search seeds.
        num_images: images a trial.
        num_finalists: best trials scored again on the select seeds.
        num_images_select, num_images_report: images of those, and of the final scores.
    """

    num_trials: int = 300
    num_images: int = 400
    num_finalists: int = 10
    num_images_select: int = 2000
    num_images_report: int = 4000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"`search.{name}` is {value}; it must be at least 1.")


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
        for name in ("num_images", "num_images_select", "num_images_report"):
            num, least = getattr(self.budget, name), self.objective.min_images
            if num < least:
                raise ConfigError(
                    f"`search.{name}` is {num}: too few images for `{self.objective.name}`; it needs at least {least}."
                )

    def task(self, starts: tuple[Start, ...] = ()) -> Task:
        """What the searcher is given."""
        reason = why_no_gradient(self.objective, self.operator)
        return Task(self.operator.space(self.bank), self.budget.num_trials, self.seed, starts, reason)


@dataclass(frozen=True)
class Outcome:
    """What a search found: journal records of the winner's selection and of the final scores."""

    winner: Record
    reports: list[Record]
    floor: float | None
    images_sampled: int
    image_forwards: int
    num_failed: int


class Search:
    """One pass over the plan; every step goes through the journal."""

    def __init__(self, problem: Problem, journal: Journal, progress: Progress) -> None:
        self.problem, self.journal, self.progress = problem, journal, progress
        self.space: SearchSpace = problem.operator.space(problem.bank)
        self.evaluator = Evaluator(problem.bank, problem.operator, problem.objective, self.space, problem.seed)
        self.images = self.forwards = 0

    def run(self) -> Outcome:
        """Run, or continue, to the end.

        Raises:
            EvaluationError: no baseline and no trial could be scored, or too many trials failed in a row.
        """
        floor = self.journal.step("floor", {}, lambda: {"value": self.problem.objective.floor()})["value"]
        baselines = self._baselines()
        tuned = _best_of_family(baselines)
        starts = tuple(
            Start(np.array(record["vector"]), record["value"], record["label"], record["family"])
            for record in sorted((b for b in baselines if b["value"] is not None), key=lambda record: record["value"])
        )
        session = self.problem.searcher.start(self.problem.task(starts))
        trials = self._trials(session, baselines, floor)
        winner = self._select(session, trials, starts)
        reports = [self._report("best", winner["label"], winner)]
        reports += [self._report(family, record["label"], record) for family, record in tuned.items()]
        failed = sum(trial["status"] != "ok" for trial in trials)
        return Outcome(winner, reports, floor, self.images, self.forwards, failed)

    def _step(
        self, kind: str, key: Mapping[str, Any], vector: list[float], purpose: Purpose, num: int, full: bool = False
    ) -> Record:
        self.images += num
        replayed, at = self.journal.replaying, np.array(vector)
        record = self.journal.step(kind, key, lambda: self.evaluator.score(at, purpose, range(num), full), num)
        self.forwards += record.get("image_forwards", 0)
        self.progress.step(kind, None, num, replayed)
        return record

    def _baselines(self) -> list[Record]:
        records = []
        for baseline in self.problem.operator.baselines(self.problem.bank):
            vector = self.space.to_vector(baseline.point).tolist()
            key = {"family": baseline.family, "label": baseline.label, "vector": vector}
            records.append(self._step("baseline", key, vector, Purpose.SEARCH, self.problem.budget.num_images))
            best = min((r for r in records if r["value"] is not None), key=lambda r: r["value"], default=None)
            if best:
                self.progress.baseline(f"{best['label']} {best['value']:.2f}")
        return records

    def _trials(self, session: Session, baselines: list[Record], floor: float | None) -> list[Record]:
        worst = max((r["value"] for r in baselines if r["value"] is not None), default=None)
        trials: list[Record] = []
        for _ in range(self.problem.budget.num_trials):
            proposal = session.ask()
            record = self._trial(proposal, floor)
            trials.append(record)
            if record["value"] is not None:
                worst = record["value"] if worst is None else max(worst, record["value"])
            told = record["value"] if record["value"] is not None else worst
            if told is not None:  # a failure is told as the worst finite value so far; NaN and Inf never
                gradient = record.get("gradient")
                session.tell(proposal.uid, told, None if gradient is None else np.array(gradient))
            if all(t["value"] is None for t in trials[-MAX_FAILURES:]) and len(trials) >= MAX_FAILURES:
                raise EvaluationError(
                    f"the last {MAX_FAILURES} trials failed: {record['reason']} "
                    "Mend the cause and run the same line again."
                )
        return trials

    def _trial(self, proposal: Proposal, floor: float | None) -> Record:
        """Score a proposal; one better than real data is scored again on other seeds and the worse value counts."""
        num, vector, block = proposal.num_images or self.problem.budget.num_images, proposal.vector, proposal.block
        evaluate = self.evaluator.slope if proposal.gradient else self.evaluator.score
        purpose, images = Purpose.SEARCH, range(num)
        if block is not None:
            purpose, images = Purpose.FRESH, range(block * num, (block + 1) * num)

        def score() -> dict[str, Any]:
            row = evaluate(vector, purpose, images)
            if floor is None or row["value"] is None or row["value"] >= floor:
                return row
            again = self.evaluator.score(vector, Purpose.RECHECK, range(num))
            if again["value"] is None:
                return {**again, "reason": f"too good ({row['value']}), then: {again['reason']}", "recheck": None}
            cost = row["image_forwards"] + again["image_forwards"]
            worse = {"value": max(row["value"], again["value"]), "recheck": again["value"], "image_forwards": cost}
            return {**row, **worse}

        replayed = self.journal.replaying
        own = {"block": block, "num_images": proposal.num_images}
        own = {key: value for key, value in own.items() if value is not None}
        key = {"uid": proposal.uid, "vector": vector.tolist(), **own}
        record = self.journal.step("trial", key, score, num)
        spent = num * (2 if "recheck" in record else 1)
        self.images += spent
        self.forwards += record.get("image_forwards", 0)
        self.progress.step("trial", record["value"], spent, replayed)
        return record

    def _select(self, session: Session, trials: list[Record], starts: tuple[Start, ...]) -> Record:
        """Score the finalists and the best baseline on the select seeds; the winner is the best there."""
        ranked = sorted((t for t in trials if t["value"] is not None), key=lambda t: (t["value"], t["uid"]))
        if not ranked:
            raise EvaluationError(
                f"no trial of {len(trials)} could be scored: {trials[-1]['reason'] if trials else 'none ran'}."
            )
        count = self.problem.budget.num_finalists
        finalists = session.finalists(count)
        if finalists is None:
            finalists = [(f"trial {trial['uid']}", np.array(trial["vector"])) for trial in ranked[:count]]
        finalists += [(start.label, start.vector) for start in starts[:1]]  # a search may fail to beat where it began
        scored: list[tuple[float, int, Record]] = []
        for place, (label, vector) in enumerate(finalists):
            key, num = {"label": label, "vector": vector.tolist()}, self.problem.budget.num_images_select
            record = self._step("select", key, key["vector"], Purpose.SELECT, num)
            scored.append((math.inf if record["value"] is None else record["value"], place, record))
        return min(scored)[2]

    def _report(self, who: str, label: str, record: Record) -> Record:
        num = self.problem.budget.num_images_report
        key = {"who": who, "label": label, "vector": record["vector"]}
        report = self._step("report", key, record["vector"], Purpose.REPORT, num, full=True)
        if report["value"] is None:
            raise EvaluationError(f"`{who}` ({label}) could not be scored on the report seeds: {report['reason']}")
        return report

    def num_steps(self) -> int:
        """Steps of the plan that the progress display counts."""
        baselines: list[Baseline] = self.problem.operator.baselines(self.problem.bank)
        families = {baseline.family for baseline in baselines}
        budget = self.problem.budget
        return len(baselines) + budget.num_trials + min(budget.num_finalists, budget.num_trials) + 2 + len(families)

    def point(self, record: Record) -> Point:
        """The point a record was scored at."""
        return self.space.to_point(np.array(record["vector"]))


def _best_of_family(baselines: list[Record]) -> dict[str, Record]:
    """The best record of each family on the search seeds: its tuned representative."""
    tuned: dict[str, Record] = {}
    for record in baselines:
        old = tuned.get(record["family"])
        if record["value"] is not None and (old is None or record["value"] < old["value"]):
            tuned[record["family"]] = record
    return tuned

"""The search: floor, baselines, trials, selection, report. The same for every operator, searcher and objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.core.errors import EvaluationError
from lcsc.core.seeds import Purpose
from lcsc.core.space import Point, SearchSpace
from lcsc.objectives.base import Objective, joint_space, why_no_gradient
from lcsc.operators.base import Measured, Operator
from lcsc.search.budget import Budget, check_budget
from lcsc.search.evaluate import Evaluator
from lcsc.search.fitting import fitting_note
from lcsc.search.guards import Watch
from lcsc.search.frames import Record
from lcsc.search.journal import Journal
from lcsc.search.penalty import Penalty
from lcsc.search.progress import Progress
from lcsc.search.racing import Racer
from lcsc.search.retry import MAX_FAILURES, retry_from
from lcsc.searchers.base import Accountable, Proposal, Searcher, Session, Start, Task, ran

#: Members of a baseline family that are scored on the select seeds, at most.
NUM_MEMBERS = 3


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


@dataclass(frozen=True)
class Outcome:
    """What a search found: journal records of the winner's selection and of the final scores.

    `searcher_ran` names the searcher that ran where the configured one chose it; None where that is the one.
    """

    winner: Record
    reports: list[Record]
    floor: float | None
    images_sampled: int
    image_forwards: int
    num_failed: int
    images_saved: int = 0
    searcher_ran: str | None = None


class Search:
    """One pass over the plan; every step goes through the journal."""

    def __init__(self, problem: Problem, journal: Journal, progress: Progress) -> None:
        self.problem, self.journal, self.progress = problem, journal, progress
        self.space: SearchSpace = problem.space()
        self.evaluator = Evaluator(problem.bank, problem.operator, problem.objective, self.space, problem.seed)
        sizes = (*problem.budget.prefixes, problem.budget.num_images)
        self.racer = Racer(self.evaluator, sizes, problem.budget.drop_level) if problem.budget.prefixes else None
        self.images = self.forwards = self.saved = 0
        self._told_unraced = self._told_fitting = False
        self._rated: dict[tuple[float, ...], Record] = {}  # baselines on the select seeds

    def run(self) -> Outcome:
        """Run, or continue, to the end.

        Raises:
            EvaluationError: no baseline and no trial could be scored, or too many trials failed in a row.
        """
        self._forget_failures()
        floor = self.journal.step("floor", {}, lambda: {"value": self.problem.objective.floor()})["value"]
        baselines = self._baselines()
        self.progress.expect(self.num_steps(baselines))
        starts = tuple(
            Start(np.array(record["vector"]), record["value"], record["label"], record["family"])
            for record in sorted((b for b in baselines if b["value"] is not None), key=lambda record: record["value"])
        )
        penalty = self._penalty(starts)
        heard = tuple(sorted(map(penalty.told, starts), key=lambda start: start.value)) if penalty else starts
        session = self.problem.searcher.start(self.problem.task(heard))
        trials = self._trials(session, heard, floor, penalty)
        if isinstance(session, Accountable):
            self.journal.step("account", {}, lambda: {"lines": session.account()})
        winner, tuned = self._select(session, trials, baselines)
        own = self._own(winner)
        if any(value.any() for value in own.values()):  # what helps the winner beside its weights, baselines get too
            self.progress.expect(self.num_steps(baselines) + len(baselines) + self._num_members(baselines))
            baselines += self._baselines(own, ", settings of the winner")
            tuned = self._tuned(baselines)
        reports = [self._report("best", winner["label"], winner)]
        reports += [self._report(family, record["label"], record) for family, record in tuned.items()]
        failed = sum(trial["status"] != "ok" for trial in trials)
        return Outcome(winner, reports, floor, self.images, self.forwards, failed, self.saved, ran(session))

    def _forget_failures(self) -> None:
        """Drop the failures that stopped the search when it ran last, so that the same line can mend them."""
        num, start = len(self.journal.records), retry_from(self.journal.records, self.problem.budget.num_trials)
        if start < num:
            self.journal.forget(start)
            self.progress.note(f"the last {num - start} steps failed and stopped the search; trying them again")

    def _step(self, kind: str, key: Mapping[str, Any], num: int, score: Callable[[np.ndarray], Record]) -> Record:
        """Score `key["vector"]` on `num` images, unless the journal holds it already."""
        self.images += num
        replayed = self.journal.replaying
        record = self.journal.step(kind, key, lambda: score(np.array(key["vector"])), num)
        self.forwards += record.get("image_forwards", 0)
        self.progress.step(kind, None, num, replayed)
        return record

    def _own(self, record: Record) -> dict[str, np.ndarray]:
        """What a record's point says about the objective's own boxes, such as the sampler's times."""
        theirs = {box.name for box in self.problem.operator.space(self.problem.bank).boxes}
        return {name: value for name, value in self.point(record).items() if name not in theirs}

    def _baselines(self, own: Point | None = None, suffix: str = "") -> list[Record]:
        """Score the operator's baselines, with the objective's own boxes idle or as they are in `own`."""
        records, num = [], self.problem.budget.num_images
        idle = {**self.space.to_point(np.zeros(self.space.size)), **(own or {})}

        def score(vector: np.ndarray) -> Record:
            return self.racer.full(vector) if self.racer else self.evaluator.score(vector, Purpose.SEARCH, range(num))

        for baseline in self.problem.operator.baselines(self.problem.bank):
            vector = self.space.to_vector({**idle, **baseline.point}).tolist()
            key = {"family": baseline.family, "label": baseline.label + suffix, "vector": vector}
            record = self._step("baseline", key, num, score)
            records.append(record)
            if self.racer:
                self.racer.hear(np.array(vector), record["value"])
            best = min((r for r in records if r["value"] is not None), key=lambda r: r["value"], default=None)
            if best:
                self.progress.baseline(f"{best['label']} {best['value']:.2f}")
        return records

    def _penalty(self, starts: tuple[Start, ...]) -> Penalty | None:
        weight, problem = self.problem.budget.penalty, self.problem
        if weight and not starts:
            self.progress.note("note: no baseline could be scored, so `search.penalty` has nothing to measure from")
        if not weight or not starts:
            return None
        assert isinstance(problem.operator, Measured)
        return Penalty(weight, problem.bank, problem.operator, self.space, starts[0].vector)

    def _trials(
        self, session: Session, starts: tuple[Start, ...], floor: float | None, penalty: Penalty | None
    ) -> list[Record]:
        worst = max((start.value for start in starts), default=None)
        trials: list[Record] = []
        for _ in range(self.problem.budget.num_trials):
            proposal = session.ask()
            record = self._trial(proposal, floor, penalty)
            trials.append(record)
            told = _heard(record)
            if told is not None:
                worst = told if worst is None else max(worst, told)
            if worst is not None:  # a failure is told as the worst finite value so far; NaN and Inf never
                gradient = None if record.get("gradient") is None else np.array(record["gradient"])
                if gradient is not None and penalty:
                    gradient = gradient + penalty.slope(proposal.vector)
                session.tell(proposal.uid, worst if told is None else told, gradient)
            if all(t["value"] is None for t in trials[-MAX_FAILURES:]) and len(trials) >= MAX_FAILURES:
                raise EvaluationError(
                    f"the last {MAX_FAILURES} trials failed: {record['reason'].rstrip('.')}. "
                    "Mend the cause and run the same line again."
                )
        return trials

    def _trial(self, proposal: Proposal, floor: float | None, penalty: Penalty | None) -> Record:
        """Score a proposal; one better than real data is scored again on other seeds and the worse value counts.

        `value` and `gradient` are the score's alone, `penalty` is what comes on top for the searcher.
        """
        num, vector, block = proposal.num_images or self.problem.budget.num_images, proposal.vector, proposal.block
        evaluate = self.evaluator.slope if proposal.gradient else self.evaluator.score
        purpose, images = Purpose.SEARCH, range(num)
        if block is not None:
            purpose, images = Purpose.FRESH, range(block * num, (block + 1) * num)
        common = block is None and num == self.problem.budget.num_images
        racer = self.racer if common and not proposal.gradient else None
        self._say_unraced(racer)
        self.say_fitting(proposal)

        def score() -> Record:
            row = racer.race(vector) if racer else evaluate(vector, purpose, images)
            if floor is None or row["value"] is None or row["value"] >= floor or "dropped_at" in row:
                return row
            again = self.evaluator.score(vector, Purpose.RECHECK, range(num))
            cost = row["image_forwards"] + again["image_forwards"]
            if again["value"] is None:
                reason = f"too good ({row['value']}), then: {again['reason']}"
                return {**again, "reason": reason, "recheck": None, "image_forwards": cost}
            worse = {"value": max(row["value"], again["value"]), "recheck": again["value"], "image_forwards": cost}
            return {**row, **worse}

        replayed = self.journal.replaying
        own = {"block": block, "num_images": proposal.num_images}
        own = {key: value for key, value in own.items() if value is not None}
        key = {"uid": proposal.uid, "vector": vector.tolist(), **own}
        paid = {"penalty": penalty.paid(vector)} if penalty else {}
        record = self.journal.step("trial", key, lambda: {**score(), **paid}, num)
        sampled = record.get("images", num)
        if self.racer and common and "dropped_at" not in record:
            self.racer.hear(vector, record["value"])
        spent = sampled + (num if "recheck" in record else 0)
        self.images, self.saved = self.images + spent, self.saved + num - sampled
        self.forwards += record.get("image_forwards", 0)
        self.progress.step("trial", record["value"], spent, replayed)
        return record

    def say_fitting(self, proposal: Proposal) -> None:
        """Once, that trials like this one share the noise of too few images."""
        if not self._told_fitting:
            objective, num = self.problem.objective, self.problem.budget.num_images
            text = fitting_note(self.problem.searcher, objective, proposal, num, self.space.size)
            if text:
                self.progress.note(text)
            self._told_fitting = text is not None

    def _say_unraced(self, racer: Racer | None) -> None:
        """Once, that `search.prefixes` is not for proposals on noise of their own or with a derivative."""
        if self.racer and not racer and not self._told_unraced:
            self.progress.note("note: the searcher's gradients and trials on noise of their own are not raced")
            self._told_unraced = True

    def _select(
        self, session: Session, trials: list[Record], baselines: list[Record]
    ) -> tuple[Record, dict[str, Record]]:
        """Score the baselines' best and the finalists on the select seeds: the winner there, and `_tuned`."""
        if all(trial["value"] is None for trial in trials):
            reason = trials[-1]["reason"].rstrip(".") if trials else "none ran"
            raise EvaluationError(
                f"no trial of {len(trials)} could be scored: {reason}. Mend the cause and run the same line again."
            )
        guards = self.problem.budget.guards
        watch = Watch(self.problem.objective, guards) if guards else None
        tuned = self._tuned(baselines, watch)
        rivals = sorted((r for r in tuned.values() if r["kind"] == "select"), key=lambda record: record["value"])
        if watch and rivals:
            watch.rival = rivals[0]
        elif watch:
            watch = None
            self.progress.note("note: no baseline could be scored, so `search.guards` has nothing to compare with")
        records = [
            self._rated.get(tuple(vector.tolist())) or self._selected(label, vector, watch)  # some are baselines
            for label, vector in self._finalists(session, trials)
        ]
        for record in records:
            if "vetoed" in record:
                self.progress.note(f"{record['label']} is vetoed: {record['vetoed']}")
        # a search may fail to beat where it began; of equals the first wins
        fit = [r for r in (*records, *rivals[:1]) if "vetoed" not in r and r["value"] is not None]
        if not fit:
            reason = (records[-1]["reason"] if records else "none is left").rstrip(".")
            raise EvaluationError(
                f"no finalist could be scored on the select seeds: {reason}. "
                "Mend the cause and run the same line again."
            )
        return min(fit, key=lambda record: record["value"]), tuned

    def _tuned(self, baselines: list[Record], watch: Watch | None = None) -> dict[str, Record]:
        """The representative of each family: of its best members on the search seeds the best on the select seeds.

        So baselines get the second look that finalists get. Where none can be scored there it is the best of before.
        """
        count, tuned = min(NUM_MEMBERS, self.problem.budget.num_finalists), {}
        for family, best in _best_members(baselines, count).items():
            for record in best:
                at = tuple(record["vector"])
                if at not in self._rated:  # families share members, such as the last checkpoint
                    self._rated[at] = self._selected(record["label"], np.array(at), watch)
            rated = [{**self._rated[tuple(record["vector"])], "label": record["label"]} for record in best]
            scored = [record for record in rated if record["value"] is not None]
            tuned[family] = min(scored, key=lambda record: record["value"], default=best[0])
        return tuned

    def _selected(self, label: str, vector: np.ndarray, watch: Watch | None) -> Record:
        """A vector scored on the select seeds, and judged by the guards."""
        num = self.problem.budget.num_images_select

        def score(vector: np.ndarray) -> Record:
            if watch is None:
                return self.evaluator.score(vector, Purpose.SELECT, range(num))
            return watch.judged(self.evaluator.score(vector, Purpose.SELECT, range(num), full=True, resamples=True))

        return self._step("select", {"label": label, "vector": vector.tolist()}, num, score)

    def _finalists(self, session: Session, trials: list[Record]) -> list[tuple[str, np.ndarray]]:
        """The searcher's choice, else the best trials; none that was dropped from a race."""
        count = self.problem.budget.num_finalists
        dropped = {tuple(trial["vector"]) for trial in trials if "dropped_at" in trial}
        chosen = [row for row in session.finalists(count) or () if tuple(row[1].tolist()) not in dropped]
        if chosen:
            return chosen
        ranked = sorted((t for t in trials if t["value"] is not None), key=lambda t: (_heard(t), t["uid"]))
        ranked = [trial for trial in ranked if tuple(trial["vector"]) not in dropped]
        return [(f"trial {trial['uid']}", np.array(trial["vector"])) for trial in ranked[:count]]

    def _report(self, who: str, label: str, record: Record) -> Record:
        num = self.problem.budget.num_images_report
        key = {"who": who, "label": label, "vector": record["vector"]}
        report = self._step(
            "report", key, num, lambda vector: self.evaluator.score(vector, Purpose.REPORT, range(num), full=True)
        )
        if report["value"] is None:
            raise EvaluationError(
                f"`{who}` ({label}) could not be scored on the report seeds: {report['reason'].rstrip('.')}. "
                "Mend the cause and run the same line again."
            )
        return report

    def num_steps(self, baselines: list[Record] | None = None) -> int:
        """Steps of the plan that the progress display counts; nearer to the truth once the baselines are scored."""
        budget, plan = self.problem.budget, self.problem.operator.baselines(self.problem.bank)
        families = Counter(baseline.family for baseline in plan)
        members = sum(min(NUM_MEMBERS, budget.num_finalists, num) for num in families.values())
        if baselines is not None:
            families = Counter(record["family"] for record in baselines if record["value"] is not None)
            members = self._num_members(baselines)
        finalists = min(budget.num_finalists, budget.num_trials)
        return len(plan) + budget.num_trials + finalists + members + 1 + len(families)

    def _num_members(self, baselines: list[Record]) -> int:
        """How many baselines get a second look; families share members, such as the last checkpoint."""
        count = min(NUM_MEMBERS, self.problem.budget.num_finalists)
        return len({tuple(record["vector"]) for best in _best_members(baselines, count).values() for record in best})

    def point(self, record: Record) -> Point:
        """The point a record was scored at."""
        return self.space.to_point(np.array(record["vector"]))


def _best_members(baselines: list[Record], count: int) -> dict[str, list[Record]]:
    """The `count` best of each family on the search seeds, of those that could be scored."""
    ranked = sorted((b for b in baselines if b["value"] is not None), key=lambda record: record["value"])
    families = dict.fromkeys(record["family"] for record in baselines if record["value"] is not None)
    return {name: [record for record in ranked if record["family"] == name][:count] for name in families}


def _heard(trial: Record) -> float | None:
    """What a searcher hears of a trial; None for a failure."""
    return None if trial["value"] is None else trial["value"] + trial.get("penalty", 0.0)

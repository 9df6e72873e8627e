"""The search: floor, baselines, trials, selection, report. The same for every operator, searcher and objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.core.errors import EvaluationError
from lcsc.core.seeds import Purpose
from lcsc.core.space import Point, SearchSpace
from lcsc.operators.base import Baseline, Measured
from lcsc.search.dispatch import Dispatcher
from lcsc.search.engines.base import Crew
from lcsc.search.engines.inline import InlineCrew
from lcsc.search.evaluate import Row
from lcsc.search.first_look import first_looks
from lcsc.search.fitting import fitting_note
from lcsc.search.frames import Record, may_win
from lcsc.search.guards import Watch
from lcsc.search.job import Job, Performer
from lcsc.search.journal import Journal
from lcsc.search.penalty import Penalty
from lcsc.search.plan import NUM_MEMBERS, best_members, num_looks, num_steps
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.retry import retry_from
from lcsc.search.rows import numbers
from lcsc.search.steps import Step, Steps, unchanged
from lcsc.search.trials import Ground, Trials, heard
from lcsc.searchers.base import Accountable, Proposal, Session, Start, allows, ran


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
    """One pass over the plan; every step goes through the journal.

    Args:
        problem: what to search.
        journal: open for writing.
        progress: open.
        crew: who evaluates; None does it in this process.
        inherited: rows that need no evaluation, by the key of their job.
    """

    def __init__(
        self,
        problem: Problem,
        journal: Journal,
        progress: Progress,
        crew: Crew | None = None,
        inherited: Mapping[str, Row] | None = None,
    ) -> None:
        self.problem, self.journal, self.progress = problem, journal, progress
        self.space: SearchSpace = problem.space()
        self.dispatcher = Dispatcher(crew or InlineCrew(Performer(problem)), journal.run, problem.budget, inherited)
        self.steps = Steps(journal, self.dispatcher, progress)
        self.saved, self._told_fitting = 0, False
        self._rated: dict[tuple[float, ...], Record] = {}  # baselines on the select seeds

    def run(self) -> Outcome:
        """Run, or continue, to the end.

        Raises:
            EvaluationError: no baseline and no trial could be scored, or too many trials failed.
        """
        self._forget_failures()
        floor = self.journal.step("floor", {}, lambda: {"value": self.problem.objective.floor()})["value"]
        baselines = self._baselines()
        self.progress.expect(self.num_steps(baselines))
        starts = tuple(
            Start(np.array(record["vector"]), record["value"], record["label"], record["family"], numbers(record))
            for record in sorted((b for b in baselines if b["value"] is not None), key=lambda record: record["value"])
        )
        penalty = self._penalty(starts)
        told = tuple(sorted(map(penalty.told, starts), key=lambda start: start.value)) if penalty else starts
        session = self.problem.searcher.start(self.problem.task(told))
        trials = self._trials(session, told, floor, penalty)
        if isinstance(session, Accountable):
            self.journal.step("account", {}, lambda: {"lines": session.account()})
        winner, tuned = self._select(session, trials, baselines)
        own = self._own(winner)
        if any(value.any() for value in own.values()):  # what helps the winner beside its weights, baselines get too
            looks = num_looks(baselines, self.problem.budget.num_finalists)
            self.progress.expect(self.num_steps(baselines) + len(baselines) + looks)
            baselines += self._baselines(own, ", settings of the winner")
            tuned = self._tuned(baselines)
        reports = self._reports({"best": winner, **tuned})
        failed = sum(trial["status"] != "ok" for trial in trials)
        images, forwards = self.steps.images, self.steps.forwards
        return Outcome(winner, reports, floor, images, forwards, failed, self.saved, ran(session))

    def say_fitting(self, proposal: Proposal) -> None:
        """Once, that trials like this one share the noise of too few images."""
        if not self._told_fitting and not any(box.choices for box in self.space.boxes):  # few choices fit no noise
            problem, num = self.problem, self.problem.budget.num_images
            text = fitting_note(problem.searcher, problem.objective, proposal, num, self.space.size)
            if text:
                self.progress.note(text)
            self._told_fitting = text is not None

    def _forget_failures(self) -> None:
        """Drop the failures that stopped the search when it ran last, so that the same line can mend them."""
        num, start = len(self.journal.records), retry_from(self.journal.records, self.problem.budget.num_trials)
        if start < num:
            self.journal.forget(start)
            self.progress.note(f"the last {num - start} steps failed and stopped the search; trying them again")

    def _own(self, record: Record) -> dict[str, np.ndarray]:
        """What a record's point says about the objective's own boxes, such as the sampler's times."""
        theirs = {box.name for box in self.problem.operator.space(self.problem.bank).boxes}
        return {name: value for name, value in self.point(record).items() if name not in theirs}

    def _baselines(self, own: Point | None = None, suffix: str = "") -> list[Record]:
        """Score the operator's baselines, with the objective's own boxes idle or as they are in `own`."""
        records, budget = [], self.problem.budget
        idle = {**self.space.to_point(np.zeros(self.space.size)), **(own or {})}
        call = "full" if budget.race else "score"

        def key(baseline: Baseline) -> dict[str, Any]:
            vector = self.space.to_vector({**idle, **baseline.point}).tolist()
            return {"family": baseline.family, "label": baseline.label + suffix, "vector": vector}

        def step(key: dict[str, Any]) -> Step:
            return Step("baseline", key, Job(call, tuple(key["vector"]), Purpose.SEARCH, (0, budget.num_images)))

        keys, few = list(map(key, self.problem.operator.baselines(self.problem.bank))), self.problem.first_look
        looks = first_looks(self.steps, keys, few, budget.num_images) if few else self.steps.many(map(step, keys))
        best = None
        for record in looks:
            records.append(record)
            best = min((r for r in records if r["value"] is not None), key=lambda r: r["value"], default=None)
            if best:
                self.progress.baseline(f"{best['label']} {best['value']:.2f}")
        if few and best:
            self.progress.note(
                f"{sum('prefix_value' in r for r in records)} of {len(records)} baselines were scored on {few} of "
                f"{budget.num_images} images; the best of each family are scored again on {budget.num_images_select}"
            )
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
        best = (tuple(starts[0].vector.tolist()), starts[0].value) if starts else None
        ground = Ground(floor, penalty, worst, best if self.problem.budget.race else None)
        trials = Trials(self.problem, session, self.steps, ground, self.say_fitting)
        records = trials.run()
        self.saved = trials.saved
        return records

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
        looked = (
            record for record in tuned.values() if record["kind"] == "select" and allows(session, numbers(record))
        )
        rivals = sorted(looked, key=lambda record: record["value"])
        if watch and rivals:
            watch.rival = rivals[0]
        elif watch:
            watch = None
            self.progress.note("note: no baseline could be scored, so `search.guards` has nothing to compare with")
        finalists = self._finalists(session, trials)
        new = [(label, at) for label, at in finalists if at not in self._rated]  # some are baselines
        rated = self._rated | dict(zip((at for _, at in new), self._selected(new, watch), strict=True))
        records = [rated[at] for _, at in finalists]
        for record in records:
            if "vetoed" in record:
                self.progress.note(f"{record['label']} is vetoed: {record['vetoed']}")
        # a search may fail to beat where it began; of equals the first wins
        fit = [r for r in (*records, *rivals[:1]) if "vetoed" not in r and r["value"] is not None]
        if not fit:
            reason = (
                records[-1]["reason"] if records else "none is left, or none that a limit of the searcher allows"
            ).rstrip(".")
            raise EvaluationError(
                f"no finalist could be scored on the select seeds: {reason}. "
                "Mend the cause and run the same line again."
            )
        return min(fit, key=lambda record: record["value"]), tuned

    def _tuned(self, baselines: list[Record], watch: Watch | None = None) -> dict[str, Record]:
        """The representative of each family: of its best members on the search seeds the best on the select seeds.

        So baselines get the second look that finalists get. Where none can be scored there it is the best of before.
        """
        best, tuned = best_members(baselines, min(NUM_MEMBERS, self.problem.budget.num_finalists)), {}
        labels: dict[tuple[float, ...], str] = {}  # families share members, such as the last checkpoint
        for record in (record for members in best.values() for record in members):
            if tuple(record["vector"]) not in self._rated:
                labels.setdefault(tuple(record["vector"]), record["label"])
        looks = self._selected([(label, at) for at, label in labels.items()], watch)
        self._rated.update(zip(labels, looks, strict=True))
        for family, members in best.items():
            rated = [{**self._rated[tuple(record["vector"])], "label": record["label"]} for record in members]
            scored = [record for record in rated if record["value"] is not None]
            tuned[family] = min(scored, key=lambda record: record["value"], default=members[0])
        return tuned

    def _selected(self, rows: Sequence[tuple[str, tuple[float, ...]]], watch: Watch | None) -> list[Record]:
        """Labelled vectors scored on the select seeds, and judged by the guards."""
        num = self.problem.budget.num_images_select
        look = watch is not None

        def step(label: str, at: tuple[float, ...]) -> Step:
            job = Job("score", at, Purpose.SELECT, (0, num), full=look, resamples=look)
            return Step("select", {"label": label, "vector": list(at)}, job, watch.judged if watch else unchanged)

        return list(self.steps.many(step(label, at) for label, at in rows))

    def _finalists(self, session: Session, trials: list[Record]) -> list[tuple[str, tuple[float, ...]]]:
        """The searcher's choice, else the best trials; none that was dropped from a race."""
        count = self.problem.budget.num_finalists
        dropped = {tuple(trial["vector"]) for trial in trials if "dropped_at" in trial}
        named = [(label, tuple(vector.tolist())) for label, vector in session.finalists(count) or ()]
        chosen = [row for row in named if row[1] not in dropped]
        if chosen:
            return chosen
        able = (trial for trial in trials if may_win(trial) and allows(session, numbers(trial)))
        scored = [trial for trial in able if trial["value"] is not None]
        ranked = sorted(scored, key=lambda trial: (heard(trial), trial["uid"]))
        ranked = [trial for trial in ranked if tuple(trial["vector"]) not in dropped]
        return [(f"trial {trial['uid']}", tuple(trial["vector"])) for trial in ranked[:count]]

    def _reports(self, winners: Mapping[str, Record]) -> list[Record]:
        num, reports = self.problem.budget.num_images_report, []

        def step(who: str, record: Record) -> Step:
            key = {"who": who, "label": record["label"], "vector": record["vector"]}
            return Step("report", key, Job("score", tuple(record["vector"]), Purpose.REPORT, (0, num), full=True))

        for report in self.steps.many(step(who, record) for who, record in winners.items()):
            if report["value"] is None:
                raise EvaluationError(
                    f"`{report['who']}` ({report['label']}) could not be scored on the report seeds: "
                    f"{report['reason'].rstrip('.')}. Mend the cause and run the same line again."
                )
            reports.append(report)
        return reports

    def num_steps(self, baselines: list[Record] | None = None) -> int:
        """Steps of the plan that the progress display counts; nearer to the truth once the baselines are scored."""
        budget, plan = self.problem.budget, self.problem.operator.baselines(self.problem.bank)
        families = Counter(baseline.family for baseline in plan)
        members = sum(min(NUM_MEMBERS, budget.num_finalists, num) for num in families.values())
        if baselines is not None:
            families = Counter(record["family"] for record in baselines if record["value"] is not None)
            members = num_looks(baselines, budget.num_finalists)
        first = len(plan) + (self.problem.first_look is not None)  # the anchor is looked at twice
        return num_steps(first, budget.num_trials, budget.num_finalists, members, len(families))

    def point(self, record: Record) -> Point:
        """The point a record was scored at."""
        return self.space.to_point(np.array(record["vector"]))

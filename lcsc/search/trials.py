"""The trials of a search: proposals out, results in, in batches or as they come.

Everything a searcher hears, and when, is in the journal: a trial's record says how many proposals had been asked for
when it was told (`asked`, left out where that is the usual one after the other). So a search whose results came in any
order is continued by asking and telling in that order again, on any engine and with any number of workers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.core.errors import EvaluationError, RunError
from lcsc.core.seeds import Purpose
from lcsc.search.evaluate import Row
from lcsc.search.frames import Record, may_win
from lcsc.search.job import Job
from lcsc.search.penalty import Penalty
from lcsc.search.problem import Problem
from lcsc.search.racing import Incumbent
from lcsc.search.retry import WINDOW
from lcsc.search.rows import numbers
from lcsc.search.steps import Steps
from lcsc.searchers.base import Proposal, Session, Weighing, allows, width_of


@dataclass(frozen=True)
class Open:
    """A proposal that was asked for and not told yet."""

    proposal: Proposal
    job: Job
    penalty: float | None


@dataclass(frozen=True)
class Ground:
    """What trials stand on.

    Args:
        floor: score of real data, None where there is none.
        penalty: on top of the scores, for the searcher.
        worst: what a failure is told as until a trial is worse; None where nothing was scored yet.
        incumbent: best of what was scored on all images, where trials are raced.
    """

    floor: float | None
    penalty: Penalty | None
    worst: float | None
    incumbent: Incumbent | None


class Trials:
    """Runs the trials of one search.

    Args:
        problem: its budget counts.
        session: asked and told here.
        steps: journal, engine and counts.
        ground: what is known before.
        say: hears each proposal, for notes to the user.
    """

    def __init__(
        self, problem: Problem, session: Session, steps: Steps, ground: Ground, say: Callable[[Proposal], None]
    ) -> None:
        self._problem, self._session, self._steps, self._say = problem, session, steps, say
        self._floor, self._penalty = ground.floor, ground.penalty
        self._worst, self._incumbent = ground.worst, ground.incumbent
        self._open: dict[int, Open] = {}  # by number, in the order of asking
        self._waiting: deque[int] = deque()  # of them, those not handed in yet
        self._numbers: dict[str, int] = {}  # of those handed in, by the identity of the evaluation
        self._asked = 0
        self._failed: deque[Record | None] = deque(maxlen=WINDOW)  # None: a success; of this session only
        self._told_unraced = False
        self.records: list[Record] = []
        #: images that racing saved
        self.saved = 0

    def run(self) -> list[Record]:
        """All records, in the order in which they were told.

        Raises:
            EvaluationError: more than half of the last trials failed.
        """
        batch = self._problem.budget.batch_size
        if batch is not None and batch > width_of(self._session):
            self._steps.progress.note(
                f"note: `search.batch_size` {batch} counts for nothing: this searcher proposes "
                f"{width_of(self._session):g} at a time"
            )
        while len(self.records) < self._problem.budget.num_trials:
            recorded = self._steps.journal.next
            record = self._live() if recorded is None else self._replayed(recorded)
            self._tell(record)
        return self.records

    # ------------------------------------------------------------------------------------------------- one trial

    def _replayed(self, recorded: Record) -> Record:
        """The journal's next record, after the same proposals as then."""
        uid, most = recorded.get("uid"), self._problem.budget.num_trials
        until = recorded.get("asked", uid + 1 if isinstance(uid, int) else 0)
        while self._asked < min(until, most):
            self._ask()
        if uid not in self._open:
            place = self._steps.journal.place
            raise RunError(
                f"journal record {place} is trial {uid}, which this search has not proposed. Library versions or the "
                "machine changed; start a new run."
            )
        return self._recorded(self._open.pop(uid), None)

    def _live(self) -> Record:
        """The next trial that is done; others are handed in meanwhile."""
        batch, dispatcher = self._problem.budget.batch_size, self._steps.dispatcher
        room = min(width_of(self._session), batch or dispatcher.slots)
        self._hand_in()
        if batch is None or not self._open:
            while len(self._open) < room and self._asked < self._problem.budget.num_trials:
                self._ask()
                self._hand_in()  # a worker begins while the others' proposals are made
        result = dispatcher.first(self._numbers) if batch is None else dispatcher.one(next(iter(self._numbers)))
        return self._recorded(self._open.pop(self._numbers.pop(result.uid)), result)

    def _hand_in(self) -> None:
        """Give the engine what was asked for, but for what the journal holds already."""
        while self._waiting:
            number = self._waiting.popleft()
            if number in self._open:
                self._numbers[self._steps.dispatcher.submit(self._open[number].job, f"trial {number}")] = number

    def _recorded(self, trial: Open, result: Any) -> Record:
        proposal, job = trial.proposal, trial.job
        own = {"block": proposal.block, "num_images": proposal.num_images}
        own["asked"] = None if self._asked == proposal.uid + 1 else self._asked
        told = {key: value for key, value in own.items() if value is not None}
        key = {"uid": proposal.uid, "vector": list(job.vector), **told}
        paid = {} if trial.penalty is None else {"penalty": trial.penalty}

        def finished(row: Row) -> Row:
            within = proposal.may_win and (row["value"] is None or allows(self._session, numbers(row)))
            return {**row, **paid, **({} if within else {"may_win": False})}

        num = job.images[1] - job.images[0]
        record = self._steps.record("trial", key, result, finished, num)
        sampled = record.get("images", num)
        spent = sampled + (num if "recheck" in record else 0)
        self._steps.images, self.saved = self._steps.images + spent, self.saved + num - sampled
        value = record["value"] if may_win(record) else None
        self._steps.progress.step("trial", value, spent, result is None or "inherited" in record)
        if job.call == "race" and "dropped_at" not in record:
            self._incumbent = better(self._incumbent, job.vector, value)
        if result is not None:
            self._failed.append(record if record["value"] is None else None)
        return record

    def _ask(self) -> None:
        proposal = self._session.ask()
        num, block, budget = (
            proposal.num_images or self._problem.budget.num_images,
            proposal.block,
            self._problem.budget,
        )
        purpose, images = Purpose.SEARCH, (0, num)
        if block is not None:
            purpose, images = Purpose.FRESH, (block * num, (block + 1) * num)
        common = block is None and num == budget.num_images
        raced = bool(budget.race) and common and not proposal.gradient
        self._say_unraced(raced)
        self._say(proposal)
        call = "race" if raced else "slope" if proposal.gradient else "score"
        rival = self._incumbent if raced else None
        earlier = tuple(
            (tuple(past.vector.tolist()), (past.block * num, (past.block + 1) * num), past.weight)
            for past in proposal.earlier
        )
        at = tuple(proposal.vector.tolist())
        job = Job(call, at, purpose, images, floor=self._floor, incumbent=rival, earlier=earlier)
        paid = self._penalty.paid(proposal.vector) if self._penalty else None
        self._open[proposal.uid] = Open(proposal, job, paid)
        self._waiting.append(proposal.uid)
        self._asked += 1

    def _tell(self, record: Record) -> None:
        """Tell a finite value, always; a failure is told as the worst value so far."""
        self.records.append(record)
        told = heard(record)
        if told is not None:
            self._worst = told if self._worst is None else max(self._worst, told)
        if self._worst is not None:
            gradient = None if record.get("gradient") is None else np.array(record["gradient"])
            if gradient is not None and self._penalty:
                gradient = gradient + self._penalty.slope(np.array(record["vector"]))
            if isinstance(self._session, Weighing):
                found = {} if told is None else numbers(record)
                known = all(name in found for name in self._session.weighed)
                weights = tuple(found[name] for name in self._session.weighed) if known else None
                self._session.weigh(record["uid"], weights)
            self._session.tell(record["uid"], self._worst if told is None else told, gradient)
        failed = [trial for trial in self._failed if trial is not None]
        if len(self._failed) == WINDOW and len(failed) > WINDOW // 2:
            raise EvaluationError(pause_text(failed))

    def _say_unraced(self, raced: bool) -> None:
        """Once, that a race is not for proposals on noise of their own or with a derivative."""
        if self._problem.budget.race and not raced and not self._told_unraced:
            self._steps.progress.note("note: the searcher's gradients and trials on noise of their own are not raced")
            self._told_unraced = True


def heard(trial: Record) -> float | None:
    """What a searcher hears of a trial; None for a failure."""
    return None if trial["value"] is None else trial["value"] + trial.get("penalty", 0.0)


def better(incumbent: Incumbent | None, vector: tuple[float, ...], value: float | None) -> Incumbent | None:
    """Whichever of both has the lower full score."""
    if value is None or (incumbent is not None and value >= incumbent[1]):
        return incumbent
    return vector, value


def pause_text(failed: list[Record]) -> str:
    """Why the search pauses: the commonest reasons, each with how often it came."""
    counts = Counter(trial["reason"].rstrip(".") for trial in failed)
    reasons = "; ".join(f"{num} x {reason}" for reason, num in counts.most_common(3))
    return f"{len(failed)} of the last {WINDOW} trials failed: {reasons}. Mend the cause and run the same line again."

"""One evaluation as plain values, and how it is done: the same on every engine, in this process or in another.

What a job gives depends on the job alone (and on the problem), never on what its worker did before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.core.digests import value_digest
from lcsc.core.errors import EvaluationError, LcscError
from lcsc.core.seeds import Purpose
from lcsc.search.budget import Budget
from lcsc.search.evaluate import EarlierImages, Evaluator, Row, failed_row
from lcsc.search.problem import Problem
from lcsc.search.racing import Incumbent, Racer
from lcsc.search.rows import checked


@dataclass(frozen=True)
class Job:
    """What to score and how.

    Args:
        call: `score`, `slope` (with the derivative), `race` (may be dropped) or `full` (raced, never dropped).
        vector: point of the space.
        purpose: of the seeds.
        images: first of them and the one behind the last.
        full, resamples: as in `Evaluator.score`.
        floor: a value below it is scored again on as many images of other seeds, and the worse one counts.
        incumbent: vector and value of the candidate to beat in a race.
        earlier: what counts in the statistics of a `slope` beside its own images.
        uid: identity of the evaluation; empty until it is handed in.
    """

    call: str
    vector: tuple[float, ...]
    purpose: Purpose
    images: tuple[int, int]
    full: bool = False
    resamples: bool = False
    floor: float | None = None
    incumbent: Incumbent | None = None
    earlier: tuple[EarlierImages, ...] = ()
    uid: str = ""

    def named(self, run: str, place: str) -> Job:
        """The job with its identity: the run, the place in its plan, and what is to be done."""
        return dataclasses.replace(self, uid=value_digest([run, place, self.to_plain()])[:32])

    def key(self, budget: Budget) -> str:
        """What two jobs have in common that give the same row, where bank, operator and evaluator are the same."""
        rungs = [*budget.prefixes, *(-step for step in budget.race_steps)]
        race = [rungs, budget.num_images, budget.drop_level] if self.call in ("race", "full") else None
        return value_digest([{**self.to_plain(), "uid": ""}, race])[:16]

    def to_plain(self) -> dict[str, Any]:
        """Values for JSON."""
        plain = {**vars(self), "purpose": int(self.purpose)}
        if not self.earlier:  # jobs without are known by the keys they always had
            del plain["earlier"]
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Job:
        """What `to_plain` made."""
        rival = plain["incumbent"]
        return cls(
            **{
                **plain,
                "vector": tuple(plain["vector"]),
                "purpose": Purpose(plain["purpose"]),
                "images": tuple(plain["images"]),
                "incumbent": None if rival is None else (tuple(rival[0]), rival[1]),
                "earlier": tuple((tuple(at), tuple(images), w) for at, images, w in plain.get("earlier", ())),
            }
        )


class Performer:
    """Does the jobs of one problem.

    Args:
        problem: what they are about; its bank is read when the first job needs it.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._use(Evaluator(problem.bank, problem.operator, problem.objective, problem.space(), problem.seed))

    def perform(self, job: Job) -> Row:
        """The row of a job. Whatever goes wrong with the candidate is a row too, with its cause.

        Raises:
            LcscError: something is wrong with the problem, not with the candidate: a damaged bank, a missing file.
        """
        try:
            return checked(self._rescored(job), job)
        except Exception as error:
            if isinstance(error, LcscError) and not isinstance(error, EvaluationError):
                raise
            if not is_out_of_memory(error):
                return failed_row({}, f"{type(error).__name__}: {_one_line(error)}", 0, cause="error")
        return self._on_less_memory(job)

    def _on_less_memory(self, job: Job) -> Row:
        """Once more with half as many images a network call."""
        own, size = self._evaluator, getattr(self._evaluator.objective, "batch_size", 1)
        release_memory()
        reason = "out of memory"
        if size > 1:
            half = dataclasses.replace(own.objective, batch_size=(size + 1) // 2)  # type: ignore[type-var]
            self._use(dataclasses.replace(own, objective=half))
            try:
                return checked(self._rescored(job), job)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = f"out of memory, also with {(size + 1) // 2} images a network call"
            finally:
                self._use(own)
                release_memory()
        return failed_row({}, reason, 0, cause="oom")

    def _use(self, evaluator: Evaluator) -> None:
        budget, steps = self._problem.budget, ()
        sizes = (*budget.prefixes, budget.num_images)
        if budget.race_steps:
            steps = (*budget.race_steps, evaluator.objective.num_steps)  # type: ignore[attr-defined]
            sizes = (budget.num_images,) * len(steps)
        self._evaluator = evaluator
        self._racer = Racer(evaluator, sizes, budget.drop_level, steps) if budget.race else None

    def _rescored(self, job: Job) -> Row:
        row = self._scored(job)
        if job.floor is None or row["value"] is None or row["value"] >= job.floor or "dropped_at" in row:
            return row
        begin, end = job.images
        again = self._evaluator.score(np.array(job.vector), Purpose.RECHECK, range(end - begin))
        cost = row["image_forwards"] + again["image_forwards"]
        if again["value"] is None:
            reason = f"too good ({row['value']}), then: {again['reason']}"
            return {**again, "reason": reason, "recheck": None, "image_forwards": cost}
        worse = {"value": max(row["value"], again["value"]), "recheck": again["value"], "image_forwards": cost}
        return {**row, **worse}

    def _scored(self, job: Job) -> Row:
        vector, images = np.array(job.vector), range(*job.images)
        if self._racer and job.call == "race":
            return self._racer.race(vector, job.incumbent)
        if self._racer and job.call == "full":
            return self._racer.full(vector)
        if job.call == "slope":
            return self._evaluator.slope(vector, job.purpose, images, job.earlier)
        assert job.call == "score", job.call
        return self._evaluator.score(vector, job.purpose, images, job.full, job.resamples)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is memory that could not be had, on the processor or on a device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)
    )


def release_memory() -> None:
    """Give a device's cached memory back."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]

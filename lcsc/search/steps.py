"""The steps of a search's plan: those the journal holds are replayed, the others are evaluated, many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lcsc.search.dispatch import Dispatcher
from lcsc.search.engines.base import Result
from lcsc.search.evaluate import Row
from lcsc.search.frames import Record
from lcsc.search.job import Job
from lcsc.search.journal import Journal
from lcsc.search.progress import Progress


def unchanged(row: Row) -> Row:
    """The row as it is."""
    return row


@dataclass(frozen=True)
class Step:
    """One evaluation of the plan.

    Args:
        kind, key: of the record.
        job: what is done; its images are counted.
        finish: what becomes of the row before it is recorded.
    """

    kind: str
    key: Mapping[str, Any]
    job: Job
    finish: Callable[[Row], Row] = unchanged

    @property
    def num_images(self) -> int:
        """Images that the record's score is made of."""
        begin, end = self.job.images
        return end - begin


class Steps:
    """Does steps through journal, engine and progress display; counts what they cost."""

    def __init__(self, journal: Journal, dispatcher: Dispatcher, progress: Progress) -> None:
        self.journal, self.dispatcher, self.progress = journal, dispatcher, progress
        self.images = self.forwards = 0

    def one(self, step: Step) -> Record:
        """The record of a step."""
        return next(self.many([step]))

    def many(self, steps: Iterable[Step]) -> Iterator[Record]:
        """The records of steps that do not depend on one another, in order; evaluated as the engine has room."""
        waiting: deque[tuple[Step, str | None]] = deque()
        place = self.journal.place
        for step in steps:
            uid = None if self.journal.holds(place) else self.dispatcher.submit(step.job, f"{step.kind} {place}")
            place += 1
            waiting.append((step, uid))
            slots = self.dispatcher.slots
            if len(waiting) >= (1 if slots == 1 else 2 * slots):
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _finish(self, step: Step, uid: str | None) -> Record:
        result = None if uid is None else self.dispatcher.one(uid)
        self.images += step.num_images
        record = self.record(step.kind, step.key, result, step.finish, step.num_images)
        self.progress.step(step.kind, None, step.num_images, result is None or "inherited" in record)
        return record

    def record(
        self, kind: str, key: Mapping[str, Any], result: Result | None, finish: Callable[[Row], Row], num_images: int
    ) -> Record:
        """The journal's next record: the one it holds, else the result's row."""

        def row() -> Row:
            assert result is not None, "a step that is not in the journal was not handed in"
            return finish(result.row)

        record = self.journal.step(kind, key, row, num_images, result.seconds if result else None)
        self.forwards += record.get("image_forwards", 0)
        return record

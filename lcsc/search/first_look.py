"""The first look at baselines, on fewer images than a trial: it only decides who gets the second look."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lcsc.core.seeds import Purpose
from lcsc.search.evaluate import Row
from lcsc.search.frames import Record
from lcsc.search.job import Job
from lcsc.search.steps import Step, Steps

#: Key of a baseline's record; its `vector` is what is scored.
Key = Mapping[str, Any]


def first_looks(steps: Steps, keys: Sequence[Key], few: int, num: int) -> Iterator[Record]:
    """The records of baselines scored on the first `few` images of the `num` that a trial is scored on.

    Scores depend on the number of images, so the first baseline that can be scored, the anchor, is scored on all of
    them too, and the others' values are estimates: its full score, plus the difference on the images both have seen.
    Records of estimates say so: `prefix_value` is the score on `images`. The anchor's own few are a record of kind
    `look`.
    """

    def job(key: Key, images: int) -> Job:
        return Job("score", tuple(key["vector"]), Purpose.SEARCH, (0, images))

    left = deque(keys)
    shift: float | None = None
    while left and shift is None:
        key = left.popleft()
        whole = steps.one(Step("baseline", key, job(key, num)))
        yield whole
        if whole["value"] is not None:
            part = steps.one(Step("look", {"label": key["label"], "vector": key["vector"]}, job(key, few)))
            shift = None if part["value"] is None else whole["value"] - part["value"]
    if left:
        assert shift is not None, "the loop ends with one or the other"
        yield from steps.many(Step("baseline", key, job(key, few), _estimate(shift, few)) for key in left)


def _estimate(shift: float, few: int) -> Callable[[Row], Row]:
    def finish(row: Row) -> Row:
        value = row["value"]
        return row if value is None else {**row, "value": value + shift, "prefix_value": value, "images": few}

    return finish

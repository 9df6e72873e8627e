"""A search without images or networks, through the real journal, loop and run directory, in a tenth of a second.

`search(folder)` is one start of the line; it leaves run.json, journal.jsonl, timing.jsonl and summary.json.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from helpers_line import Line, Plain

from lcsc.core.files import write_json
from lcsc.core.registry import build
from lcsc.objectives.base import Score
from lcsc.search.budget import Budget
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.rundir import open_run_dir


class Three(Line):
    """Three numbers; two baseline families."""

    rows = (("a", "near", [1.0, 1.0, 1.0]), ("b", "far", [3.0, 3.0, 3.0]))


@dataclasses.dataclass
class Distance(Plain):
    """From the origin; takes `seconds`."""

    seconds: float = 0.0

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        time.sleep(self.seconds)
        return Score(float(np.hypot.reduce(candidate.x)) + 1, len(images), 1, 0.1 if full else None)


def search(runs, num_trials=4, seconds=0.0, journal_type=Journal, searcher="random", note=lambda _: None):
    """Begin or continue; returns the run directory."""
    budget = Budget(num_trials, 10, 2, 20, 30, batch_size=3)
    problem = Problem(None, Three(), build("searcher", searcher), Distance(seconds), budget, 0)
    info = {"name": "small", "config": {"search": dataclasses.asdict(budget)}, "fingerprints": {"bank": "abc"}}
    run, state = open_run_dir(runs, runs / "run", info, note)
    if state == "finished":
        return run.path
    with Progress("small", 0, quiet=True) as progress, journal_type(run.path, note) as journal:
        outcome = Search(problem, journal, progress).run()
        found = {"winner": outcome.winner["label"], "value": outcome.reports[0]["value"]}
        write_json(run.path / "summary.json", {**found, "images": outcome.images_sampled})
    return run.path

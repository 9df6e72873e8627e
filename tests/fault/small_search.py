"""A search without images or networks, through the real journal, loop and run directory, in a tenth of a second.

`search(folder)` is one start of the line; it leaves run.json, journal.jsonl, timing.jsonl and summary.json.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from lcsc.core.files import write_json
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.objectives.base import Score
from lcsc.operators.base import Baseline
from lcsc.search.budget import Budget
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.rundir import open_run_dir


@dataclasses.dataclass
class Weights:
    """A candidate reduced to its point."""

    x: np.ndarray
    recipe = {"operator": "line"}


class Line:
    """Three numbers; two baseline families."""

    def space(self, bank):
        return SearchSpace((Box("x", 3),))

    def apply(self, bank, point):
        return Weights(np.asarray(point["x"]))

    def baselines(self, bank):
        return [Baseline("a", "near", {"x": np.ones(3)}), Baseline("b", "far", {"x": 3 * np.ones(3)})]


@dataclasses.dataclass
class Distance:
    """From the origin; takes `seconds`."""

    seconds: float = 0.0
    name: str = "distance"
    min_images: int = 2

    def floor(self):
        return None

    def circumstances(self):
        return {"nfe": 1}

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        time.sleep(self.seconds)
        return Score(float(np.hypot.reduce(candidate.x)) + 1, len(images), 1, 0.1 if full else None)


def search(runs, num_trials=4, seconds=0.0, journal_type=Journal, searcher="random", note=lambda _: None):
    """Begin or continue; returns the run directory."""
    budget = Budget(num_trials, 10, 2, 20, 30, batch_size=3)
    problem = Problem(None, Line(), build("searcher", searcher), Distance(seconds), budget, 0)
    info = {"name": "small", "config": {"search": dataclasses.asdict(budget)}, "fingerprints": {"bank": "abc"}}
    run, state = open_run_dir(runs, runs / "run", info, note)
    if state == "finished":
        return run.path
    with Progress("small", 0, quiet=True) as progress, journal_type(run.path, note) as journal:
        outcome = Search(problem, journal, progress).run()
        found = {"winner": outcome.winner["label"], "value": outcome.reports[0]["value"]}
        write_json(run.path / "summary.json", {**found, "images": outcome.images_sampled})
    return run.path

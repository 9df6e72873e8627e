"""How much room a run directory takes, told before the search starts. All numbers are bytes.

The numbers below were measured on finished runs; a run takes what is predicted within 10 % (tests/unit/test_disk.py),
unless the user's own names and errors are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcsc.core.errors import ConfigError
from lcsc.core.files import free_bytes
from lcsc.search.plan import NUM_MEMBERS, num_steps

if TYPE_CHECKING:  # looking at a run needs no torch
    from lcsc.operators.base import Baseline
    from lcsc.search.problem import Problem

ROW, TIME_ROW = 205, 77  #: a line of the journal without its numbers, and one of timing.jsonl
VECTOR, COEF, ZERO = 19.5, 15.4, 4  #: a number of a vector or derivative, of a coefficient, of a coefficient of 0
#: summary, run.json, model card and config; the report and its pictures; a picture of n numbers of images, by sqrt(n)
FILES, REPORT, GRID = 40_000, 1_000_000, 2000
CURVE_ROW = 44  #: a line of report/convergence.csv
NUM_ROWS, NUM_SAMPLES, PACKED = 5, 64, 0.75  #: rows of samples.npz, images in each, and what compression leaves


def run_bytes(problem: Problem, *, slopes: bool) -> int:
    """What a finished run directory takes.

    Args:
        problem: what is searched.
        slopes: whether the searcher asks for derivatives, which the journal keeps.
    """
    bank, budget = problem.bank, problem.budget
    K, size = bank.num_checkpoints, problem.space().size
    baselines: Sequence[Baseline] = problem.operator.baselines(bank)
    families = len({baseline.family for baseline in baselines})
    looks = NUM_MEMBERS * families
    steps = num_steps(len(baselines), budget.num_trials, budget.num_finalists, looks, families)
    trial = ROW + VECTOR * size * (2 if slopes else 1) + COEF * K
    short = ROW + VECTOR * size + (COEF + ZERO) / 2 * K  # most baselines leave checkpoints out
    journal = budget.num_trials * trial + (steps - budget.num_trials) * short
    pages = REPORT + CURVE_ROW * steps + _grid(problem)
    return int(4 * bank.layout.num_parameters + journal + TIME_ROW * steps + pages + FILES)


def _grid(problem: Problem) -> int:
    """Sample images, and the pictures of them."""
    if not hasattr(problem.objective, "images"):
        return 0
    numbers = NUM_ROWS * NUM_SAMPLES * problem.objective.dataset.images()[0].numel()  # type: ignore[attr-defined]
    return int(GRID * numbers**0.5 + PACKED * 4 * numbers)


def need_room(path: Path, nbytes: int) -> None:
    """Refuse a run directory that its disk has no room for.

    Raises:
        ConfigError: with both numbers.
    """
    if (free := free_bytes(path)) < nbytes:
        raise ConfigError(
            f"the run directory `{path}` will take about {nbytes:,} bytes and its disk has {free:,} free. Make room, "
            "or put it elsewhere with `run_dir` or `runs_dir`."
        )

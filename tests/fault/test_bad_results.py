"""A user's function that returns nonsense: each result is a failure with a reason, and never wins."""

from __future__ import annotations

import math

import bad_results
import pytest

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build, discover
from lcsc.search.budget import Budget
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress

IN_EVERY_RUN = ("one_plus_one",)
NAMES = [pytest.param(n, marks=() if n in IN_EVERY_RUN else pytest.mark.faults) for n in sorted(discover("searcher"))]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    net = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
    trainer = build("trainer", "gaussian_toy", num_checkpoints=4)
    parts = {"model": build("model", "direct"), "dataset": build("dataset", "gaussian")}
    folder = trainer.train(arch=net, **parts, out=tmp_path_factory.mktemp("bank") / "b", seed=0, progress=False)
    return CheckpointBank.open(folder)


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_is_a_failure_with_a_reason_and_never_wins(bank, tmp_path, name, count):
    table, bad_results.calls[:] = bad_results.TABLE, []
    objective = build("objective", "function", function="bad_results:score", device="cpu")
    budget = Budget(3 * len(table), 10, 3, 10, 10)
    problem = Problem(bank, build("operator", "linear"), build("searcher", name), objective, budget, seed=0)
    try:
        problem.searcher.start(problem.task())
    except ConfigError as error:
        assert "has no derivative" in str(error)  # noqa: PT017 - searchers that need one are refused, the others are not
        return
    with Progress("bad", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        outcome = Search(problem, journal, progress).run()
    records, _ = read_records(tmp_path / "journal.jsonl")
    scored = [record for record in records if record["kind"] in ("baseline", "trial") and "block" not in record]
    assert len(scored) == len(bad_results.calls)
    assert sum(record["kind"] == "trial" for record in records) == budget.num_trials
    for record, result in zip(scored, bad_results.calls, strict=True):
        if any(result is bad for bad in bad_results.NONSENSE):
            assert (record["value"], record["status"]) == (None, "failed"), type(result)
        if record["value"] is None:
            assert record["reason"]
            assert record["cause"] in ("invalid", "error", "oom")
        else:
            assert math.isfinite(record["value"])
    assert outcome.winner["value"] >= bad_results.LEAST
    assert all(report["value"] >= bad_results.LEAST for report in outcome.reports)
    assert sum(any(result is bad for bad in bad_results.NONSENSE) for result in bad_results.calls) >= 40
    count(f"bad_results_{name}", results=len(table), trials=budget.num_trials, failed=outcome.num_failed)

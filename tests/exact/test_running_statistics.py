"""A descent whose statistics hold images of its last steps: the derivative, and one journal whoever remembers what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_slope import bank, objective  # noqa: F401 (a fixture)

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.objectives.base import why_no_memory
from lcsc.operators.linear import Linear
from lcsc.search.budget import Budget
from lcsc.search.engines.base import Closing, Result
from lcsc.search.evaluate import Evaluator
from lcsc.search.frames import read_records
from lcsc.search.job import Job, Performer
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress

FIRST, SECOND = (0.3, -0.2, 0.1), (0.1, 0.0, -0.1)
EARLIER = ((FIRST, (0, 40), 0.5), (SECOND, (40, 80), 0.25))


def evaluator(bank):  # noqa: F811
    return Evaluator(bank, Linear(), objective(num_steps=2), Linear().space(bank), 0)


def features_of(bank, z, images):  # noqa: F811
    scorer = objective(num_steps=2)
    return scorer.seen(Linear().apply(bank, {"z": np.array(z)}), seed=0, purpose=Purpose.FRESH, images=images)


def test_the_derivative_is_that_of_the_weighted_statistics(bank):  # noqa: F811
    z, images = np.zeros(3), range(80, 120)
    row = evaluator(bank).slope(z, Purpose.FRESH, images, EARLIER)
    scorer, old = objective(num_steps=2), [(features_of(bank, at, range(*span)), w) for at, span, w in EARLIER]
    reference = scorer._reference(scorer.metric, "search")

    def value(shift):
        """The distance of the weighted statistics, dense and in float64, where the new images moved."""
        rows = [(features_of(bank, z + shift, images), 1.0), *old]
        f_ND = torch.cat([features for features, _ in rows]).double()
        w_N = torch.cat([torch.full((len(features),), w, dtype=torch.float64) for features, w in rows])
        w_N = w_N / w_N.sum()
        mean_D = w_N @ f_ND
        cov_DD = (f_ND - mean_D).T @ ((f_ND - mean_D) * w_N[:, None]) / (1 - (w_N**2).sum())
        inner = torch.linalg.eigvalsh(reference.root_DD.T @ cov_DD @ reference.root_DD).clamp(min=0)
        gap = (mean_D - reference.mean_D).square().sum()
        return float(gap + reference.trace + cov_DD.trace() - 2 * inner.sqrt().sum()), float(w_N[:40].sum())

    at, share = value(np.zeros(3))
    assert row["value"] == pytest.approx(at, rel=1e-9)
    step = 1e-2
    wanted = [(value(step * side)[0] - value(-step * side)[0]) / (2 * step) / share for side in np.eye(3)]
    np.testing.assert_allclose(row["gradient"], wanted, rtol=5e-3, atol=5e-3 * np.abs(wanted).max())


def test_what_was_not_seen_here_is_sampled_again_bit_for_bit(bank):  # noqa: F811
    kept, fresh = evaluator(bank), evaluator(bank)
    for place, (at, span, _) in enumerate(EARLIER):
        kept.slope(np.array(at), Purpose.FRESH, range(*span), EARLIER[:place])
    where = (np.zeros(3), Purpose.FRESH, range(80, 120), EARLIER)
    assert kept.slope(*where) == fresh.slope(*where)
    assert len(kept._seen) == 3


def test_a_step_without_memory_is_the_step_of_before(bank):  # noqa: F811
    z, images = np.zeros(3), range(40)
    candidate = Linear().apply(bank, {"z": z})
    slopes = [
        objective(num_steps=2).slope(candidate, seed=0, purpose=Purpose.FRESH, images=images, **more)
        for more in ({}, {"earlier": ()})
    ]
    assert slopes[0].value == slopes[1].value
    assert torch.equal(slopes[0].grad_P, slopes[1].grad_P)


class Several(Closing):
    """Workers that take turns, each with a memory of its own."""

    slots = 1

    def __init__(self, problem, num, stop_after=None):
        self._workers, self._left, self._done = [Performer(problem) for _ in range(num)], stop_after, []

    def submit(self, job: Job):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left = None if self._left is None else self._left - 1
        worker = self._workers.pop(0)
        self._workers.append(worker)
        self._done.append(Result(job.uid, worker.perform(job), 1.0, "somebody"))

    def collect(self, timeout=None):
        done, self._done = self._done, []
        return done


def test_one_journal_whether_interrupted_and_whoever_works(bank, tmp_path):  # noqa: F811
    searcher = build("searcher", "gradient", step_images=20, reach=1.0)
    budget = Budget(6, 24, 2, 20, 20, num_images_baselines=20)
    problem = Problem(bank, Linear(), searcher, objective(num_steps=2), budget, 0)

    def run(folder, crew=None):
        folder.mkdir(exist_ok=True, parents=True)
        with Progress("", 0, quiet=True) as progress, Journal(folder, print) as journal:
            Search(problem, journal, progress, crew).run()
        return (folder / "journal.jsonl").read_bytes()

    whole = run(tmp_path / "a" / "run")
    records = read_records(tmp_path / "a" / "run" / "journal.jsonl")[0]
    begun = next(place for place, record in enumerate(records) if record["kind"] == "trial")
    with pytest.raises(KeyboardInterrupt):  # two workers take turns for four trials
        run(tmp_path / "b" / "run", Several(problem, 2, stop_after=begun + 3))
    assert run(tmp_path / "b" / "run") == whole
    trials = [record for record in records if record["kind"] == "trial"]
    assert [record["image_forwards"] for record in trials] == [4 * 20 * 2] * 6


def test_who_cannot_weigh_images_says_so(bank):  # noqa: F811
    kernel = objective(metric="kid_pixels", num_steps=2)
    assert why_no_memory(kernel) == "metric `kid_pixels` weighs all images alike"
    assert why_no_memory(objective()) is None
    problem = Problem(bank, Linear(), build("searcher", "gradient", reach=1.0), kernel, Budget(5, 70), 0)
    with pytest.raises(ConfigError, match="`searcher.reach` is 1.0, but metric `kid_pixels` weighs all images alike"):
        problem.searcher.start(problem.task())

"""A pipeline whose processes are killed with SIGKILL at random times: it goes on, and with the right numbers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers_pipeline import ARCH, STAGES, trainer, unsplit, windows

from lcsc.core.errors import RunError
from lcsc.recycling.failures import Failure
from lcsc.training.failing_stages import Recovery
from lcsc.training.pipeline import Kill, run_pipeline
from lcsc.training.pipeline_worker import Plan

STEPS = 24

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]


def plan(folder, strategy, *, swapped=False, steps=STEPS, patience=20):
    recovery = Recovery(STAGES, "checkfree_plus", swapped)
    how = {"period": 5, "seed": 5, "patience_seconds": patience}
    return Plan(ARCH, windows(steps), trainer(steps), recovery, strategy, folder, **how)


def random_kills(seed, num=4):
    """Steps far enough from one another that no two stages die together; any moment within two steps."""
    rng = np.random.default_rng(seed)
    steps = range(2, STEPS - 2, 5)[:num]
    return [Kill(step, int(rng.integers(STAGES)), float(rng.uniform(0, 0.1))) for step in steps]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("strategy", "swapped"), [("neighbours", False), ("neighbours", True), ("checkpoint", False), ("redundant", False)]
)
def test_killed_stages_come_back_with_the_right_numbers(tmp_path, count, strategy, swapped, seed):
    kills = random_kills(seed)
    told = plan(tmp_path / "work", strategy, swapped=swapped)
    story = run_pipeline(told, kills)
    assert sorted(s for event in story.events for s in event["lost"]) == sorted(kill.stage for kill in kills)
    # neighbours: as the whole network in one process with these failures; the others: as if nothing had failed
    failures = [Failure(event["step"], s) for event in story.events for s in event["lost"]]
    wanted, _ = unsplit(told.recovery, STEPS, failures if strategy == "neighbours" else [])
    assert set(story.tensors) == set(wanted)
    different = [name for name in wanted if not torch.equal(story.tensors[name], wanted[name])]
    name = f"pipeline_{strategy}{'_swapped' if swapped else ''}_{seed}"
    count(name, strategy=strategy, kills=len(kills), tensors=len(wanted), different=len(different))
    assert different == []
    assert sorted(story.losses) == list(range(STEPS))
    assert multiprocessing.active_children() == []


def test_stages_that_die_together_end_the_training_with_a_sentence(tmp_path):
    for strategy, rescued in (("neighbours", False), ("redundant", False), ("checkpoint", True)):
        kills = [Kill(6, 1), Kill(6, 2)]
        if rescued:
            story = run_pipeline(plan(tmp_path / strategy, strategy), kills)
            assert story.events[-1]["step"] <= 7
        else:
            with pytest.raises(RunError, match=r"stages \[1, 2\] died together"):
                run_pipeline(plan(tmp_path / strategy, strategy), kills)
        assert multiprocessing.active_children() == []


def test_a_process_that_hangs_is_replaced(tmp_path):
    told = plan(tmp_path / "work", "redundant", patience=4)
    story = run_pipeline(told, [Kill(6, 2, hang=True)])
    assert [event["lost"] for event in story.events] == [[2]]
    wanted, _ = unsplit(told.recovery, STEPS, [])
    assert all(torch.equal(story.tensors[name], wanted[name]) for name in wanted)


def supervise(folder):
    run_pipeline(plan(folder, "neighbours", steps=10_000))


def test_no_process_outlives_a_supervisor_that_is_killed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=supervise, args=(tmp_path / "work",))
    process.start()
    workers = set()
    until = time.monotonic() + 60
    while len(workers) < STAGES + 1 and time.monotonic() < until:  # the fork server and its children
        workers = descendants(process.pid)
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(workers) >= STAGES + 1
    until = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]


def descendants(pid):
    import psutil

    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def alive(pid):
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

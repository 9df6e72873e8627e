"""A whole node lost, and the driver killed, on a real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers_ray import SMALL, calls, enter, everything, job, site_of

from lcsc.search.engines import ray as engine_file
from lcsc.search.engines.ray import Ray


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own folder with the toy's checkpoints and the faulty objective."""
    enter(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def away(here):
    """A cluster that is not ours: a head with one processor. Nothing of this process is connected to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "a" * 64))
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "4")

        import ray  # reads the environment
        from ray.cluster_utils import Cluster as Nodes

        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
        yield nodes
        assert not ray.is_initialized()  # the crew left
        nodes.shutdown()


@pytest.mark.faults
def test_what_kills_crashes_or_hangs_every_worker_costs_one_evaluation(here):
    for n, how in {3: "kill", 5: "crash", 17: "hang"}.items():
        Path(f"fault-{n}").write_text(how)
    site = site_of(here)
    size = site.problem.space().size
    with Ray(num_workers=2, max_restarts=1, timeout_seconds=60).start(site) as crew:
        found = everything(crew, {n: job(n, size) for n in range(10)})
        found |= everything(crew, {n: job(n, size) for n in range(10, 20)})
    good = {n: result.row["value"] - found[0].row["value"] for n, result in found.items() if n not in (3, 5, 17)}
    assert good == pytest.approx({n: n for n in good})
    assert {n: found[n].row["cause"] for n in (3, 5, 17)} == {3: "killed", 5: "crashed", 17: "timeout"}
    assert "Segmentation fault" in found[5].row["reason"]
    tried = [n for n, _ in calls()]
    assert [tried.count(n) for n in range(20)] == [2 if n in (3, 5) else 1 for n in range(20)]


@pytest.mark.faults
def test_an_evaluation_that_hangs_is_killed_though_nobody_set_a_limit(here, monkeypatch):
    monkeypatch.setattr("lcsc.search.patience.LEAST", 1.0)
    Path("fault-5").write_text("hang")
    site = site_of(here)
    size = site.problem.space().size
    with Ray(num_workers=1).start(site) as crew:
        found = everything(crew, {n: job(n, size) for n in range(7)})
    assert [n for n in range(7) if found[n].row["value"] is None] == [5]
    assert found[5].row["cause"] == "timeout"
    assert "`engine.timeout_seconds` sets another limit" in found[5].row["reason"]
    assert [n for n, _ in calls()] == list(range(7))


@pytest.mark.faults
def test_a_lost_node_costs_no_evaluation_and_is_used_again_when_it_is_back(away, here):
    second = away.add_node(num_cpus=1)
    for n in range(12):
        Path(f"fault-{n}").write_text("wait 0.5")
    site = site_of(here)
    size = site.problem.space().size
    jobs = {n: job(n, size) for n in range(12)}
    with Ray(address=away.address, max_restarts=-1, bank="store").start(site) as crew:
        everything(crew, {100: job(100, size), 101: job(101, size)})  # imports, on either node
        for handed in jobs.values():
            crew.submit(handed)
        found = [*crew.collect()]
        away.remove_node(second, allow_graceful=False)
        fewest = crew.slots
        while len(found) < len(jobs):
            found += crew.collect()
            fewest = min(fewest, crew.slots)
        assert fewest == 1
        assert {result.uid for result in found} == {handed.uid for handed in jobs.values()}
        assert len(found) == len(jobs)
        assert [result.row["status"] for result in found] == ["ok"] * len(jobs)
        away.add_node(num_cpus=1)
        end = time.monotonic() + 120
        while crew.slots < 2 and time.monotonic() < end:
            crew.collect(timeout=1)
        assert crew.slots == 2
        workers = {result.worker for result in everything(crew, {n: job(n, size) for n in range(20, 30)}).values()}
        assert workers == {"ray-0", "ray-1"}
        (copy,) = {member.told["file"] for member in crew._members}  # both nodes are on this machine
        assert copy.exists()
    assert not copy.exists()
    assert len(list(away.list_all_nodes())) == 2  # left running


DRIVER = """
import sys
from lcsc.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.faults
def test_a_driver_that_is_killed_leaves_no_process_and_its_run_is_continued(here):
    words = ["search", *SMALL, "engine=ray", "engine.num_workers=2"]
    env = {**os.environ, "PYTHONPATH": str(Path(engine_file.__file__).parents[3])}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *words, "run_dir=killed"], env=env, cwd=here)
    journal = here / "killed" / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
        assert driver.poll() is None
        time.sleep(0.05)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) >= 6
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=90)
    assert alive == []
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *words, "run_dir=killed"], env=env, cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    inline = [word for word in words if not word.startswith("engine")]
    again = [sys.executable, "-c", DRIVER, *inline, "run_dir=inline"]
    whole = subprocess.run(again, env=env, cwd=here, capture_output=True, text=True)
    assert journal.read_bytes() == (here / "inline" / "journal.jsonl").read_bytes()
    assert done.stdout.replace("killed", "inline") == whole.stdout

"""engine=slurm with submitit's real local cluster, and workers killed, stopped, preempted and hung."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers_cli import TOY
from helpers_slurm import install

from lcsc.bank import CheckpointBank
from lcsc.cli.main import main
from lcsc.core.errors import ConfigError, LcscError
from lcsc.core.files import write_json
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.models.gaussian import GaussianDenoiser
from lcsc.models.network import save_network
from lcsc.search.budget import Budget
from lcsc.search.desk import Desk
from lcsc.search.engines.base import Crew, Engine, Site
from lcsc.search.engines.slurm import Slurm
from lcsc.search.frames import read_records
from lcsc.search.job import Job
from lcsc.search.lease import DRIVER, Beat, read_beat, read_beats
from lcsc.search.problem import Problem
from lcsc.search.queue import Queue
from lcsc.search.setup import describe_problem, fingerprints
from lcsc.search.shift import Shift, Terms
from lcsc.search.worker import order, read_result

#: The number of images says what the function does.
QUICK, HELD, CRASH, HANG = 1, 2, 3, 4
FUNCTION = """
import os, pathlib, time

def score(model, *, seed, purpose, images):
    here = pathlib.Path(__file__).parent
    if len(images) == 2:
        while not (here / "go").exists():
            time.sleep(0.01)
    if len(images) == 3:
        os._exit(3)
    if len(images) == 4:
        time.sleep(1000)
    print("said by the function")
    return images.start + 0.5
"""
FAST = {"cluster": "local", "lease_seconds": 2.0, "poll_seconds": 0.1}
SEARCH = ["search", *TOY, "search.num_trials=20", "search.batch_size=4", "quiet=true"]
ENGINE = ["engine=slurm", "engine.cluster=local", "engine.num_workers=2", "engine.poll_seconds=0.1"]


def until(condition, crew=None, patience=600):
    """Wait; the results that came meanwhile."""
    results, deadline = [], time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        if crew is None:
            time.sleep(0.01)
        else:
            results += crew.collect(0.05)
    return results


def collect(crew, num):
    """So many results by uid."""
    results = []
    while len(results) < num:
        results += crew.collect()
    assert len(results) == num
    return {result.uid: result for result in results}


def job(kind, start=0):
    return Job("score", (0.0,), Purpose.SEARCH, (start, start + kind)).named("run", f"trial {kind} {start}")


def kill(pid, signum=signal.SIGKILL):
    os.kill(pid, signum)


def begun(site, crew, *others):
    """The beat of a worker that has begun the job HELD and is none of `others`."""
    until(lambda: at_work(site.folder, job(HELD), *others), crew)
    return at_work(site.folder, job(HELD), *others)


def at_work(folder, found, *others):
    """The beat of a worker that is at a job and none of `others`, None where nobody is."""
    rows = [{"name": name, **facts} for name, facts in read_beats(folder / "work" / "beats").items()]
    return next((row for row in rows if row["uid"] == found.uid and row["name"] not in others), None)


def logs(folder):
    return "".join(path.read_text() for path in sorted((folder / "work" / "submitit").glob("*.out")))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A search whose scores come from FUNCTION."""
    name = f"held_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for step in (1, 2):
        net = GaussianDenoiser((1, 1, 1))
        torch.nn.init.constant_(next(net.parameters()), step)
        save_network(net, tmp_path / "bank" / f"checkpoint-{step}" / "unet")
    problem = Problem(
        CheckpointBank.open(Path("bank")),
        build("operator", "linear"),
        build("searcher", "random"),
        build("objective", "function", function=f"{name}:score", device="cpu"),
        Budget(),
        0,
    )
    (tmp_path / "run").mkdir()
    notes = []
    site = Site(problem, describe_problem(problem), fingerprints(problem), Path("run"), notes.append)
    object.__setattr__(site, "notes", notes)
    return site


def go(site):
    (site.folder.parent / "go").touch()


# ------------------------------------------------------------------------------------------------- the search


def journal(run):
    return (run / "journal.jsonl").read_bytes()


@pytest.mark.faults  # half a minute of processes; a killed worker's job, and Ray's whole search, are in `make test`
def test_a_search_with_a_killed_worker_leaves_the_journal_of_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lcsc.cli.watch.PAUSE", math.inf)
    assert main([*SEARCH, "run_dir=inline"]) == 0
    killed, over = [], threading.Event()

    def kill_one():
        """Kill an evaluating process once three evaluations are done."""
        while len(list((tmp_path / "slurm" / "work" / "results").glob("*.json"))) < 3 and not over.wait(0.01):
            pass
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "lcsc.search.child" in words and str(tmp_path) in " ".join(words):
                process.kill()
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert main([*SEARCH, *ENGINE, "engine.num_workers=1", "run_dir=slurm"]) == 0
    over.set()
    killer.join()
    assert len(killed) == 1
    assert journal(tmp_path / "slurm") == journal(tmp_path / "inline")
    # all ended, and nothing is open
    assert sorted(path.name for path in (tmp_path / "slurm" / "work").iterdir()) == sorted(
        ["beats", "claims", "jobs", "order.json", "results", "stop", "submitit"]
    )
    for name in ("beats", "claims", "jobs"):
        assert list((tmp_path / "slurm" / "work" / name).iterdir()) == []


def test_the_parts_are_what_they_say():
    assert isinstance(Slurm(), Engine)
    wrong = {
        "extra": "qos",
        "num_workers": 0,
        "time_minutes": 0,
        "lease_seconds": 0.0,
        "poll_seconds": -1.0,
        "max_restarts": -1,
    }
    for name, value in {**wrong, "timeout_seconds": math.nan}.items():
        with pytest.raises(ConfigError, match=f"`engine.{name}` is `?{value}`?; (it must be|write parameters by name)"):
            Slurm(**{name: value})


def test_what_submitit_does_not_know_is_said_in_a_sentence(site):
    with pytest.raises(ConfigError, match=r"(?s)cluster `local`: .*qqq.*Start it where sbatch"):
        Slurm(**FAST, extra={"qqq": "high"}).start(site)
    with pytest.raises(ConfigError, match="cluster `slurm`: Could not detect"):
        Slurm().start(site)
    with pytest.raises(ConfigError, match="cluster `moon`: .*moon"):
        Slurm(cluster="moon").start(site)


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.faults
def test_a_killed_child_costs_nothing(site):
    with Slurm(**FAST, num_workers=1).start(site) as crew:
        assert isinstance(crew, Crew)
        crew.submit(job(HELD))
        worker = begun(site, crew)
        crew.submit(job(QUICK, 7))  # later, or the worker might take it first
        kill(worker["child"])
        until(lambda: (at_work(site.folder, job(HELD)) or worker)["child"] != worker["child"], crew)
        go(site)
        found = {result.uid: result for result in crew.collect()}
        found |= collect(crew, 2 - len(found))
        assert {uid: result.row["value"] for uid, result in found.items()} == {
            job(HELD).uid: 0.5,
            job(QUICK, 7).uid: 7.5,
        }
        assert {result.worker for result in found.values()} == {worker["name"]}


@pytest.mark.slow
def test_a_job_whose_worker_is_killed_is_done_by_another(site):
    with Slurm(**FAST, num_workers=2).start(site) as crew:
        crew.submit(job(HELD))
        first = begun(site, crew)
        kill(first["pid"])  # its child ends with it
        until(lambda: not Path(f"/proc/{first['child']}").exists(), crew)
        begun(site, crew, first["name"])
        go(site)
        (result,) = collect(crew, 1).values()
        assert (result.row["value"], result.worker != first["name"]) == (0.5, True)
        until(lambda: len(crew._array.jobs) == 2 and crew.slots == 2, crew)  # replaced
        assert crew.collect(0.5) == []


@pytest.mark.faults
def test_a_stopped_workers_late_result_counts_for_nothing(site):
    with Slurm(**FAST, num_workers=2).start(site) as crew:
        crew.submit(job(HELD))
        slow = begun(site, crew)
        for pid in (slow["pid"], slow["child"]):
            kill(pid, signal.SIGSTOP)
        quick = begun(site, crew, slow["name"])
        go(site)
        (result,) = collect(crew, 1).values()
        assert result.worker == quick["name"]
        for pid in (slow["child"], slow["pid"]):
            kill(pid, signal.SIGCONT)
        beat = site.folder / "work" / "beats" / f"{slow['name']}.json"
        assert until(lambda: (read_beat(beat) or {}).get("done") == 1, crew) == []
        crew.submit(job(QUICK, 7))
        assert list(collect(crew, 1)) == [job(QUICK, 7).uid]
        until(lambda: slow["name"] in crew._desk.alive, crew)


@pytest.mark.faults
@pytest.mark.parametrize(("minutes", "case"), [(60, "preempted"), (5, "timed-out")])
def test_a_preempted_worker_gives_its_job_back_and_begins_anew(site, minutes, case):
    with Slurm(**FAST, num_workers=1, time_minutes=minutes).start(site) as crew:
        crew.submit(job(HELD))
        first = begun(site, crew)
        kill(first["pid"], signal.SIGUSR2)  # what SLURM sends; submitit takes it for one or the other by the time left
        second = begun(site, crew, first["name"])
        assert second["name"].rpartition("-")[0] == first["name"].rpartition("-")[0]  # the same job of the cluster
        assert crew._desk._lost == {}
        go(site)
        (result,) = collect(crew, 1).values()
        assert (result.row["value"], result.worker) == (0.5, second["name"])
        assert f"this job is {case}" in logs(site.folder)
        assert "Requeued job" in logs(site.folder)


@pytest.mark.faults
def test_a_hung_job_is_a_row(site):
    with Slurm(**FAST, num_workers=1, timeout_seconds=10.0).start(site) as crew:
        crew.submit(job(HANG))
        until(lambda: at_work(site.folder, job(HANG)), crew)
        child = at_work(site.folder, job(HANG))["child"]
        (result,) = collect(crew, 1).values()
        assert (result.row["status"], result.row["cause"]) == ("failed", "timeout")
        assert result.row["reason"] == "took longer than `engine.timeout_seconds`, 10 s, and was killed"
        assert not Path(f"/proc/{child}").exists()
        beat = site.folder / "work" / "beats" / f"{result.worker}.json"
        until(lambda: read_beat(beat)["child"] != child, crew)  # the worker goes on


@pytest.mark.faults
def test_a_worker_kills_what_hangs_by_the_pace_in_the_drivers_beat(site, monkeypatch):
    monkeypatch.setattr("lcsc.search.patience.LEAST", 1.0)  # the worker is a thread of this process, its child is not
    work, done = site.folder.resolve() / "work", []
    tray, beats = Queue(work), work / "beats"
    write_json(work / "order.json", order(site))
    desk = Desk(tray, 60.0)
    worker = threading.Thread(target=lambda: done.append(Shift(work, "w", Terms(0.5, 60.0, 0.1, None)).run()))
    with Beat(beats, DRIVER, 0.1) as beat:
        for number in range(5):
            desk.submit(job(QUICK, number))
        worker.start()
        until(lambda: desk.results() == [] and desk.num_open == 0)
        assert desk.patience.paces["score"][:2] == (5, 1)
        beat.say(patience=desk.patience.paces)
        desk.submit(job(HANG))
        until(lambda: desk.results() == [] and read_result(work / "results", job(HANG).uid))
        (work / "stop").touch()
        worker.join()
    row = read_result(work / "results", job(HANG).uid).row
    assert (row["value"], row["cause"]) == (None, "timeout")
    assert "`engine.timeout_seconds` sets another limit" in row["reason"]
    assert done == [6]


@pytest.mark.faults
def test_crashing_and_meddled_jobs_are_rows(site):
    with Slurm(**FAST, num_workers=1).start(site) as crew:
        garbage = site.folder / "work" / "results" / f"{job(QUICK, 7).uid}.json"
        garbage.write_text("00000000 {}\n")
        jobs = [job(CRASH), job(QUICK, 7)]
        for each in jobs:
            crew.submit(each)
        found = collect(crew, 2)
        crash, quick = (found[each.uid].row for each in jobs)
        assert (crash["status"], crash["cause"]) == ("failed", "crashed")
        assert crash["reason"] == "the evaluating process ended with exit code 3, 2 times"
        assert quick["value"] == 7.5
        crew.submit(job(QUICK, 9))
        assert list(collect(crew, 1)) == [job(QUICK, 9).uid]
        garbage = site.folder / "work" / "results" / f"{job(QUICK, 8).uid}.json"
        whole = (site.folder / "work" / "results" / f"{job(QUICK, 9).uid}.json").read_bytes()
        garbage.write_bytes(whole[: len(whole) // 2])
        crew.submit(job(QUICK, 8))
        assert collect(crew, 1)[job(QUICK, 8).uid].row["value"] == 8.5
    assert "said by the function" in logs(site.folder)


@pytest.mark.faults
def test_workers_that_never_start_are_said_with_their_log(site, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with Slurm(**FAST, num_workers=2).start(site) as crew:
        crew.submit(job(QUICK))
        with pytest.raises(LcscError, match=r"none of 2 workers started. The log of one of them, `.*_log.out`, ends:"):
            crew.collect()


@pytest.mark.faults
def test_workers_of_another_problem_refuse(site):
    site.fingerprints["bank"] = "another"
    with Slurm(**FAST, num_workers=1).start(site) as crew:
        crew.submit(job(QUICK))
        with pytest.raises(LcscError, match=r"no worker can work: worker .* would score otherwise .*bank"):
            crew.collect()
    assert any("cannot work" in note for note in site.notes)


@pytest.mark.faults
def test_workers_that_keep_dying_end_the_search(site):
    with Slurm(**FAST, num_workers=1, max_restarts=1).start(site) as crew:
        crew.submit(job(HELD))
        seen = []
        for _ in range(2):
            worker = begun(site, crew, *seen)
            seen.append(worker["name"])
            crew._desk._lost.clear()  # it is not the job
            kill(worker["pid"])
        with pytest.raises(LcscError, match="all workers ended, 1 times after a new start, and left no result"):
            crew.collect()


@pytest.mark.faults
def test_workers_serve_the_next_driver(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "lcsc", *SEARCH, "search.num_trials=60"]

    def search(*more):
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen([*words, *more], cwd=tmp_path, env=env, stdout=log, stderr=log)

    slurm = [*ENGINE, "engine.driver_lease_seconds=600", "run_dir=slurm"]
    driver = search(*slurm)
    records = tmp_path / "slurm" / "journal.jsonl"
    until(lambda: records.exists() and records.read_bytes().count(b"\n") > 20)
    driver.kill()
    driver.wait()
    before = set(read_beats(tmp_path / "slurm" / "work" / "beats"))
    done = set(records.parent.glob("work/results/*.json"))
    assert before
    driver = search(*slurm)
    assert driver.wait(1200) == 0, (tmp_path / "log").read_text()
    inline = search("run_dir=inline")
    assert inline.wait(1200) == 0
    assert records.read_bytes() == (tmp_path / "inline" / "journal.jsonl").read_bytes()
    later = [read_result(path.parent, path.stem) for path in set(records.parent.glob("work/results/*.json")) - done]
    assert before & {result.worker for result in later}
    until(lambda: not read_beats(tmp_path / "slurm" / "work" / "beats"))  # the old ones ended too
    assert len(read_records(records)[0]) > 60


@pytest.mark.faults
def test_a_slurm_array_of_submitit(site, monkeypatch):
    """submitit's own SLURM executor, on commands that start the array on this machine."""
    folder = site.folder.resolve().parent
    install(folder / "bin")
    (folder / "cluster").mkdir()
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder / "cluster"))
    settings = {**FAST, "cluster": None, "partition": "gpu", "mem_gb": 2.0, "extra": {"qos": "high"}}
    crew = Slurm(**settings, num_workers=2).start(site)
    script = (folder / "cluster" / "100.sbatch").read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--qos=high", "--mem=2GB", "--time=240"):
        assert line in script
    crew.submit(job(HELD))
    until(lambda: crew._desk.alive and at_work(site.folder, job(HELD)), crew)
    first = at_work(site.folder, job(HELD))
    assert first["name"].startswith("100_")
    subprocess.run(["scancel", first["name"].rpartition("-")[0], "--signal", "USR2"], check=True)
    begun(site, crew, first["name"])
    crew._open.close()  # as if the driver were gone: nobody stops the array
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder / "cluster"))
    with Slurm(**settings, num_workers=2).start(site) as crew:
        assert [job.job_id for job in crew._array.jobs] == ["100_0", "100_1"]
        crew.submit(job(HELD))
        go(site)
        (result,) = collect(crew, 1).values()
        assert result.worker.startswith("100_")
        assert not (folder / "cluster" / "101.sbatch").exists()
        pids = [path.read_text() for path in (folder / "cluster").glob("*.pid")]
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))

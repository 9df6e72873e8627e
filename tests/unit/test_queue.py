"""The folder queue: one winner for every claim, leases by the reader's own clock, nothing lost and nothing doubled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from lcsc.core.seeds import Purpose
from lcsc.search import queue as queue_module
from lcsc.search.desk import Desk
from lcsc.search.engines.base import Result
from lcsc.search.job import Job
from lcsc.search.lease import DRIVER, Beat, Leases, beat_seconds, read_beat, read_beats
from lcsc.search.queue import Entry, Queue, deliver
from lcsc.search.shift import Shift, Terms


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def job(number):
    return Job("score", (0.1 * number, 1 / 3), Purpose.SEARCH, (0, 64)).named("run", f"trial {number}")


def entry(number):
    return Entry(job(number).uid, job(number).to_plain(), 5.0)


def done(found, worker="w", value=1.5):
    row = {"value": value, "status": "ok", "reason": None, "image_forwards": 3}
    return Result(found.uid, row, 0.5, worker)


def failed(found):
    return Result(
        found.uid, {"value": None, "status": "failed", "cause": "oom", "reason": "x", "image_forwards": 0}, 0.5
    )


def beat(folder, worker, counter, session="s", **facts):
    (folder / "beats" / f"{worker}.json").write_text(json.dumps({"counter": counter, "session": session, **facts}))


def offer(folder, num):
    """As many jobs, without the time that it takes to make each durable."""
    for number in range(num):
        body = {"job": entry(number).job, "timeout_seconds": None}
        (folder / "jobs" / f"{job(number).uid}.json").write_text(json.dumps(body))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work"


@pytest.fixture
def tray(folder):
    return Queue(folder)


@pytest.fixture
def clock():
    return Clock()


# ------------------------------------------------------------------------------------------------- claims


def test_a_job_comes_out_as_it_went_in(tray, folder):
    tray.put(entry(1))
    assert tray.waiting() == {job(1).uid}
    found = tray.claim("a.b-1")  # a worker's name may hold dots
    assert Job.from_plain(found.job) == job(1)
    assert (found.uid, found.timeout_seconds) == (job(1).uid, 5.0)
    assert tray.claim("other") is None
    assert tray.claims() == [(job(1).uid, "a.b-1")]
    assert tray.give_back(job(1).uid, "a.b-1")
    assert not tray.give_back(job(1).uid, "a.b-1")  # it is another's now
    assert (tray.waiting(), tray.claims()) == ({job(1).uid}, [])
    tray.claim("c")
    tray.drop(job(1).uid, "c")
    assert (tray.waiting(), tray.claims()) == (set(), [])


def test_threads_claim_each_of_200_jobs_once(tray, folder):
    offer(folder, 200)
    taken = {name: [] for name in "abcd"}
    start = threading.Barrier(len(taken))

    def work(name):
        mine = Queue(folder)
        start.wait()
        while (found := mine.claim(name)) is not None:
            taken[name].append(found.uid)

    threads = [threading.Thread(target=work, args=(name,)) for name in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = Counter(uid for uids in taken.values() for uid in uids)
    assert counts == Counter({job(number).uid: 1 for number in range(200)})
    assert sorted(tray.claims()) == sorted((uid, name) for name, uids in taken.items() for uid in uids)


def test_processes_claim_each_of_200_jobs_once(tray, folder):
    offer(folder, 200)
    code = (
        "import sys; from pathlib import Path; from lcsc.search.queue import Queue\n"
        "tray, name = Queue(Path(sys.argv[1])), sys.argv[2]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "while (found := tray.claim(name)) is not None: print(found.uid)\n"
    )
    words = [sys.executable, "-c", code, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*words, name], **pipes) for name in ("a", "b")]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    taken = [worker.communicate()[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert Counter(taken[0] + taken[1]) == Counter({job(number).uid: 1 for number in range(200)})


def test_files_of_strangers_are_no_jobs_and_no_results(tray, folder):
    (folder / "jobs" / "notes.json").write_text("{}")
    (folder / "jobs" / f".{job(1).uid}.json.tmp").write_text("half")
    (folder / "jobs" / f"{job(1).uid}.json").write_text("garbage")
    (folder / "jobs" / f"{job(2).uid}.json").write_text(json.dumps({"job": entry(3).job, "timeout_seconds": None}))
    (folder / "jobs" / f"{job(4).uid}.json").write_text("[1]")
    (folder / "claims" / "nobody.json").write_text("{}")
    (folder / "beats" / "odd.json").write_text("[]")
    (folder / "beats" / "half.json").write_text("{")
    assert tray.claim("w") is None
    assert (tray.waiting(), tray.claims(), read_beats(folder / "beats")) == (set(), [], {})
    for body in (b"", b"garbage", b"00000000 {}\n", json.dumps({"uid": job(1).uid}).encode()):
        (folder / "results" / f"{job(1).uid}.json").write_bytes(body)
        assert tray.results([job(1).uid]) == []
    deliver(tray, done(job(1), value=2.5))  # over what is damaged
    deliver(tray, done(job(1), value=9.5))  # a valid one stays
    assert [result.row["value"] for result in tray.results([job(1).uid])] == [2.5]


def test_results_of_many_jobs_are_found_by_listing(tray, monkeypatch):
    monkeypatch.setattr(queue_module, "FEW", 3)
    for number in (1, 3):
        deliver(tray, done(job(number)))
    uids = [job(number).uid for number in range(6)]
    assert {result.uid for result in tray.results(uids)} == {job(1).uid, job(3).uid}


# ------------------------------------------------------------------------------------------------- leases


def test_a_lease_is_judged_by_the_readers_own_clock(clock):
    leases = Leases(10, clock)
    assert leases.alive("w", {"session": "s", "counter": 1})
    clock.now += 9.9
    assert leases.alive("w", {"session": "s", "counter": 1})
    clock.now += 0.1
    assert not leases.alive("w", {"session": "s", "counter": 1})
    assert not leases.alive("w", None)
    assert leases.alive("w", {"session": "s", "counter": 2})  # it was stopped, and goes on
    clock.now += 9.9
    assert leases.alive("w", None)  # a file that cannot be read at the moment is no death
    clock.now += 0.1
    assert leases.alive("w", {"session": "t", "counter": 2})  # requeued under its name
    assert leases.alive("new", None)
    clock.now += 10
    assert not leases.alive("new", None)


@pytest.mark.parametrize("jump", [-86400, 86400])
def test_clocks_of_the_wall_and_of_files_count_for_nothing(folder, tray, clock, monkeypatch, jump):
    leases = Leases(10, clock)
    beat(folder, "w", 1)
    file = folder / "beats" / "w.json"
    assert leases.alive("w", read_beat(file))
    wall = time.time() + jump
    monkeypatch.setattr("time.time", lambda: wall)
    os.utime(file, (wall, wall))
    clock.now += 9
    assert leases.alive("w", read_beat(file))
    clock.now += 1
    os.utime(file, (wall + 5, wall + 5))  # touched, but it has not beaten
    assert not leases.alive("w", read_beat(file))


def test_a_beat_counts_while_its_block_lasts(folder, tray):
    beats = folder / "beats"
    enough = threading.Event()
    seen = []

    def each():
        seen.append(read_beat(beats / "w.json")["counter"])
        if len(seen) == 3:
            enough.set()

    with Beat(beats, "w", 3600, uid=None):
        first = read_beats(beats)["w"]
    with Beat(beats, "w", 0.001, each, uid=None) as mine:
        assert enough.wait(30)
        mine.say(uid="abc")
        mine.beat()
        assert read_beats(beats)["w"]["uid"] == "abc"
    assert seen[:3] == [2, 3, 4]
    assert (first["pid"], first["counter"], first["uid"]) == (os.getpid(), 1, None)
    assert not list(beats.iterdir())
    with Beat(beats, DRIVER, 5):
        assert read_beats(beats) == {}  # the driver is no worker
        assert read_beat(beats / "driver.json")["session"] != first["session"]


def test_a_full_disk_costs_a_beat_and_not_the_worker(folder, tray, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with Beat(folder / "beats", "w", 5) as mine:
        monkeypatch.setattr("os.replace", full)
        mine.beat()
        monkeypatch.undo()
        mine.beat()
        assert read_beat(folder / "beats" / "w.json")["counter"] == 3


def test_several_beats_fit_into_a_lease():
    assert (beat_seconds(1), beat_seconds(60), beat_seconds(600)) == (0.2, 5, 5)


# ------------------------------------------------------------------------------------------------- the driver's desk


@pytest.fixture
def desk(tray, clock):
    return Desk(tray, 10, 5.0, clock)


def test_a_lost_workers_job_is_done_by_another_and_a_late_result_counts_for_nothing(desk, tray, folder, clock):
    desk.submit(job(1))
    beat(folder, "slow", 1)
    assert tray.claim("slow").uid == job(1).uid
    desk.audit()
    assert list(desk.alive) == ["slow"]
    clock.now += 10
    desk.audit()
    assert (list(desk.alive), tray.claims(), tray.waiting()) == ([], [], {job(1).uid})
    assert read_beats(folder / "beats") == {}  # nobody takes it for a worker
    beat(folder, "quick", 1)
    assert tray.claim("quick").timeout_seconds == 5.0
    desk.audit()
    assert list(desk.alive) == ["quick"]
    deliver(tray, done(job(1), "quick", 2.5))
    tray.drop(job(1).uid, "quick")
    assert [(result.worker, result.row["value"]) for result in desk.results()] == [("quick", 2.5)]
    deliver(tray, done(job(1), "slow", 7.5))  # continued after its lease
    beat(folder, "slow", 2)
    desk.audit()
    assert (desk.results(), desk.num_open, list(desk.alive)) == ([], 0, ["quick", "slow"])


def test_a_slow_worker_that_delivers_first_wins(desk, tray, folder, clock):
    desk.submit(job(1))
    beat(folder, "slow", 1)
    tray.claim("slow")
    desk.audit()
    clock.now += 10
    desk.audit()
    assert tray.waiting() == {job(1).uid}
    deliver(tray, done(job(1), "slow"))
    assert [result.worker for result in desk.results()] == ["slow"]
    assert tray.waiting() == set()  # nobody does it again


def test_a_job_that_loses_two_workers_is_a_failure(desk, tray, folder, clock):
    desk.submit(job(1))
    for worker in ("a", "b"):
        beat(folder, worker, 1)
        tray.claim(worker)
        desk.audit()
        clock.now += 10
        desk.audit()
    (result,) = desk.results()
    assert (result.row["value"], result.row["status"], result.row["cause"]) == (None, "failed", "killed")
    assert (tray.waiting(), tray.claims(), desk.num_open) == (set(), [], 0)
    deliver(tray, done(job(1)))
    desk.audit()
    assert desk.results() == []


def test_a_worker_known_to_have_ended_is_not_waited_for(desk, tray, folder):
    desk.submit(job(1))
    beat(folder, "7-a", 1)
    tray.claim("7-a")
    desk.audit(lambda worker: worker == "7-a")
    assert (tray.waiting(), desk.alive) == ({job(1).uid}, {})


def test_a_claim_without_a_beat_lasts_a_lease(desk, tray, clock):
    desk.submit(job(1))
    tray.claim("w")
    desk.audit()
    clock.now += 9
    desk.audit()
    assert tray.claims() == [(job(1).uid, "w")]
    clock.now += 1
    desk.audit()
    assert tray.waiting() == {job(1).uid}


def test_a_job_that_is_nowhere_is_offered_again(desk, tray, folder, clock):
    desk.submit(job(1))
    tray.claim("w")
    (folder / "results" / f"{job(1).uid}.json").write_text("garbage")  # a stranger's
    tray.drop(job(1).uid, "w")
    desk.audit()
    assert tray.waiting() == set()  # it may be on its way
    clock.now += 10
    desk.audit()
    assert tray.waiting() == {job(1).uid}
    tray.claim("w")
    deliver(tray, done(job(1), value=4.5))
    assert [result.row["value"] for result in desk.results()] == [4.5]


def test_a_worker_that_cannot_work_is_no_slot(desk, tray, folder):
    beat(folder, "a", 1)
    beat(folder, "b", 1, error="the bank is damaged")
    desk.audit()
    assert (list(desk.alive), desk.broken["b"]["error"]) == (["a"], "the bank is damaged")


def test_a_new_driver_takes_results_and_leaves_claims_of_the_living(tray, folder, clock):
    first = Desk(tray, 10, None, clock)
    for number in range(5):
        first.submit(job(number))
    while tray.waiting():
        tray.claim("w")
    deliver(tray, done(job(0), value=0.5))
    deliver(tray, failed(job(1)))
    for number in (0, 1, 3):
        tray.drop(job(number).uid, "w")
    tray.put(entry(3))
    tray.put(entry(99))  # of a plan that has changed
    beat(folder, "w", 1)

    second = Desk(tray, 10, None, clock)
    assert tray.waiting() == set()
    for number in range(4):
        second.submit(job(number))
    assert [(result.uid, result.row["value"]) for result in second.results()] == [(job(0).uid, 0.5)]
    # what failed is tried again, what lay about is offered again, what is claimed is not
    assert tray.waiting() == {job(1).uid, job(3).uid}
    second.audit()
    clock.now += 10
    beat(folder, "w", 2)
    second.audit()
    assert tray.claims() == sorted((job(number).uid, "w") for number in (2, 4))
    clock.now += 10
    second.audit()  # now it is dead: its job is offered again, but not the one that nobody waits for
    assert (tray.claims(), tray.waiting()) == ([], {job(number).uid for number in (1, 2, 3)})


# ------------------------------------------------------------------------------------------------- shifts


def test_workers_without_a_driver_end(folder, tray, monkeypatch):
    (folder / "order.json").write_text(json.dumps({"cwd": str(folder)}))
    shift = Shift(folder, "w", Terms(0.05, 0.2, 0.01, None))
    monkeypatch.setattr(shift, "_ready", lambda: None)  # nothing is evaluated
    assert shift.run() == 0
    assert list((folder / "beats").iterdir()) == []


def test_a_stop_file_ends_a_worker(folder, tray, monkeypatch):
    shift = Shift(folder, "w", Terms(10, 1000, 0.01, None))
    monkeypatch.setattr(shift, "_ready", lambda: (folder / "stop").touch())
    tray.put(entry(1))
    assert shift.run() == 0
    assert tray.waiting() == {job(1).uid}


@pytest.mark.parametrize(("elapsed", "over"), [(0, False), (700, False), (900, True)])
def test_no_work_is_taken_that_would_not_be_done_in_time(folder, tray, monkeypatch, elapsed, over):
    now = time.monotonic()
    shift = Shift(folder, "w", Terms(10, 1000, 0.01, 1000.0))
    shift._longest = 100.0  # 150 and the margin of 100 have to be left
    monkeypatch.setattr("time.monotonic", lambda: now + elapsed)
    assert shift._over() is over

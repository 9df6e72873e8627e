"""What can be said of a run from its directory, while somebody else writes it."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from helpers_fake_run import framed, make_fake_run, read_records

from lcsc.core.digests import file_sha256
from lcsc.report.run import Run
from lcsc.report.status import Status, status_text
from lcsc.search.lock import Lock, Owner


def rows_of(path, clock=lambda: 0.0):
    return dict(Status(Run.open(path), clock).rows())


def edited(path, change):
    """Rewrite all records of a run."""
    lines = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines() if line.endswith("}")]
    (path / "journal.jsonl").write_bytes(framed([change(line) for line in lines]))


def timed(path, seconds_apart, seconds=0.25):
    """Rewrite the timing of a run, each step that many seconds after the one before."""
    rows = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
    began = datetime(2026, 11, 23, 18, tzinfo=UTC)
    for index, row in enumerate(rows):
        at = began + timedelta(seconds=index * seconds_apart)
        row.update(at=at.strftime("%Y-%m-%dT%H:%M:%SZ"), seconds=seconds)
    (path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def hold(path, **other):
    """A lock on a run whose owner is this process but for `other`."""
    lock = Lock(path / "lock", "", print)
    lock.acquire()
    file = path / "lock" / "owner.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **other}))


@pytest.fixture
def mine(tmp_path):
    """A search that has done 45 of 100 trials, a step every 3 seconds, with this process as its driver."""
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=100, done=45, torn=True)
    edited(path, lambda r: r | ({"vector": [float(r["seq"])]} if r["kind"] == "baseline" else {}))
    timed(path, 3)
    hold(path)
    return path


def test_a_run_at_work(mine):
    baselines, trials = read_records(mine, "baseline"), read_records(mine, "trial")
    num_families = len({record["family"] for record in baselines})
    looks = sum(min(3, [b["family"] for b in baselines].count(family)) for family in {b["family"] for b in baselines})
    planned = len(baselines) + 100 + 10 + looks + 1 + num_families
    done = len(baselines) + 45
    best = min((t for t in trials if t["value"] is not None), key=lambda t: t["value"])
    rival = min(baselines, key=lambda b: b["value"])
    rows = rows_of(mine)
    assert rows["phase"] == "trials"
    assert rows["steps"] == f"{done} of {planned}"
    assert rows["trials"] == "45 of 100"
    assert rows["best so far"].startswith(f"{best['value']:.1f}")
    assert rows["best so far"].endswith(f"(trial {best['uid']}, on the search seeds)")
    assert f"({rival['label']}, on the search seeds)" in rows["best baseline"]
    assert rows["rate"] == "20 steps a minute, 133 images a second"
    assert rows["time left"] == str(timedelta(seconds=3 * (planned - done)))
    assert rows["failures"] == "1 invalid"
    assert rows["driver"] == f"process {os.getpid()} on host {os.uname().nodename}"
    assert "idle" not in rows
    assert "workers" not in rows


def test_looking_changes_nothing(mine):
    before = {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in mine.rglob("*") if path.is_file()}
    status = Status(Run.open(mine))
    assert status_text(status.run, status.rows()).splitlines()[1] == "  phase          trials"
    after = {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in mine.rglob("*") if path.is_file()}
    assert {path for path in before if path.name != "beat"} == {path for path in after if path.name != "beat"}
    assert all(before[path] == after[path] for path in before if path.name != "beat")


def test_before_the_trials_the_plan_is_not_known(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=100, done=0)
    rows = rows_of(path)
    assert rows["phase"] == "baselines"
    assert rows["steps"] == str(len(read_records(path, "baseline")))
    (path / "journal.jsonl").unlink()
    assert rows_of(path) == {
        "phase": "beginning",
        "steps": "0",
        "driver": "none at work; the line that began the search continues it",
    }


def test_a_finished_run_says_its_result(finished):
    rows = rows_of(finished)
    assert rows["phase"] == "finished"
    assert rows["result"].startswith("lcsc ")
    assert list(rows) == ["phase", "result"]


def test_a_driver_that_is_gone_promises_no_time(mine):
    shutil.rmtree(mine / "lock")
    hold(mine, start=1.0)
    rows = rows_of(mine)
    assert rows["driver"].startswith(f"gone (process {os.getpid()} on host ")
    assert "time left" not in rows


def test_a_driver_elsewhere_is_known_by_its_counter(mine):
    shutil.rmtree(mine / "lock")
    hold(mine, host="far")
    now = [0.0]
    status = Status(Run.open(mine), lambda: now[0])
    assert dict(status.rows())["driver"] == f"process {os.getpid()} on host far, not seen to move yet"
    assert status.unsure
    (mine / "lock" / "beat").write_text("5")
    now[0] = 20.0
    assert dict(status.rows())["driver"] == f"process {os.getpid()} on host far"
    assert not status.unsure
    now[0] = 49.0
    assert dict(status.rows())["driver"] == f"process {os.getpid()} on host far"
    now[0] = 51.0
    assert dict(status.rows())["driver"].startswith(f"silent for 31 s (process {os.getpid()} on host far)")
    assert Owner.read(mine / "lock").host == "far"


def test_workers_are_counted_and_silent_ones_named(mine):
    beats = mine / "work" / "beats"
    beats.mkdir(parents=True)
    for index, (host, uid) in enumerate([("a", "12ab"), ("a", ""), ("b", "34cd")]):
        beat = {"counter": 1, "host": host, "pid": 100 + index, "uid": uid}
        (beats / f"w{index}.json").write_text(json.dumps(beat))
    (beats / "torn.json").write_text('{"cou')
    timed(mine, 3, seconds=4.5)
    now = [0.0]
    status = Status(Run.open(mine), lambda: now[0])
    rows = dict(status.rows())
    assert rows["workers"] == "3 (2 on a, 1 on b), 2 busy"
    assert rows["idle"] == "50% of the workers' time"  # 4.5 s of work every 3 s, on three workers
    now[0] = 40.0
    (beats / "w0.json").write_text(json.dumps({"counter": 2, "host": "a", "pid": 100, "uid": ""}))
    rows = dict(status.rows())
    assert rows["workers"] == "3 (2 on a, 1 on b), 1 busy, a:101 silent for 40 s, b:102 silent for 40 s"


def test_failures_are_counted_by_cause_and_inherited_scores_too(mine):
    causes = {3: "oom", 5: "oom", 7: "timeout"}

    def spoil(record):
        failed = {"value": None, "status": "failed", "cause": causes.get(record.get("uid"))}
        return (
            record
            | (failed if record.get("uid") in causes else {})
            | ({"inherited": "p"} if record.get("uid") == 1 else {})
        )

    edited(mine, spoil)
    rows = rows_of(mine)
    assert rows["failures"] == "2 oom, 1 invalid, 1 timeout"
    assert rows["trials"] == "45 of 100, 1 scores inherited"


def test_names_do_not_steer_the_terminal(mine):
    edited(mine, lambda r: r | ({"label": "x\x1b[2Jy\n"} if r["kind"] == "baseline" else {}))
    assert all("\x1b" not in text and "\n" not in text for text in rows_of(mine).values())

"""One process writes a run; a lock that was left behind is told from one whose owner lives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcsc.core.errors import ConfigError, RunError
from lcsc.search import lock as lock_module
from lcsc.search.journal import Journal
from lcsc.search.lock import LEASE, Lock, Owner


class Clock:
    """Time that passes only while somebody sleeps; `then` is called before each second look."""

    def __init__(self, then=lambda: None, speed=1.0):
        self.now, self.then, self.speed = 100.0, then, speed

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds * self.speed
        self.then()


def make(folder, notes=None, clock=None, **how):
    clock = clock or Clock()
    note = (notes if notes is not None else []).append
    return Lock(folder / "lock", "the run", note, clock=clock, sleep=clock.sleep, **how)


def leave(folder, **other):
    """A lock that somebody left; `other` is what its owner has otherwise than this process."""
    lock = make(folder)
    lock.acquire()
    path = folder / "lock" / "owner.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "theirs", **other}))
    lock._stop.set()
    return path


def gone():
    """Id and time of start of a process that ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = lock_module._start_of(process.pid)
    process.communicate(b"\n")
    return process.pid, start


def test_a_lock_says_who_holds_it_and_leaves_nothing_behind(tmp_path):
    with make(tmp_path) as lock:
        assert json.loads((tmp_path / "lock" / "owner.json").read_text()) == {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "start": lock_module._start_of(os.getpid()),
            "token": lock._me.token,
        }
        with pytest.raises(RunError, match=f"running `the run`: process {os.getpid()} on host {os.uname().nodename}"):
            make(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_is_gone_is_taken_over_with_one_line(tmp_path):
    pid, start = gone()
    leave(tmp_path, pid=pid, start=start)
    notes = []
    with make(tmp_path, notes):
        assert Owner.read(tmp_path / "lock").pid == os.getpid()
    assert notes == [f"taking over from process {pid}, which is gone"]


def test_a_reused_process_id_is_not_the_owner(tmp_path):
    leave(tmp_path, start=1.0)  # this very id, of a process that began at another time
    notes = []
    with make(tmp_path, notes):
        pass
    assert notes == [f"taking over from process {os.getpid()}, which is gone"]


def test_whoever_holds_the_kernels_lock_knows_that_no_owner_is_left_here(tmp_path):
    leave(tmp_path, host="another container of this machine")  # its processes cannot be seen
    notes = []
    with make(tmp_path, notes, gated=True):
        pass
    assert notes == [f"taking over from process {os.getpid()}, which is gone"]


@pytest.mark.parametrize("other", [{"host": "far"}, {"boot_id": "before"}])
def test_an_owner_elsewhere_that_is_silent_for_the_lease_is_gone(tmp_path, other):
    leave(tmp_path, **other)
    notes, clock = [], Clock()
    with make(tmp_path, notes, clock):
        assert Owner.read(tmp_path / "lock").token != "theirs"
    assert LEASE <= clock.now - 100 < LEASE + 2
    who = f"process {os.getpid()} on host {other.get('host', os.uname().nodename)}"
    assert notes == [
        f"`the run` is locked by {who}; watching for up to 30 s whether that one is alive",
        f"taking over from {who}, which has been silent for 30 s",
    ]


@pytest.mark.parametrize("gated", [False, True])
def test_an_owner_elsewhere_whose_counter_moves_is_alive(tmp_path, gated):
    leave(tmp_path, host="far", boot_id="theirs")
    clock = Clock(lambda: clock.now > 103 and (tmp_path / "lock" / "beat").write_bytes(b"7"))
    with pytest.raises(RunError, match=f"another process is running `the run`: process {os.getpid()} on host far"):
        make(tmp_path, clock=clock, gated=gated).acquire()
    assert clock.now < 105
    assert Owner.read(tmp_path / "lock").token == "theirs"


def test_a_watcher_that_stood_still_itself_looks_again_before_it_judges(tmp_path):
    """Its first look after an hour's sleep finds a counter that moved, however long the time since its last look."""
    leave(tmp_path, host="far")
    clock = Clock(lambda: (tmp_path / "lock" / "beat").write_bytes(b"8"), speed=7200.0)
    with pytest.raises(RunError, match="another process is running"):
        make(tmp_path, clock=clock).acquire()


def test_jumps_of_the_wall_clock_change_nothing(tmp_path, monkeypatch):
    day = iter(range(10**9, 10**12, 86400))
    monkeypatch.setattr(time, "time", lambda: next(day))
    with make(tmp_path), pytest.raises(RunError, match="another process is running"):
        make(tmp_path).acquire()
    pid, start = gone()
    leave(tmp_path, pid=pid, start=start)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with make(tmp_path):
        pass


def test_a_released_lock_is_not_waited_for(tmp_path):
    leave(tmp_path, host="far")
    clock = Clock(lambda: (tmp_path / "lock").exists() and os.rename(tmp_path / "lock", tmp_path / "gone"))
    with make(tmp_path, clock=clock):
        pass
    assert clock.now < 102


def test_patience_waits_for_a_holder_that_lives(tmp_path):
    first = make(tmp_path)
    first.acquire()
    clock = Clock(lambda: clock.now > 105 and first.release())
    with make(tmp_path, clock=clock, patience=30.0):
        pass
    assert 105 < clock.now < 106
    with make(tmp_path), pytest.raises(RunError, match="another process is running"):
        make(tmp_path, patience=30.0).acquire()


def test_a_lock_of_another_that_came_in_between_is_put_back(tmp_path):
    """Two find the same owner gone: the slower one has judged the dead, not the faster one."""
    pid, start = gone()
    leave(tmp_path, pid=pid, start=start)
    dead = Owner.read(tmp_path / "lock")
    with make(tmp_path) as faster:
        assert not make(tmp_path)._remove(dead)
        faster.check()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_left_overs_of_starts_that_were_killed_are_cleared_away(tmp_path):
    (tmp_path / ".lock-12ab").mkdir()
    with make(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_that_says_nothing_sensible_is_watched(tmp_path):
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "owner.json").write_text('{"host": 7')
    clock, notes = Clock(), []
    with make(tmp_path, notes, clock):
        pass
    assert clock.now - 100 >= LEASE
    assert "process 0 on host unknown" in notes[0]


def test_a_lock_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="lock` cannot be written: Not a directory"):
        make(tmp_path / "file").acquire()


# ---- the journal's


def journal_bytes(folder):
    return (folder / "journal.jsonl").read_bytes()


def test_a_journal_whose_lock_was_taken_over_is_not_written_any_more(tmp_path):
    with Journal(tmp_path, print) as journal:
        journal.step("trial", {"uid": 0}, lambda: {"value": 0.0})
        before, path = journal_bytes(tmp_path), tmp_path / "lock" / "owner.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "host": "far", "token": "theirs"}))
        with pytest.raises(RunError, match="on host far took .* over while this process stood still"):
            journal.step("trial", {"uid": 1}, lambda: {"value": 1.0})
        with pytest.raises(RunError, match="took .* over"):
            journal.forget(1)
    assert journal_bytes(tmp_path) == before
    assert Owner.read(tmp_path / "lock").token == "theirs"  # it is not ours to remove


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_without_the_kernels_locks_the_folder_alone_decides(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Journal(tmp_path, print), pytest.raises(RunError, match=f"another process is running .*process {os.getpid()}"):
        Journal(tmp_path, print)
    pid, start = gone()
    leave(tmp_path, pid=pid, start=start)
    notes = []
    with Journal(tmp_path, notes.append):
        pass
    assert notes == [f"taking over from process {pid}, which is gone"]


def test_another_error_of_the_kernels_lock_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"journal\.jsonl` cannot be written: Input/output error"):
        Journal(tmp_path, print)


def test_a_second_process_is_told_who_the_first_is(tmp_path):
    with Journal(tmp_path, print), pytest.raises(RunError, match=rf"`{tmp_path}`: process {os.getpid()} on host"):
        Journal(tmp_path, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl", "timing.jsonl"]

"""`lcsc selftest`: passes on a sound file system, says what an unsound one does not keep, leaves nothing behind."""

from __future__ import annotations

import fcntl
import os
import re

import pytest

from lcsc.search.selftest import CHECKS, selftest


def test_a_sound_file_system_passes_and_nothing_is_left(lcsc, tmp_path):
    code, out, err = lcsc("selftest", "--dir", str(tmp_path), "seconds=0")
    assert (code, err) == (0, ""), out
    *lines, last, rest = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["PASS"] * len(CHECKS)
    assert last.startswith("no FAIL in ")
    assert rest.startswith("not tried: I6 and I8")
    kills, told = map(int, re.search(r"(\d+) kills, (\d+) acknowledged steps, 0 of", out).groups())
    assert kills >= 3
    assert told > 0
    assert list(tmp_path.iterdir()) == []


def findings(folder, *names):
    return {f.promise: f for f in selftest(folder, 0.0, [name for name in CHECKS if name in names])}


def test_an_unsound_file_system_fails_with_one(lcsc, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # says yes to everybody
    monkeypatch.setattr("lcsc.search.selftest.CHECKS", {"flock": CHECKS["flock"]})
    with pytest.raises(SystemExit) as ended:
        lcsc("selftest", f"dir={tmp_path}")
    assert ended.value.code == 1
    assert "FAIL  I9        the kernel's file locks: two processes may hold one lock" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_loses_no_promise(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (found,) = findings(tmp_path, "flock").values()
    assert found.passed is None
    assert found.detail == "not offered here (No locks available); the lock folder alone decides"


@pytest.mark.parametrize(
    ("check", "call", "detail"),
    [
        ("fsync", ("fsync", lambda fd: None), r"20 files"),  # one that never fails tells of nothing
        ("rename", ("rename", lambda a, b: None), r"a full folder is replaced"),
        ("torn", ("fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "broken"))), r"cannot be written: broken"),
    ],
)
def test_each_check_sees_its_fault(tmp_path, monkeypatch, check, call, detail):
    real = getattr(os, call[0])
    if call[0] == "rename":  # only over what is there: making new folders goes on
        monkeypatch.setattr(os, "rename", lambda a, b: None if os.path.exists(b) else real(a, b))
    else:
        monkeypatch.setattr(os, *call)
    (found,) = findings(tmp_path, check).values()
    assert found.passed is False
    assert re.search(detail, found.detail)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_wrong_are_sentences(lcsc, tmp_path):
    assert "`seconds` is `many`; it must be a number" in lcsc("selftest", f"dir={tmp_path}", "seconds=many")[2]
    assert "which is no folder" in lcsc("selftest", "--dir", str(tmp_path / "none"))[2]
    assert lcsc("selftest", "--dir")[0] == 2

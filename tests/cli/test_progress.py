"""What a person sees: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from helpers_cli import TOY

from lcsc.cli.passes import passing
from lcsc.search.progress import Progress


@pytest.mark.faults
def test_a_terminal_shows_one_live_table(tmp_path):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    words = [sys.executable, "-m", "lcsc", "search", *TOY, "searcher=lcsc_evolution"]  # which loads fastest
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    screen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        screen += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0, screen.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    for column in ("phase", "steps", "best so far", "best baseline", "images/s", "time left"):
        assert column in text
    assert "\x1b[" in screen.decode()  # the table is redrawn in place


def test_elsewhere_plain_lines_say_each_phase_once(capsys):
    with Progress("toy", 4) as progress:
        progress.step("baseline", images=10)
        progress.baseline("EMA 2.00")
        progress.step("trial", 3.0, 10)
        progress.step("trial", 1.5, 10)
        progress.step("report", images=10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [["baseline", "1/4"], ["trial", "2/4"], ["report", "4/4"]]
    assert "best 3.00 [EMA 2.00]" in lines[1]
    assert "best 1.50 [EMA 2.00]" in lines[2]
    assert lines[2].endswith("0:00 left")


def test_the_rate_is_in_the_items_of_the_score(capsys):
    for items in ("images", "blocks"):
        with Progress("toy", 1, items=items) as progress:
            progress.step("report", images=10)
        assert re.search(rf"\[no baseline yet\] \d+ {items}/s, 0:00 left$", capsys.readouterr().out.strip())
        assert f"{items}/s" in [column.header for column in progress._table().columns]


def test_replayed_steps_are_silent_and_cost_no_time(capsys):
    with Progress("toy", 3) as progress:
        progress.step("trial", 2.0, 10, replayed=True)
        progress.step("trial", 1.0, 10, replayed=True)
        assert capsys.readouterr().out == ""
        progress.step("report", images=10)
    assert "report    3/3 best 1.00" in capsys.readouterr().out


def test_quiet_says_nothing(capsys):
    with Progress("toy", 1, quiet=True) as progress:
        progress.note("hello")
        progress.step("trial", 2.0)
    assert capsys.readouterr().out == ""


def test_a_pass_over_files_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("lcsc.cli.passes.PAUSE", 0.0)
    with passing("scan") as said:
        said(5_000_000_000, 20_000_000_000)
    assert capsys.readouterr().err == "scan: 5.0 of 20.0 GB, 25%\n"
    monkeypatch.setattr("lcsc.cli.passes.PAUSE", 10.0)
    with passing("pack", unit="columns") as said:
        said(1, 2)
    assert capsys.readouterr().err == ""  # not yet

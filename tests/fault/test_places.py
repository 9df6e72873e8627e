"""Odd names, read-only inputs, a home that may not be written, clocks that jump."""

from __future__ import annotations

import os
import time

import pytest
from small_search import search

from lcsc.cli.search import search as search_line
from lcsc.config.hydra_app import compose_config
from lcsc.core.digests import file_sha256
from lcsc.report.run import Run
from lcsc.report.status import Status

ODD = "ünï cödé \U0001f600\nline two 'quoted' $HOME"


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.faults
def test_odd_names_read_only_inputs_and_nothing_written_elsewhere(tmp_path, monkeypatch, count):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    home.chmod(0o555)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    small = ["num_trials=2", "num_images=16", "num_finalists=1", "num_images_select=16", "num_images_report=16"]
    config = compose_config(["experiment=toy_gaussian", *(f"search.{word}" for word in small)])
    bank, runs = tmp_path / f"bank {ODD}", tmp_path / f"runs {ODD}"
    config.update(name=ODD, runs_dir=str(runs), quiet=True)
    config["bank"]["path"] = str(bank)
    path = search_line(config, "lcsc search")
    before = files_of(bank)
    for folder in (bank, *bank.rglob("*")):
        folder.chmod(0o555)
    try:
        (path / "summary.json").unlink()
        journal = (path / "journal.jsonl").read_bytes()
        assert search_line(config, "lcsc search") == path  # again, from a bank that may not be written
        assert (path / "journal.jsonl").read_bytes() == journal
    finally:
        for folder in (bank, *bank.rglob("*")):
            folder.chmod(0o755)
    assert files_of(bank) == before
    assert list(here.iterdir()) == []
    assert {path.parts[len(home.parts) + 1] for path in files_of(home)} <= {"matplotlib"}  # its list of fonts
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([bank.name, runs.name, "here", "home"])
    assert path.parent == runs
    assert Run.open(path).name == ODD
    assert dict(Status(Run.open(path)).rows())["phase"] == "finished"
    count("places", searches=2, user="root, whom such marks do not bind" if os.geteuid() == 0 else "a plain user")


def test_jumps_of_the_clock_change_nothing(tmp_path, monkeypatch):
    wanted = (search(tmp_path / "steady") / "journal.jsonl").read_bytes()
    now = [1e9]

    def jumping():
        now[0] += -86400 if now[0] > 2e9 else 3e8
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    assert (search(tmp_path / "jumping") / "journal.jsonl").read_bytes() == wanted
    assert os.listdir(tmp_path / "jumping") == ["run"]


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/St_Johns"])
def test_the_time_zone_changes_nothing(tmp_path, monkeypatch, zone):
    wanted = (search(tmp_path / "here") / "journal.jsonl").read_bytes()
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert (search(tmp_path / "there") / "journal.jsonl").read_bytes() == wanted
    finally:
        monkeypatch.undo()
        time.tzset()

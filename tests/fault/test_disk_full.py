"""A disk that fills up at any stage: a sentence, nothing half under a final name, and the same line continues."""

from __future__ import annotations

import os
import resource
import subprocess

import pytest
from small_search import search
from test_every_write import memory, outcome, whole

__all__ = ["memory"]


@pytest.fixture
def unbroken(tmp_path):
    return (search(tmp_path / "unbroken") / "journal.jsonl").read_bytes()


def test_a_file_that_may_not_grow_stops_the_search_with_a_sentence(memory, unbroken, count):
    """The limit of this process stands in for the end of a disk, at 20 places of the journal."""
    stages, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in range(1, 21):
        runs, size = memory / f"run{part}", max(700, len(unbroken) * part // 21)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            said = outcome(runs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert said is not None
        assert "cannot be written: File too large" in said
        assert whole(runs / "run")
        stages.append(size)
        assert (search(runs) / "journal.jsonl").read_bytes() == unbroken
    count("disk_limit", stages=len(stages))


def test_a_full_file_system_stops_the_search_with_a_sentence(tmp_path, unbroken, count):
    disk, stages = tmp_path / "disk", 0
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        for free in range(0, 36, 4):  # KiB left to the run
            runs, ballast = disk / f"run{free}", disk / "ballast"
            room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            ballast.write_bytes(b"x" * max(0, room - free * 1024))
            said = outcome(runs)
            stages += said is not None
            assert said is None or "cannot be written: No space left on device" in said
            assert whole(runs / "run")
            ballast.unlink()
            assert (search(runs) / "journal.jsonl").read_bytes() == unbroken
            subprocess.run(["rm", "-rf", str(runs)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert stages >= 3
    count("disk_full", stages=stages)

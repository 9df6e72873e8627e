"""Every write, fsync and rename made to fail once: a sentence, no half file, and the same line continues."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from small_search import search

from lcsc.bank import CheckpointBank
from lcsc.core.errors import LcscError
from lcsc.core.registry import build
from lcsc.models.network import load_network
from lcsc.report.html import read_samples
from lcsc.report.run import Run
from lcsc.search.budget import Budget
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.problem import Problem
from lcsc.search.run import run_search

#: Calls that put something on the disk, and how each fails.
CALLS = {"fsync": errno.EIO, "replace": errno.EIO, "rename": errno.EIO, "mkdir": errno.ENOSPC, "pwrite": errno.ENOSPC}


@pytest.fixture
def memory():
    """A folder on a file system where fsync costs nothing, if there is one."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=where))
    yield folder
    shutil.rmtree(folder)


class Faults:
    """Counts calls of this thread that write; the one numbered `at` fails, half done where it can be."""

    def __init__(self, at=None):
        self.at, self.num, self.thread = at, 0, threading.get_ident()

    def fails(self):
        if threading.get_ident() != self.thread:  # a beat
            return False
        self.num += 1
        return self.num - 1 == self.at

    def install(self, monkeypatch):
        for name, code in CALLS.items():
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name), code))
        real = builtins.open

        def opened(path, mode="r", *rest, **named):
            file = real(path, mode, *rest, **named)
            return Wrapped(file, self) if set(mode) & set("wax+") else file

        monkeypatch.setattr(builtins, "open", opened)

    def wrapped(self, real, code):
        def call(*args, **named):
            if self.fails():
                raise OSError(code, os.strerror(code))
            return real(*args, **named)

        return call


class Wrapped:
    """An open file whose writes are counted."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        if self._faults.fails():
            self._file.write(data[: len(data) // 2])  # what a full disk does
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


def whole(run):
    """Whether everything in a run directory is complete under its final name; the journal but for its last line."""
    if not run.exists():
        return True
    json.loads((run / "run.json").read_text())
    if (run / "summary.json").exists():
        json.loads((run / "summary.json").read_text())
    if (run / "lock").exists():
        json.loads((run / "lock" / "owner.json").read_text())
    if (run / "journal.jsonl").exists():
        read_records(run / "journal.jsonl")
    return True


def outcome(runs, begin=search):
    """The sentence that a start ended with, None where it ended well; any other error is none of lcsc's."""
    try:
        begin(runs)
    except LcscError as error:
        return str(error)
    return None


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.faults)])
def test_each_failure_is_a_sentence_and_the_same_line_continues(memory, monkeypatch, step, count):
    with monkeypatch.context() as patched:
        faults = Faults()
        faults.install(patched)
        wanted = search(memory / "whole")
    places, failed = range(0, faults.num, step), 0
    files = ("journal.jsonl", "summary.json")
    for at in places:
        runs = memory / f"run{at}"
        with monkeypatch.context() as patched:
            Faults(at).install(patched)
            said = outcome(runs)
        failed += said is not None
        assert said is None or " cannot be written: " in said, at
        assert whole(runs / "run"), at
        run = search(runs)
        for name in files:
            assert (run / name).read_bytes() == (wanted / name).read_bytes(), (at, name)
        with Journal(run, lambda _: None):  # nor is a lock that could not be given back in anybody's way
            pass
        assert not (run / "lock").exists()
        shutil.rmtree(runs)
    assert faults.num > 60
    assert failed > len(places) // 2  # the others are decoration: timing, and giving the lock back
    count("every_write", calls=len(places), sentences=failed, continued=len(places))


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.faults)])
def test_each_failure_at_the_end_of_a_search_leaves_whole_files_alone(memory, monkeypatch, step, count):
    """What a search writes after its last step: samples, the winner as a model, the summary."""
    net = {"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}}
    parts = {"model": build("model", "direct"), "dataset": build("dataset", "gaussian")}
    trainer = build("trainer", "gaussian_toy", num_checkpoints=3)
    bank = CheckpointBank.open(trainer.train(arch=net, **parts, out=memory / "bank", seed=0, progress=False))
    more = {"metric": build("metric", "fid_pixels"), "sampler": build("sampler", "euler", num_steps=2)}
    objective = build("objective", "sample_quality", **parts, **more, device="cpu")
    problem = Problem(bank, build("operator", "linear"), build("searcher", "random"), objective,
                      Budget(2, 20, 1, 20, 20), seed=0)  # fmt: skip

    def begin(runs):
        return run_search(problem, name="toy", runs_dir=runs, run_dir=runs / "run", quiet=True)

    wanted = begin(memory / "whole")
    late = ("best", "samples.npz", "summary.json")
    names = sorted(path.relative_to(wanted) for path in wanted.rglob("*"))

    def early(runs):
        """The run as it stands after its last step."""
        shutil.copytree(wanted, runs / "run", ignore=lambda folder, _: late if Path(folder) == wanted else ())
        return runs

    with monkeypatch.context() as patched:
        faults = Faults()
        runs = early(memory / "counted")
        faults.install(patched)
        begin(runs)
    for at in range(0, faults.num, step):
        runs = early(memory / f"run{at}")
        with monkeypatch.context() as patched:
            Faults(at).install(patched)
            said = outcome(runs, begin)
        assert said is None or " cannot be written: " in said, at
        assert whole(runs / "run"), at
        if (runs / "run" / "best").exists():
            load_network(runs / "run" / "best")
        if (runs / "run" / "samples.npz").exists():
            read_samples(Run.open(runs / "run"))
        run = begin(runs)
        with Journal(run, lambda _: None):
            pass
        assert sorted(path.relative_to(run) for path in run.rglob("*")) == names, at
        assert (run / "journal.jsonl").read_bytes() == (wanted / "journal.jsonl").read_bytes()
        shutil.rmtree(runs)
    assert faults.num > 10
    count("every_late_write", calls=len(range(0, faults.num, step)))

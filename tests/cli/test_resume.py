"""Real processes killed with SIGKILL: the same line finishes with the journal of an unbroken run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

import pytest
import torch
from helpers_cli import TOY, start

from lcsc.cli.main import main

# one thread, so that all processes add in the same order
ENV = {"OMP_NUM_THREADS": "1"}
WORDS = ["search", *TOY, "searcher=diagonal_cma", "search.num_trials=60"]


@pytest.fixture
def finish(lcsc, monkeypatch):
    """Run the search to its end in this process, in a folder, and return what it prints."""
    monkeypatch.setenv("OMP_NUM_THREADS", ENV["OMP_NUM_THREADS"])
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(cwd):
        monkeypatch.chdir(cwd)
        code, out, err = lcsc(*WORDS)
        assert code == 0, err
        return out

    yield call
    torch.set_num_threads(before)


def kill_after(cwd, num_lines):
    """Start the search and kill it once its journal has `num_lines` lines."""
    process = start(*WORDS, cwd=cwd, env=ENV)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        journals = list(cwd.glob("runs/*/journal.jsonl"))
        if journals and journals[0].read_bytes().count(b"\n") >= num_lines:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out


def only_run(cwd):
    (path,) = (p.parent for p in cwd.glob("runs/*/run.json"))
    return path


AMONG_BASELINES, AMONG_TRIALS = 20, 85


@pytest.mark.faults  # a driver killed three times is among the fault tests of every run
@pytest.mark.parametrize("lines", [(AMONG_TRIALS,), (AMONG_BASELINES, AMONG_TRIALS)])
def test_a_killed_run_ends_with_the_journal_of_an_unbroken_one(tmp_path, finish, lines):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    finish(tmp_path / "whole")
    for num_lines in lines:
        kill_after(tmp_path / "broken", num_lines)
    path = only_run(tmp_path / "broken")
    assert not (path / "summary.json").exists()
    assert "continuing" in finish(tmp_path / "broken")
    whole = only_run(tmp_path / "whole")
    assert (path / "journal.jsonl").read_bytes() == (whole / "journal.jsonl").read_bytes()
    for key in ("report", "coefficients", "num_trials", "images_sampled"):
        left, right = (json.loads((p / "summary.json").read_text())[key] for p in (path, whole))
        assert left == right, key
    name = "best/diffusion_pytorch_model.safetensors"
    strip = len(path.name.encode())  # the recipe names the run, so compare the tensors' bytes behind the header
    assert strip == len(whole.name.encode())
    assert (path / name).read_bytes()[-32:] == (whole / name).read_bytes()[-32:]


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue(tmp_path):
    words = ["search", *TOY, "searcher=lcsc_evolution", "search.num_trials=1000000"]  # it cannot finish first
    process = start(*words, cwd=tmp_path, env=ENV)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(journal.stat().st_size for journal in tmp_path.glob("runs/*/journal.jsonl")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "interrupted; the same line continues" in out
    assert "Traceback" not in out


def test_ctrl_c_that_a_loading_module_swallows_is_still_ctrl_c(monkeypatch, capsys):
    def interrupted(words):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("initialization failed")  # what matplotlib's ft2font makes of it

    monkeypatch.setattr("lcsc.cli.list.main", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["list"]) == 130
    assert "interrupted; the same line continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_a_shell_wants_ignored_stays_ignored(monkeypatch):
    found = []
    monkeypatch.setattr("lcsc.cli.list.main", lambda words: found.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["list"]) == 0
        assert found == [signal.getsignal(signal.SIGINT)] == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_without_ctrl_c_is_not_called_one(monkeypatch):
    def broken(words):
        raise ImportError("initialization failed")

    monkeypatch.setattr("lcsc.cli.list.main", broken)
    with pytest.raises(ImportError, match="initialization failed"):
        main(["list"])

"""`lcsc status` and `lcsc watch`, by run directory."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time

from helpers_fake_run import make_fake_run


def test_status_tells_several_runs(lcsc, tmp_path):
    done = make_fake_run(tmp_path / "done", num_trials=5)
    begun = make_fake_run(tmp_path / "begun", finished=False, num_trials=9, done=4)
    code, out, err = lcsc("status", str(done), str(begun))
    assert (code, err) == (0, "")
    first, second = out.split("\n\n")
    assert first.splitlines()[:2] == [str(done), "  phase          finished"]
    assert "  trials         4 of 9" in second.splitlines()
    assert "  driver         none at work; the line that began the search continues it" in second.splitlines()


def test_what_is_no_run_is_a_sentence(lcsc, tmp_path):
    for verb in ("status", "watch"):
        assert lcsc(verb)[::2] == (2, "lcsc: no run is named. Give the folder that `lcsc search` printed.\n")
        code, _, err = lcsc(verb, str(tmp_path))
        assert code == 2
        assert "is no run directory" in err
    assert lcsc("watch", "a", "b")[::2] == (2, "lcsc: `watch` follows one run, not 2. `lcsc status` takes several.\n")


def finish_later(path, tmp_path):
    """Let a run be finished in a moment by somebody else."""
    summary = make_fake_run(tmp_path / "other", num_trials=9) / "summary.json"
    timer = threading.Timer(0.1, os.replace, (summary, path / "summary.json"))
    timer.start()
    return timer


def test_watch_says_plain_lines_until_the_run_is_finished(lcsc, tmp_path, monkeypatch):
    monkeypatch.setattr("lcsc.cli.watch.LOOK", 0.02)
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=9, done=4)
    timer = finish_later(path, tmp_path)
    code, out, _ = lcsc("watch", str(path))
    timer.join()
    assert code == 0
    lines = out.splitlines()
    assert re.match(r"phase trials · steps \d+ of \d+ · trials 4 of 9 · best so far", lines[0])
    assert lines[1:3] == [str(path), "  phase          finished"]
    assert lines[3].startswith("  result         lcsc ")


def test_watch_redraws_a_terminal(tmp_path):
    path = make_fake_run(tmp_path / "run", finished=False, num_trials=9, done=4)
    ours, theirs = pty.openpty()
    code = "import lcsc.cli.watch as w, lcsc.cli.main as m; w.LOOK = 0.05; raise SystemExit(m.main())"
    words = [sys.executable, "-c", code, "watch", str(path)]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(words, env=env, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    screen, timer, end = b"", None, time.monotonic() + 60
    while time.monotonic() < end:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if timer is None and b"4 of 9" in screen:
            timer = finish_later(path, tmp_path)
    os.close(ours)
    assert process.wait(timeout=60) == 0, screen.decode()
    assert timer is not None
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    assert "trials         4 of 9" in text
    assert text.rstrip().splitlines()[-2].rstrip() == "  phase          finished"

"""What a process died of, by its exit status and the kernel's counts."""

from __future__ import annotations

import pytest

from lcsc.search.deaths import Death, OomCounter, counters, explain


@pytest.mark.parametrize(
    ("code", "cause", "reason"),
    [
        (0, "crashed", "it ended with exit code 0: no such file"),
        (3, "crashed", "it ended with exit code 3: no such file"),
        (-9, "killed", "it was killed with SIGKILL"),
        (-15, "killed", "it was killed with SIGTERM"),
        (-63, "killed", "it was killed with signal 63"),
        (-11, "crashed", "it crashed with SIGSEGV: no such file"),
        (-7, "crashed", "it crashed with SIGBUS: no such file"),
        (-31, "crashed", "it crashed with SIGSYS: no such file"),
    ],
)
def test_deaths_are_told_apart(tmp_path, code, cause, reason):
    assert explain(code, "no such file", OomCounter([tmp_path / "absent"]), who="it") == Death(cause, reason)


def test_each_kill_for_lack_of_memory_is_said_once(tmp_path):
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 3\n")
    counter = OomCounter([tmp_path / "absent", events])
    killed = Death("killed", "the worker was killed with SIGKILL")
    assert explain(-9, "", counter) == killed
    events.write_text("low 0\noom 4\noom_kill 4\n")
    assert explain(-15, "", counter).cause == "killed"  # the system would not ask
    assert explain(-9, "", counter) == Death("oom", "the worker was killed by the system (out of memory)")
    assert explain(-9, "", counter) == killed
    assert not OomCounter([tmp_path / "absent"]).rose()


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("0::/job\n", "job/memory.events"),
        ("5:cpu:/job\n4:memory:/job\n", "memory/job/memory.oom_control"),
        ("5:cpu:/job\n", "memory.events"),
    ],
)
def test_the_narrowest_count_is_asked_first(tmp_path, groups, first):
    proc, root, machine = tmp_path / "cgroup", tmp_path / "fs", tmp_path / "vmstat"
    machine.write_text("oom_kill 1\n")
    assert not OomCounter(counters(proc, root, machine)).rose()
    proc.write_text(groups)
    (root / first).parent.mkdir(parents=True, exist_ok=True)
    (root / first).write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    counter = OomCounter(counters(proc, root, machine))
    machine.write_text("oom_kill 2\n")  # somebody else's
    assert not counter.rose()
    (root / first).write_text("low 0\noom_kill 8\n")
    assert (counter.rose(), counter.rose()) == (True, False)

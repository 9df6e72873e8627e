"""The promises tried out on the user's own file system: a tiny search killed and continued, torn, raced and spoilt.

Nothing here is lcsc's real work; it is the same journal, lock and writing of files, on made-up records, in processes of
their own that import little and so begin at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lcsc.core.errors import LcscError
from lcsc.core.files import new_directory, write_json, writing
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal

#: Steps of the tiny search.
NUM_STEPS = 40
#: Processes that start at the same moment.
NUM_STARTS = 6


@dataclass(frozen=True)
class Finding:
    """What became of one check.

    Args:
        promise: the promises that it is about, such as `I1 I2`.
        text: what was tried.
        passed: None where the file system does not offer what it takes, which costs safety nothing.
        detail: counts, or what was wrong.
    """

    promise: str
    text: str
    passed: bool | None
    detail: str


def selftest(folder: Path, seconds: float, only: Sequence[str] | None = None) -> Iterator[Finding]:
    """Try the promises in a new folder inside `folder`, which is removed again.

    Args:
        folder: on the file system to try.
        seconds: how long the checks that go on and on may take together.
        only: names of `CHECKS`; None for all.

    Raises:
        ConfigError: the folder cannot be written.
    """
    place = folder / f".lcsc-selftest-{secrets.token_hex(4)}"
    with writing(place):
        place.mkdir()
    try:
        for name in CHECKS if only is None else only:
            promise, text, share, check = CHECKS[name]
            room = place / name
            room.mkdir()
            try:
                passed, detail = check(room, time.monotonic() + share * seconds)
            except (LcscError, OSError, AssertionError, ValueError) as error:
                passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Finding(promise, text, passed, detail)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def tiny_search(folder: Path, say: Callable[[int], None] = lambda _: None) -> None:
    """The same steps every time; `say` hears the number of each one that was computed and is on the disk."""
    with Journal(folder, lambda _: None) as journal:
        for index in range(NUM_STEPS):
            new = not journal.holds(index)
            journal.step("trial", {"uid": index}, lambda i=index: {"value": 1 / (i + 3)})  # type: ignore[misc]
            if new:
                say(index)
        write_json(folder / "summary.json", {"steps": NUM_STEPS})


# ------------------------------------------------------------------------------------------------------- checks

Verdict = tuple[bool | None, str]


def _killed(room: Path, until: float) -> Verdict:
    """kill -9 at random times, until the time is up; at least three times."""
    (room / "whole").mkdir()
    began = time.monotonic()
    tiny_search(room / "whole")
    took, rng = time.monotonic() - began, random.Random(0)
    wanted = (room / "whole" / "journal.jsonl").read_bytes()
    kills = runs = told = wrong = 0
    while kills < 3 or (time.monotonic() < until and wrong == 0):
        run, acknowledged = room / f"run{runs}", []
        run.mkdir()
        runs += 1
        while not (run / "summary.json").exists():
            with _child("steps", run) as child:
                stdin, stdout = _pipes(child)
                stdout.readline()  # it is ready
                _go(stdin)
                time.sleep(rng.uniform(0, took))
                child.kill()
                acknowledged += [int(word) for word in stdout.read().split(b"\n")[:-1]]
                kills += child.wait() == -signal.SIGKILL
        whole = (run / "journal.jsonl").read_bytes() == wanted
        records, _ = read_records(run / "journal.jsonl")
        lost = set(acknowledged) - {record["uid"] for record in records}
        wrong += not whole or bool(lost) or len(acknowledged) != len(set(acknowledged))
        told += len(acknowledged)
    return wrong == 0, f"{kills} kills, {told} acknowledged steps, {wrong} of {runs} runs lost, doubled or changed one"


def _torn(room: Path, until: float) -> Verdict:
    """The journal cut at every byte of its last record; longer ones as time allows."""
    tiny_search(room)
    path = room / "journal.jsonl"
    whole = path.read_bytes()
    cuts = 0
    for cut in range(len(whole) - 1, whole.rindex(b"\n", 0, -1) - len(whole) // NUM_STEPS, -1):
        if cuts >= 20 and time.monotonic() > until:
            break
        path.write_bytes(whole[:cut])
        tiny_search(room)
        cuts += 1
        if path.read_bytes() != whole:
            return False, f"cut at byte {cut} of {len(whole)}, the journal was not the same again"
    return True, f"{cuts} cuts, each continued to the same bytes"


def _damaged(room: Path, until: float) -> Verdict:
    """Random bytes of the journal changed: refused."""
    tiny_search(room)
    path, rng = room / "journal.jsonl", random.Random(0)
    whole, flips = path.read_bytes(), 0
    while flips < 50 or (flips < 500 and time.monotonic() < until):
        data = bytearray(whole)
        data[rng.randrange(len(whole) - 1)] ^= rng.randrange(1, 256)
        path.write_bytes(bytes(data))
        flips += 1
        try:
            read_records(path)
        except LcscError:
            continue
        return False, f"flip {flips} was not noticed"
    return True, f"{flips} flipped bytes, all noticed"


def _raced(room: Path, until: float) -> Verdict:
    """Processes that start at the same moment, again and again: one writes."""
    rounds = 0
    while rounds < 1 or (rounds < 20 and time.monotonic() < until):
        run = room / f"run{rounds}"
        run.mkdir()
        rounds += 1
        children = [_spawn("start", run) for _ in range(NUM_STARTS)]
        try:
            pipes = [_pipes(child) for child in children]
            for _, stdout in pipes:
                stdout.readline()
            for stdin, _ in pipes:
                _go(stdin)
            words = [stdout.readline().strip() for _, stdout in pipes]
        finally:
            for child in children:
                _end(child)
        if sorted(words) != [b"refused"] * (NUM_STARTS - 1) + [b"won"]:
            return False, f"round {rounds}: {[word.decode() for word in words]}"
    return True, f"{rounds} rounds of {NUM_STARTS} starts, one winner each"


def _renamed(room: Path, until: float) -> Verdict:
    """A file replaced again and again while another process reads it; a folder is never put over a full one."""
    path, sizes = room / "file.json", 0
    write_json(path, {"fill": 0})
    with _child("read", room) as child:
        _, stdout = _pipes(child)
        stdout.readline()
        while sizes < 50 or (sizes < 2000 and time.monotonic() < until):
            sizes += 1
            write_json(path, {"fill": [sizes] * (1 + sizes % 7 * 1000)})
        (room / "stop").touch()
        reads, torn = map(int, stdout.readline().split())
    with new_directory(room / "full") as folder:
        (folder / "x").touch()
    (room / "other").mkdir()
    try:
        os.rename(room / "other", room / "full")
        kept = False
    except OSError as error:
        kept = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    full = f"a full folder is {'kept' if kept else 'replaced'}"
    return torn == 0 and kept, f"{sizes} replacements, {reads} reads, {torn} half; {full}"


def _flushed(room: Path, until: float) -> Verdict:
    """fsync of files and folders is taken without an error, and one that fails is heard."""
    times = []
    for index in range(20):
        began = time.perf_counter()
        write_json(room / f"{index}.json", {"x": index})
        times.append(time.perf_counter() - began)
    reader, writer = os.pipe()
    try:
        os.fsync(writer)  # nothing that could be flushed: the system has to say so
        heard = False
    except OSError:
        heard = True
    finally:
        os.close(reader)
        os.close(writer)
    return heard, f"20 files, {1000 * sorted(times)[10]:.1f} ms each (median)"


def _flocked(room: Path, until: float) -> Verdict:
    """The kernel's locks: two openings exclude each other."""
    with open(room / "file", "wb") as first, open(room / "file", "ab") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return None, f"not offered here ({error.strerror}); the lock folder alone decides"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, "kept, and given back by the kernel"
    return False, "two processes may hold one lock"


def _mapped(room: Path, until: float) -> Verdict:
    """What is written is what a memory map reads."""
    data = random.Random(0).randbytes(1 << 20)
    path = room / "weights"
    path.write_bytes(data)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as found:
            same = found[:] == data
            with open(path, "r+b") as again:
                again.seek(4096)
                again.write(b"changed")
            seen = found[4096:4103] == b"changed"
    except OSError as error:
        return None, f"not offered here ({error.strerror}); banks are read instead (bank.storage)"
    return same, f"1 MiB read back; changes by another opening are {'seen' if seen else 'not seen'}"


def _spared(room: Path, until: float) -> Verdict:
    """A finished run and its inputs are left as they are."""
    tiny_search(room)
    (room / "other").write_text("mine")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in room.iterdir() if path.name == "other"}
    tiny_search(room)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in room.iterdir() if path.name == "other"}
    left = sorted(path.name for path in room.iterdir())
    wanted = ["journal.jsonl", "other", "summary.json", "timing.jsonl"]
    return before == after and left == wanted, f"two starts left {', '.join(left)}"


#: name -> promises, what is tried, share of the time, check
CHECKS: dict[str, tuple[str, str, float, Callable[[Path, float], Verdict]]] = {
    "fsync": ("I1", "fsync of files and folders", 0.0, _flushed),
    "kill": ("I1 I2 I3", "kill -9 at random times, then the same line", 0.5, _killed),
    "torn": ("I3", "a torn last record", 0.1, _torn),
    "damage": ("I3", "changed bytes in the journal", 0.05, _damaged),
    "rename": ("I4", "files replaced while they are read", 0.1, _renamed),
    "spared": ("I5 I7", "nothing else is touched", 0.0, _spared),
    "flock": ("I9", "the kernel's file locks", 0.0, _flocked),
    "starts": ("I9", "simultaneous starts", 0.2, _raced),
    "mmap": ("I10", "memory maps", 0.0, _mapped),
}


# ---------------------------------------------------------------------------------------------------- processes


def _spawn(what: str, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "lcsc.search.selftest", what, str(folder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)


def _pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    return child.stdin, child.stdout  # type: ignore[return-value]


def _go(stdin: IO[bytes]) -> None:
    stdin.write(b"go\n")
    stdin.flush()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


@contextmanager
def _child(what: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    child = _spawn(what, folder)
    try:
        yield child
    finally:
        _end(child)


def _play(what: str, folder: Path) -> None:
    """What a process of a check does."""
    print("ready", flush=True)
    if what == "read":
        reads = torn = 0
        while not (folder / "stop").exists():
            reads += 1
            try:
                json.loads((folder / "file.json").read_bytes())
            except ValueError:
                torn += 1
        print(reads, torn, flush=True)
        return
    sys.stdin.readline()
    if what == "steps":
        tiny_search(folder, lambda index: print(index, flush=True))
        return
    try:
        with Journal(folder, lambda _: None):
            print("won", flush=True)
            sys.stdin.readline()
    except LcscError:
        print("refused", flush=True)


if __name__ == "__main__":
    _play(sys.argv[1], Path(sys.argv[2]))

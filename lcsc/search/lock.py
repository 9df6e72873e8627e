"""Who may write a run directory: one process, wherever it runs.

A lock is a folder that appears complete under its name, by a rename that fails where the name is taken, and holds
`owner.json` and `beat`, a counter that its owner raises. An owner on this machine is judged by its process (id and time
of start, so that a reused id is told apart); one elsewhere by its counter alone, watched on this machine's own
monotonic clock. What the clocks of two machines say is never compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from lcsc.core.errors import RunError
from lcsc.core.files import fsync_dir, writing

#: Seconds between two beats of an owner, and how long one elsewhere has to be silent to be taken for gone.
BEAT, LEASE = 3.0, 30.0
#: Seconds between two looks at somebody else's lock.
LOOK = 0.5


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock, as `owner.json` tells it."""

    host: str
    pid: int
    boot_id: str
    start: float
    token: str

    @classmethod
    def here(cls) -> Owner:
        """This process, under a token of its own."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _boot_id(), _start_of(pid) or 0.0, secrets.token_hex(8))

    @classmethod
    def read(cls, lock: Path) -> Owner | None:
        """Who holds a lock, None where nobody does; a file that says nothing sensible makes an unknown owner."""
        try:
            found = json.loads((lock / "owner.json").read_bytes())
            where = str(found["host"]), int(found["pid"]), str(found["boot_id"])
            return cls(*where, float(found["start"]), str(found["token"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls("unknown", 0, "", 0.0, "") if lock.exists() else None

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether the process still runs; None where that cannot be seen from here."""
        if self.boot_id != _boot_id() or self.host != socket.gethostname():
            return None
        return _start_of(self.pid) == self.start


class Lock:
    """The exclusive right that a folder at `path` stands for; use as a context manager.

    Args:
        path: of the lock.
        what: it is about, for messages.
        note: hears one sentence when the lock of a process that is gone is taken over.
        gated: whether the caller holds a lock that the kernel keeps for this machine, so that no other holder is here.
        patience: seconds to wait for a holder that is alive.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        note: Callable[[str], None],
        *,
        gated: bool = False,
        patience: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path, self._what, self._note = path, what, note
        self._gated, self._patience, self._clock, self._sleep = gated, patience, clock, sleep
        self._me, self._stop = Owner.here(), threading.Event()

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunError: another process holds it and is alive.
            ConfigError: the lock cannot be written.
        """
        began = self._clock()
        while (beat := self._install()) is None:
            owner = Owner.read(self.path)
            if owner is None:  # released just now
                continue
            reason = self._why_gone(owner)
            if reason is not None:
                if self._remove(owner):
                    self._note(f"taking over from {reason}")
            elif Owner.read(self.path) == owner and self._clock() - began >= self._patience:
                raise busy(self._what, owner)
            else:
                self._sleep(self._patience / 1000)
        for left in self.path.parent.glob(f".{self.path.name}-*"):  # of starts that were killed
            shutil.rmtree(left, ignore_errors=True)
        threading.Thread(target=self._keep_beating, args=[beat], name=f"beat of {self.path}", daemon=True).start()

    def release(self) -> None:
        """Give the lock back; one that cannot be removed will be found to be stale."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._remove(self._me)

    def check(self) -> None:
        """Make sure that the lock is still this process's own; it is not after this process stood still for long.

        Raises:
            RunError: another process took it over, or it was removed.
        """
        for _ in range(40):
            owner = Owner.read(self.path)
            if owner == self._me:
                return
            if owner is not None and owner.token:
                raise RunError(f"{owner} took `{self._what}` over while this process stood still. Leave it to it.")
            self._sleep(0.05)  # somebody who took it by mistake is putting it back
        raise RunError(f"the lock `{self.path}` was removed while `{self._what}` runs. Run the same line again.")

    # --------------------------------------------------------------------------------------------------- how

    def _install(self) -> int | None:
        """Put a complete lock under its name; its open `beat`, None where the name is taken."""
        if self.path.exists():
            return None
        temp = self.path.with_name(f".{self.path.name}-{self._me.token}")
        with writing(self.path):
            try:
                temp.mkdir()
                _put(temp / "owner.json", json.dumps(asdict(self._me)).encode())
                fd = os.open(temp / "beat", os.O_RDWR | os.O_CREAT)
                try:
                    os.pwrite(fd, _count(0), 0)
                    os.rename(temp, self.path)
                    fsync_dir(self.path.parent)
                except OSError:
                    os.close(fd)
                    raise
                return fd
            except OSError as error:
                taken = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # the last: cleared away as a left-over
                if error.errno not in taken or not self.path.parent.exists():
                    if Owner.read(self.path) == self._me:
                        shutil.rmtree(self.path, ignore_errors=True)
                    raise
                return None
            finally:
                shutil.rmtree(temp, ignore_errors=True)

    def _why_gone(self, owner: Owner) -> str | None:
        """Who is gone and how that is known, None where the owner is alive."""
        if self._gated and owner.boot_id == self._me.boot_id:
            return f"process {owner.pid}, which is gone"
        alive = owner.alive
        if alive is None:
            return self._watched(owner)
        return None if alive else f"process {owner.pid}, which is gone"

    def _watched(self, owner: Owner) -> str | None:
        """Look at an owner elsewhere until its counter moves, or has stood still for the lease."""
        self._note(f"`{self._what}` is locked by {owner}; watching for up to {LEASE:.0f} s whether that one is alive")
        first, began = beat_of(self.path), self._clock()
        while True:
            self._sleep(LOOK)
            now = self._clock()  # before the look: a process that stood still itself must not trust what it saw before
            if Owner.read(self.path) != owner or beat_of(self.path) != first:
                return None
            if now - began >= LEASE:
                return f"{owner}, which has been silent for {LEASE:.0f} s"

    def _remove(self, owner: Owner) -> bool:
        """Take this owner's lock away; another's that came in between is put back."""
        aside = self.path.with_name(f".{self.path.name}-{secrets.token_hex(8)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        if Owner.read(aside) != owner:
            with contextlib.suppress(OSError):  # a third took the place: then the second notices, and stops
                os.rename(aside, self.path)
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def _keep_beating(self, fd: int) -> None:
        count = 0
        while not self._stop.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):
                os.pwrite(fd, _count(count), 0)
                os.fsync(fd)  # sends it to the server of a network file system
        os.close(fd)  # nobody else does: the number might be another file's by then


def busy(what: str, owner: Owner | None) -> RunError:
    """What a second process is told."""
    who = f": {owner}" if owner is not None else ""
    return RunError(f"another process is running `{what}`{who}. Wait for it, or stop it first.")


def _put(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _count(number: int) -> bytes:
    return b"%020d" % number


def beat_of(lock: Path) -> bytes:
    """The counter of a lock's owner as it stands; empty where there is none."""
    try:
        return (lock / "beat").read_bytes()
    except OSError:
        return b""


@cache
def _boot_id() -> str:
    """What changes when this machine is started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _start_of(pid: int) -> float | None:
    """When a process of this machine started, on a clock that nobody sets; None where it is gone."""
    try:
        if psutil.LINUX:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
            return None if fields[0] in (b"Z", b"X") else float(fields[19])  # clock ticks since the machine started
        return psutil.Process(pid).create_time()
    except (OSError, IndexError, psutil.Error):
        return None

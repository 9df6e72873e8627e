"""A process that can compute, read files and write to what it already holds, and nothing else. Linux only.

`enter` installs a seccomp-BPF filter (seccomp(2)) for all threads of the calling process. It is an allow list: no
socket of any family, no new process or program, no file opened for writing, created, renamed or removed, no signal to
another process, no device control, no 32-bit or x32 system call. Reading files stays possible, because an interpreter
needs it; what is read cannot leave by any way but the file descriptors the process was started with.

This file imports nothing of lcsc, so that it can be loaded by its path in a bare interpreter.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import socket
import struct
import sys

#: (AUDIT_ARCH, numbers) by `platform.machine()`; numbers as in the kernel's asm/unistd_64.h and asm-generic/unistd.h.
#: Calls that one architecture lacks are left out of it.
_FREE = {
    "x86_64": (
        "read=0 write=1 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 "
        "rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 pread64=17 readv=19 writev=20 access=21 sched_yield=24 "
        "mremap=25 mincore=27 madvise=28 dup=32 nanosleep=35 getpid=39 exit=60 uname=63 getcwd=79 readlink=89 "
        "gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99 times=100 getuid=102 getgid=104 geteuid=107 getegid=108 "
        "getppid=110 sigaltstack=131 statfs=137 fstatfs=138 gettid=186 time=201 futex=202 sched_getaffinity=204 "
        "getdents64=217 set_tid_address=218 restart_syscall=219 clock_gettime=228 clock_getres=229 "
        "clock_nanosleep=230 exit_group=231 newfstatat=262 readlinkat=267 faccessat=269 set_robust_list=273 "
        "getrandom=318 membarrier=324 statx=332 rseq=334 faccessat2=439"
    ),
    "aarch64": (
        "getcwd=17 dup=23 statfs=43 fstatfs=44 faccessat=48 close=57 getdents64=61 lseek=62 read=63 write=64 readv=65 "
        "writev=66 pread64=67 readlinkat=78 newfstatat=79 fstat=80 exit=93 exit_group=94 set_tid_address=96 futex=98 "
        "set_robust_list=99 nanosleep=101 clock_gettime=113 clock_getres=114 clock_nanosleep=115 sched_getaffinity=123 "
        "sched_yield=124 restart_syscall=128 sigaltstack=132 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 "
        "times=153 uname=160 getrlimit=163 getrusage=165 gettimeofday=169 getpid=172 getppid=173 getuid=174 "
        "geteuid=175 getgid=176 getegid=177 gettid=178 sysinfo=179 brk=214 munmap=215 mremap=216 mmap=222 mprotect=226 "
        "mincore=232 madvise=233 getrandom=278 membarrier=283 statx=291 rseq=293 faccessat2=439"
    ),
}
#: Calls that pass only with harmless arguments, and those whose libraries have a second way that can be checked.
_CHECKED = {
    "x86_64": "open=2 clone=56 fcntl=72 prctl=157 openat=257 prlimit64=302 clone3=435 openat2=437 seccomp=317",
    "aarch64": "fcntl=25 openat=56 prctl=167 clone=220 prlimit64=261 clone3=435 openat2=437 seccomp=277",
}
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_X32 = 0x40000000
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld abs, jeq, jge, jset, ret
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; low words come first

#: a reader that computes longer than this is stuck
MAX_CPU_SECONDS = 3600

_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FCNTL = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_PRCTL = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA: names only
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _FILTER, _ALL_THREADS = 1, 38, 1, 1


class JailError(RuntimeError):
    """The process could not be cut off; nothing was read."""


def supported() -> bool:
    """Whether `enter` knows this system at all."""
    return sys.platform == "linux" and platform.machine() in _ARCH and struct.calcsize("P") == 8


def numbers(text: str) -> dict[str, int]:
    """`{"read": 0, ...}` of a table above."""
    return {name: int(number) for name, number in (word.split("=") for word in text.split())}


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions (code, jump if true, jump if false, value), cBPF of seccomp(2)."""
    call = numbers(_CHECKED[machine])

    def argument(index: int, high: bool = False) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * high)

    def one_of(number: int, index: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        tests = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        return [(_EQUAL, 0, 2 + len(tests), number), argument(index), *tests, (_RETURN, 0, 0, _EPERM)]

    def bits(number: int, index: int, mask: int, if_any: int, if_none: int) -> list[tuple[int, int, int, int]]:
        ends = [(_RETURN, 0, 0, if_any), (_RETURN, 0, 0, if_none)]
        return [(_EQUAL, 0, 4, number), argument(index), (_ANY_BIT, 0, 1, mask), *ends]

    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCH[machine]),
        (_RETURN, 0, 0, _EPERM),  # 32-bit calls have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _EPERM),
    ]
    for number in numbers(_FREE[machine]).values():
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program += bits(call["clone"], 0, _CLONE_THREAD, _ALLOW, _EPERM)  # threads, no processes
    program += bits(call["openat"], 2, _WRITING, _EPERM, _ALLOW)
    if "open" in call:
        program += bits(call["open"], 1, _WRITING, _EPERM, _ALLOW)
    program += one_of(call["fcntl"], 1, _FCNTL)
    program += one_of(call["prctl"], 0, _PRCTL)
    # prlimit64 may read limits; a null pointer to new ones is checked in both its words
    limits = [argument(2), (_EQUAL, 0, 3, 0), argument(2, high=True), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 6, call["prlimit64"]), *limits, (_RETURN, 0, 0, _EPERM)]
    for name in ("clone3", "openat2"):  # their arguments lie in memory; libc falls back to the calls above
        program += [(_EQUAL, 0, 1, call[name]), (_RETURN, 0, 0, _ENOSYS)]
    return [*program, (_RETURN, 0, 0, _EPERM)]


def enter(*, max_bytes_written: int, max_bytes_more: int) -> None:
    """Cut the calling process off, for good.

    Args:
        max_bytes_written: largest file the process may write.
        max_bytes_more: address space it may take beyond what it has now.

    Raises:
        JailError: the system offers no such filter, or the filter does not hold; nothing was read.
    """
    if not supported():
        raise JailError(f"`{sys.platform}` on `{platform.machine()}` is not Linux on x86_64 or aarch64")
    machine = platform.machine()
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_FSIZE, max_bytes_written)
    _limit(resource.RLIMIT_AS, now + max_bytes_more)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, MAX_CPU_SECONDS)
    code = b"".join(struct.pack("=HBBI", *step) for step in _filter(machine))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # no orphan goes on reading
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise JailError(f"the kernel refused PR_SET_NO_NEW_PRIVS: {os.strerror(ctypes.get_errno())}")
    if libc.syscall(numbers(_CHECKED[machine])["seccomp"], _FILTER, _ALL_THREADS, program):
        raise JailError(f"the kernel refused the seccomp filter: {os.strerror(ctypes.get_errno())}")
    _check()


def _limit(which: int, value: int) -> None:
    """Lower a limit, hard and soft; a limit that is lower already stays."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _check() -> None:
    """Try what must fail, so that a filter that does not hold is noticed before anything is read."""

    def child() -> None:
        if os.fork() == 0:
            os._exit(0)

    attempts = {
        "open a socket": lambda: socket.socket().close(),
        "start a process": child,
        "start a program": lambda: os.execv("/nonexistent", ["nonexistent"]),
        "open a file for writing": lambda: os.close(os.open(os.devnull, os.O_WRONLY)),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except PermissionError:
            continue
        except OSError as error:
            raise JailError(f"the filter does not hold: to {what} failed with {error}, not with EPERM") from None
        raise JailError(f"the filter does not hold: the process could {what}")

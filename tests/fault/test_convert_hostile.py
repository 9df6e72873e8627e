"""Hostile and damaged pickles: what they try fails, nothing of theirs runs outside the jail, nothing partial stays."""

from __future__ import annotations

import collections
import ctypes.util
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers_pickles import edm  # noqa: F401 - a fixture
from safetensors.torch import load_file

from lcsc.bank import _jail
from lcsc.bank import convert as module
from lcsc.bank.convert import convert
from lcsc.core.errors import BankError, ConfigError

JAIL = Path(_jail.__file__)


class Call:
    """Pickles as a call of any function, as every pickle exploit does."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def run(source, to, **kwargs):
    return convert(source, to, allow_code=True, say=lambda line: None, **kwargs)


def in_jail(code, *, jailed=True):
    """Standard output of a program that first goes to jail; `attempt(f)` prints what became of a call."""
    enter = "jail.enter(max_bytes_written=10000, max_bytes_more=2**30)" if jailed else ""
    program = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("jail", {str(JAIL)!r})
jail = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jail)
import ctypes, socket, subprocess, threading, resource, mmap
def attempt(name, function):
    try:
        print(name, "done", function())
    except BaseException as error:
        print(name, type(error).__name__, getattr(error, "errno", None))
{enter}
{code}
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---------------------------------------------------------------------------------------------------- the jail


def test_what_the_jail_forbids(tmp_path):
    victim, stranger = tmp_path / "victim", subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    victim.write_text("mine")
    os.chmod(victim, 0o640)
    attempts = {
        "inet": "socket.socket(socket.AF_INET)",
        "inet6": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "unix": "socket.socket(socket.AF_UNIX)",
        "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "pair": "socket.socketpair()",
        "fork": "os.fork()",
        "exec": "os.execv('/bin/true', ['true'])",
        "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess": "subprocess.run(['/bin/true'])",
        "overwrite": f"open({str(victim)!r}, 'w')",
        "append": f"open({str(victim)!r}, 'a')",
        "update": f"open({str(victim)!r}, 'r+')",
        "truncate": f"os.truncate({str(victim)!r}, 0)",
        "create": f"os.open({str(tmp_path / 'new')!r}, os.O_RDONLY | os.O_CREAT)",
        "unlink": f"os.unlink({str(victim)!r})",
        "rename": f"os.rename({str(victim)!r}, {str(tmp_path / 'new')!r})",
        "link": f"os.link({str(victim)!r}, {str(tmp_path / 'new')!r})",
        "symlink": f"os.symlink('/', {str(tmp_path / 'new')!r})",
        "mkdir": f"os.mkdir({str(tmp_path / 'new')!r})",
        "fifo": f"os.mkfifo({str(tmp_path / 'new')!r})",
        "chmod": f"os.chmod({str(victim)!r}, 0o777)",
        "chown": f"os.chown({str(victim)!r}, 0, 0)",
        "utime": f"os.utime({str(victim)!r})",
        "memfd": "os.memfd_create('x')",
        "kill": f"os.kill({stranger.pid}, 9)",
        "pidfd": f"os.pidfd_open({stranger.pid})",
    }
    out = in_jail("\n".join(f"attempt({name!r}, lambda: {what})" for name, what in attempts.items()))
    assert out == [f"{name} PermissionError 1" for name in attempts]
    assert stranger.poll() is None
    stranger.communicate(b"\n")
    assert victim.read_text() == "mine"
    assert victim.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["victim"]


def test_what_still_works_and_what_limits_hold():
    code = f"""
thread = threading.Thread(target=lambda: print("thread"))
thread.start(); thread.join()
print(open({str(JAIL)!r}).readline().strip() != "")
attempt("system", lambda: os.system("true") != 0)
attempt("memory", lambda: bytearray(3 * 2**30))
attempt("limits", lambda: ctypes.CDLL(None).prlimit(0, 7, ctypes.byref((ctypes.c_ulong * 2)(99, 99)), None))
attempt("ioctl", lambda: ctypes.CDLL(None).ioctl(1, 0x5412, b"x"))
attempt("dumpable", lambda: ctypes.CDLL(None).prctl(4, 1, 0, 0, 0))
attempt("io_uring", lambda: ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)))
attempt("x32 getpid", lambda: ctypes.CDLL(None).syscall(0x40000000 + 39))
"""
    assert in_jail(code) == [
        *("thread", "True", "system done True", "memory MemoryError None", "limits done -1", "ioctl done -1"),
        *("dumpable done -1", "io_uring done -1", "x32 getpid done -1"),
    ]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 is an x86 instruction")
def test_32_bit_system_calls_are_no_way_round():
    code = """
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000" "cd80" "c3"))  # mov eax, 20 (getpid); int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(call())
"""
    assert in_jail(code) == ["-1"]


def test_threads_that_exist_already_are_cut_off_too():
    code = """
go, result = threading.Event(), []
def later():
    go.wait()
    attempt("thread", lambda: socket.socket())
thread = threading.Thread(target=later)
thread.start()
jail.enter(max_bytes_written=10000, max_bytes_more=2**30)
go.set()
thread.join()
"""
    assert in_jail(code, jailed=False) == ["thread PermissionError 1"]


def test_system_call_numbers_are_those_of_libseccomp():
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("libseccomp is not installed")
    resolve = ctypes.CDLL(name).seccomp_syscall_resolve_name_arch
    for machine, arch in _jail._ARCH.items():
        table = _jail.numbers(_jail._FREE[machine]) | _jail.numbers(_jail._CHECKED[machine])
        assert len(table) > 60
        for call, number in table.items():
            assert resolve(ctypes.c_uint32(arch), call.encode()) == number, (machine, call)


def test_forbidden_calls_stand_in_no_table():
    for machine in _jail._ARCH:
        free = set(_jail.numbers(_jail._FREE[machine]))
        assert not free & {"socket", "connect", "sendto", "sendmsg", "execve", "execveat", "fork", "vfork", "clone"}
        assert not free & {"kill", "tgkill", "ptrace", "io_uring_setup", "ioctl", "unlink", "rename", "mount", "bpf"}


def test_without_isolation_nothing_is_read(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(_jail.sys, "platform", "darwin")
    with pytest.raises(BankError, match=r"isolated on Linux \(x86_64, aarch64\) only, and this is `darwin`"):
        run(tmp_path / "a.pt", tmp_path / "out")
    with pytest.raises(_jail.JailError, match="is not Linux on x86_64 or aarch64"):
        _jail.enter(max_bytes_written=1, max_bytes_more=1)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- hostile pickles


def payloads(canary, port):
    """Calls that leave a trace when they succeed."""
    return [
        Call(os.system, f"touch '{canary}'"),
        Call(exec, f"open({str(canary)!r}, 'w')"),
        Call(subprocess.Popen, ["touch", str(canary)]),
        Call(socket.create_connection, ("127.0.0.1", port)),
        Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
    ]


@pytest.mark.parametrize("layout", ["pickle", "zip", "legacy"])
def test_payloads_beside_tensors_are_never_run(tmp_path, edm, layout):  # noqa: F811
    canary = tmp_path / "touched"
    net = edm.Precond(2)
    net.note = payloads(canary, 9)[0]  # inside the module's own state
    value = {"bad": payloads(canary, 9), "ema": net, "worse": Call(Call, payloads(canary, 9))}
    if layout == "pickle":
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    else:
        torch.save(value, tmp_path / "a.pkl", _use_new_zipfile_serialization=layout == "zip")
    found = load_file(run(tmp_path / "a.pkl", tmp_path / "out")[0])
    assert torch.equal(found["scale"], net.scale)
    assert not canary.exists()
    assert not edm.canary.exists()


def test_payloads_that_are_run_get_nowhere(tmp_path):
    canary = tmp_path / "touched"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        calls = payloads(canary, server.getsockname()[1])
        shell, connect = calls[0], calls[3]  # the shell only says that it failed; the connection raises
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": [shell, connect]}))
        with pytest.raises(BankError, match=r"could not be read in isolation: PermissionError: \[Errno 1\]"):
            run(tmp_path / "a.pkl", tmp_path / "out")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not canary.exists()
    assert os.listdir(tmp_path / "out") == []


ELSEWHERE = """
import os, socket, sys, torch

def attempt(function):
    try:
        return 1 if function() else 0
    except PermissionError:
        return 7

def build(*tensors):
    calls = [socket.socket, os.fork, lambda: open(CANARY, "w"), lambda: os.system("true"), lambda: os.listdir("/")]
    known = ("PATH", "LD_LIBRARY_PATH", "LC_ALL", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    foreign = [key for key in os.environ if key not in known and not key.startswith(("TORCH", "KMP", "PYTORCH"))]
    tried = torch.tensor([attempt(call) for call in calls])
    return {"w": tensors[0], "sum": sum(tensors), "tried": tried, "foreign": torch.tensor(len(foreign))}
"""


def test_real_reading_has_the_code_but_no_environment_and_no_network(tmp_path, monkeypatch):
    canary, code = tmp_path / "touched", tmp_path / "code"
    code.mkdir()
    (code / "elsewhere.py").write_text(ELSEWHERE.replace("CANARY", repr(str(canary))))
    monkeypatch.syspath_prepend(code)
    monkeypatch.setenv("SECRET_TOKEN", "x")
    import elsewhere

    tensors = torch.randn(2, 3).to(torch.float16).t(), torch.ones(3, 2)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"net": Call(elsewhere.build, *tensors)}))
    with pytest.raises(BankError, match=r"needs code that is not here: .*No module named 'elsewhere'.*`code=DIR`"):
        run(tmp_path / "a.pkl", tmp_path / "out")
    said = []
    out = convert(tmp_path / "a.pkl", tmp_path / "out", allow_code=True, code=code, say=said.append)
    found = load_file(out[0])
    assert torch.equal(found["w"], tensors[0])
    assert found["w"].dtype == torch.float16
    assert torch.equal(found["sum"], sum(tensors))
    assert found["tried"].tolist() == [7, 7, 7, 1, 1]  # a shell that could not start says 127; reading is possible
    assert found["foreign"].item() == 0
    assert "`net`, 4 tensors, 0.0 MB, by running its code in isolation" in said[0]
    assert not canary.exists()


def test_words_of_the_child_cannot_steer_the_terminal(tmp_path):
    answer = {"status": "failed", "why": "Error: \x1b[2J\x1b]0;x\x07\r\n" + "y" * 1000}
    sentence = module._sentence(tmp_path / "a\x1b[31m.pkl", answer)
    assert sentence.isprintable()
    assert len(sentence) < 600


# ------------------------------------------------------------------------------------------- damaged files


def test_truncation_leaves_nothing(tmp_path, edm):  # noqa: F811
    for suffix, legacy in ((".pkl", None), (".pt", True), (".pth", False)):
        whole = tmp_path / f"whole{suffix}"
        if legacy is None:
            whole.write_bytes(pickle.dumps({"ema": edm.Precond(2)}))
        else:
            torch.save({"w": torch.randn(50)}, whole, _use_new_zipfile_serialization=not legacy)
        data = whole.read_bytes()
        for share in (0, 0.02, 0.5, 0.99):
            part = tmp_path / f"part{suffix}"
            part.write_bytes(data[: int(share * len(data))])
            with pytest.raises(BankError, match=r"is damaged, or no pickle or torch file: .+\. Copy it again\."):
                run(part, tmp_path / "out")
            assert os.listdir(tmp_path / "out") == []


def test_lies_about_sizes_are_refused(tmp_path):
    def tensor(size, stride, offset=0):
        storage = torch.ones(6).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return Call(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, collections.OrderedDict())

    for k, bad in enumerate([((7,), (1,)), ((2, 3), (4, 1)), ((6,), (1,), 1), ((6,), (-1,), 5), ((-1,), (1,))]):
        (tmp_path / f"{k}.pkl").write_bytes(pickle.dumps({"ema": {"w": tensor(*bad)}}))
        with pytest.raises(BankError, match="is damaged"):
            run(tmp_path / f"{k}.pkl", tmp_path / "out")
    (tmp_path / "huge.pkl").write_bytes(pickle.dumps({"ema": {"w": tensor((2**20, 2**20), (0, 0))}}))
    with pytest.raises(BankError, match="asks for more than .* bytes of memory"):
        run(tmp_path / "huge.pkl", tmp_path / "out")
    (tmp_path / "big.pkl").write_bytes(pickle.dumps({"ema": {"w": tensor((2**24,), (0,))}}))
    with pytest.raises(BankError, match="could not be written: .*File too large"):
        run(tmp_path / "big.pkl", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(BankError, match="is damaged.*compressed entries"):
        run(tmp_path / "b.pt", tmp_path / "out")


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(BankError, match=r"pipe.pkl` is no regular file"):
        run(tmp_path / "pipe.pkl", tmp_path / "out")
    with pytest.raises(BankError, match=r"`/dev/zero` is no regular file"):
        run("/dev/zero", tmp_path / "out")


# --------------------------------------------------------------------------------------------- interruptions


SLOW = """
import sys, time
import lcsc.bank.convert as module
child, calls = module._child, []
def slow(*args, **kwargs):
    answer = child(*args, **kwargs)
    calls.append(answer)
    if len(calls) == 2:
        print("ready", flush=True)
        time.sleep(60)
    return answer
module._child = slow
module.convert(sys.argv[1], sys.argv[2], allow_code=True, say=lambda line: None)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_partial_file_and_goes_on(tmp_path, how):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for k in range(3):
        torch.save({"ema": {"w": torch.full((3,), float(k))}}, source / f"{k}.pt")
    words = [sys.executable, "-c", SLOW, source, out]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"ready\n"
        draft = out / ".1.safetensors.convert"
        assert draft.exists()
        with pytest.raises(ConfigError, match=r"another process is making `.*1.safetensors` right now"):
            run(source, out)
        process.send_signal(how)
    assert process.returncode != 0
    names = sorted(os.listdir(out))
    assert names == (["0.safetensors"] if how == signal.SIGINT else [draft.name, "0.safetensors"])
    lines = []
    outputs = convert(source, out, allow_code=True, say=lines.append)
    assert ["kept" in line for line in lines] == [True, False, False]
    assert [load_file(path)["w"][0].item() for path in outputs] == [0, 1, 2]
    assert sorted(os.listdir(out)) == ["0.safetensors", "1.safetensors", "2.safetensors"]


def test_the_jailed_process_dies_with_its_parent(tmp_path):
    inner = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("jail", {str(JAIL)!r})
jail = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jail)
jail.enter(max_bytes_written=10, max_bytes_more=2**28)
print("in", flush=True)
time.sleep(60)
"""
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-I", "-c", outer], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        process.kill()
        start = time.monotonic()
        assert process.stdout.read() == b""  # ends when the last holder of the pipe is gone
    assert time.monotonic() - start < 10


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    torch.save({"ema": {"w": torch.ones(3)}}, tmp_path / "a.pt")
    child = module._child

    def meddle(*args, **kwargs):
        answer = child(*args, **kwargs)
        os.utime(tmp_path / "a.pt")
        return answer

    monkeypatch.setattr(module, "_child", meddle)
    with pytest.raises(BankError, match=r"a.pt` changed while it was read"):
        run(tmp_path / "a.pt", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_child_that_dies_or_lies(tmp_path, monkeypatch):
    torch.save({"ema": {"w": torch.ones(3)}}, tmp_path / "a.pt")
    program = tmp_path / "_convert_child.py"
    monkeypatch.setattr(module, "__file__", str(tmp_path / "convert.py"))
    bodies = {
        "import os; os.kill(os.getpid(), 9)": "died with code -9",
        "import os, sys, json; os.write(json.loads(sys.argv[1])['answer'], b'[1]' * 9000)": "died with code",
        "import os, sys, json; os.write(json.loads(sys.argv[1])['answer'], b'{\"status\": \"ok\"}')": "did not become",
        'import os, sys, json; os.write(json.loads(sys.argv[1])[\'answer\'], b\'{"status": "jail", "why": "x"}\')': (
            "no isolation could be set up to read"
        ),
    }
    for body, words in bodies.items():
        program.write_text(body)
        with pytest.raises(BankError, match=words):
            run(tmp_path / "a.pt", tmp_path / "out")
        assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    torch.save({"ema": {"w": torch.ones(3)}}, tmp_path / "a.pt")
    child = module._child
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(module, "_child", lambda source, fd, *rest, **kw: child(source, full.fileno(), *rest, **kw))
        with pytest.raises(BankError, match=r"could not be written: .*No space left on device.* Make room"):
            run(tmp_path / "a.pt", tmp_path / "out")

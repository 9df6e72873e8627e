"""Pickled checkpoints to safetensors: the one door for files that run code when they are opened.

EDM and EDM2 snapshots, training states, legacy torch files and other pickles are read by a process of their own that
first cuts itself off (`lcsc.bank._jail`) and then reads the tensors without running anything (`lcsc.bank._inert`).
Only a file whose tensors cannot be had that way is unpickled for real, still inside the jail. This process never
unpickles; it hands out open files, and keeps the output only after it was read back as a safetensors file.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lcsc.bank import _jail
from lcsc.core.errors import BankError, ConfigError, OutputExistsError
from lcsc.core.files import fsync_dir

#: what is taken of a folder
SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
#: header entries of an output: the file it was made of
SOURCE, DIGEST = "lcsc_source", "lcsc_source_sha256"
_MAX_ANSWER = 8192


def convert(
    source: Path | str,
    to: Path | str,
    *,
    allow_code: bool = False,
    code: Path | str | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the network of each pickled checkpoint to `<to>/<same stem>.safetensors`, every tensor in its own dtype.

    Of a file that holds several things the first of `ema`, `net`, `G_ema`, `model`, `state_dict` is taken, else its
    own tensors. Tied tensors are written under each of their names. Files that an earlier, interrupted call wrote are
    kept; everything else that exists is left alone and is an error. The sources are never modified.

    Args:
        source: a file, a folder (its `*.pkl, *.pickle, *.pt, *.pth, *.bin, *.ckpt`) or a pattern such as `run/*.pkl`.
        to: folder of the outputs, made when missing.
        allow_code: consent; unpickling can run code that the file brings.
        code: folder put on the import path of the reading process, for pickles of classes defined elsewhere.
        say: gets one line for each file.

    Returns:
        The outputs, in the order of the sources' names.

    Raises:
        ConfigError: no consent, `code` is no folder, or two sources with one stem.
        BankError: nothing to convert, a file that is damaged or holds no tensors, or no isolation on this system.
        OutputExistsError: an output is there that is not this conversion's own.
    """
    _check_request(source, allow_code, code)
    to = Path(to)
    outputs = _plan(_sources(Path(source)), to)
    kept = {output for output, path in outputs.items() if _is_ours(output, path)}
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"`to` is `{_clean(to)}`; no folder can be made there: {error.strerror}.") from error
    for output, path in outputs.items():
        done = "kept from an earlier call" if output in kept else _convert_file(path, output, code)
        say(f"{_clean(path.name)} -> {_clean(output.name)}: {done}")
    return list(outputs)


def _check_request(source: Path | str, allow_code: bool, code: Path | str | None) -> None:
    """Raise for a call without consent, without isolation or with a wrong `code`."""
    if not allow_code:
        raise ConfigError(
            f"`{_clean(source)}` is to be unpickled, and unpickling can run code inside the file. If you trust where "
            "it came from, add `allow_code=true`; it is then read by a process that has no network and starts nothing."
        )
    if not _jail.supported():
        raise BankError(
            f"pickles can be isolated on Linux (x86_64, aarch64) only, and this is `{sys.platform}`. "
            "Convert them on such a machine and copy the safetensors files."
        )
    if code is not None and not Path(code).is_dir():
        raise ConfigError(f"`code` is `{_clean(code)}`, which is no folder. Give the folder that holds the packages.")


def _plan(sources: list[Path], to: Path) -> dict[Path, Path]:
    """Output -> source; raises for two sources with one stem and for one that cannot be read."""
    outputs: dict[Path, Path] = {}
    for path in sources:
        other = outputs.setdefault(to / f"{path.stem}.safetensors", path)
        if other != path:
            raise ConfigError(
                f"`{_clean(other)}` and `{_clean(path)}` would both become `{_clean(path.stem)}.safetensors`. "
                "Convert them into two folders."
            )
        with _opened(path):
            pass
    return outputs


def _sources(source: Path) -> list[Path]:
    """The regular files to convert, by name; raises BankError when there is none."""
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES and path.is_file())
    elif not source.exists() and glob.has_magic(str(source)):
        found = sorted(path for path in map(Path, glob.glob(str(source))) if path.is_file())
    else:
        found = [source]
    if not found:
        wanted = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise BankError(f"nothing to convert at `{_clean(source)}`. Give a file, or a folder or pattern with {wanted}.")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A file descriptor of a regular file; never blocks on a pipe or device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise BankError(f"`{_clean(path)}` cannot be read: {error.strerror}. Give a file or a folder.") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BankError(f"`{_clean(path)}` is no regular file. Give a file or a folder of files.")
        yield fd, status
    finally:
        os.close(fd)


def _digest(fd: int) -> str:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_ours(output: Path, path: Path) -> bool:
    """Whether an output exists that was made of this very source; raises OutputExistsError for any other file."""
    if not (output.exists() or output.is_symlink()):
        return False
    with _opened(path) as (fd, _):
        if _header(output).get(DIGEST) == _digest(fd):
            return True
    raise OutputExistsError(
        f"output `{_clean(output)}` exists already and was not made of `{_clean(path.name)}` as it is now. "
        "Nothing is overwritten; choose another folder with `to=` or remove it."
    )


def _header(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file, empty when it is none."""
    from safetensors import SafetensorError, safe_open

    if path.is_symlink() or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="np") as handle:
            return (handle.metadata() or {}) if list(handle.keys()) else {}
    except (SafetensorError, OSError):
        return {}


def _convert_file(path: Path, output: Path, code: Path | str | None) -> str:
    """Convert one file; the output appears whole or not at all. Returns what was done, in words."""
    with _opened(path) as (source, before), _draft(output) as (draft, fd):
        metadata = {"format": "pt", SOURCE: path.name, DIGEST: _digest(source)}
        answer = _child(source, fd, before.st_size, metadata, code=None, real=False)
        ran = answer["status"] == "none"
        if ran:
            os.ftruncate(fd, 0)
            answer = _child(source, fd, before.st_size, metadata, code=code, real=True)
        if answer["status"] != "ok":
            raise BankError(_sentence(path, answer))
        after = os.fstat(source)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise BankError(f"`{_clean(path)}` changed while it was read. Let its writer finish, then convert again.")
        os.fsync(fd)
        header = _header(draft)
        if header.get(DIGEST) != metadata[DIGEST]:
            raise BankError(
                f"`{_clean(path)}` did not become a readable safetensors file; nothing was kept. The code in the file "
                "interfered; do not trust it."
            )
        if output.exists() or output.is_symlink():  # taken while we were reading
            raise OutputExistsError(f"output `{_clean(output)}` appeared while it was made; nothing is overwritten.")
        os.rename(draft, output)
        fsync_dir(output.parent)
    how = "by running its code in isolation" if ran else "without running its code"
    part = f"`{_clean(header['lcsc_part'])}`, " if header.get("lcsc_part") else ""
    return f"{part}{answer['tensors']} tensors, {output.stat().st_size / 1e6:.1f} MB, {how}"


@contextlib.contextmanager
def _draft(output: Path) -> Iterator[tuple[Path, int]]:
    """A hidden file beside the output, open for writing and locked; gone when the block ends without its rename.

    The name is fixed, so that what a killed call left behind is used up by the next one.
    """
    draft = output.with_name(f".{output.name}.convert")
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise ConfigError(
            f"`{_clean(output)}` cannot be written: {error.strerror}. Give another folder with `to=`."
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is making `{_clean(output)}` right now. Wait for it.") from error
        try:
            os.ftruncate(fd, 0)
            yield draft, fd
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)


def _child(
    source: int, output: int, size: int, metadata: Mapping[str, str], *, code: Path | str | None, real: bool
) -> dict[str, Any]:
    """Run the reading process on open files; its answer, or one in its place when it died."""
    receive, answer = os.pipe()
    os.lseek(source, 0, os.SEEK_SET)
    os.lseek(output, 0, os.SEEK_SET)
    job = {
        **{"source": source, "output": output, "answer": answer, "size": size, "real": real},
        **{"metadata": dict(metadata), "site": _site("numpy", "torch") if real else _site("numpy")},
        "code": None if code is None else str(Path(code).resolve()),
    }
    keep = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}  # to start at all
    command = [sys.executable, "-I", "-B", str(Path(__file__).with_name("_convert_child.py")), json.dumps(job)]
    try:
        process = subprocess.Popen(
            command,
            cwd="/",
            env={**keep, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(source, output, answer),
            start_new_session=True,
        )
    finally:
        os.close(answer)
    try:
        with os.fdopen(receive, "rb") as pipe:
            text = pipe.read(_MAX_ANSWER)
        ended = process.wait()
    finally:
        process.kill()
        process.wait()
    try:
        found = json.loads(text)
        if ended == 0 and found["status"] in ("ok", "none", "damaged", "failed", "disk", "jail"):
            return {"why": "", "tensors": 0, **found}
    except (ValueError, KeyError, TypeError):
        pass
    return {"status": "failed", "why": f"the process that read it died with code {ended}"}


def _site(*packages: str) -> list[str]:
    """The folders these packages are imported from; finding them imports nothing."""
    specs = [importlib.util.find_spec(package) for package in packages]
    return sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin})


def _sentence(path: Path, answer: Mapping[str, Any]) -> str:
    """What went wrong with a file and what to do; the child's words are made printable, they may be a stranger's."""
    name, why = _clean(path), _clean(answer["why"])[:300]
    if answer["status"] == "jail":
        return f"no isolation could be set up to read `{name}`: {why}. Convert it on another Linux machine."
    if answer["status"] == "disk":
        return f"the safetensors file of `{name}` could not be written: {why}. Make room, then convert again."
    if answer["status"] == "damaged":
        return f"`{name}` is damaged, or no pickle or torch file: {why}. Copy it again."
    if answer["status"] == "none":
        return f"`{name}` gives no tensors: {why}. Save the network's state_dict with safetensors instead."
    if "ModuleNotFoundError" in why:
        return f"`{name}` needs code that is not here: {why}. Give the folder that holds it with `code=DIR`."
    return f"`{name}` could not be read in isolation: {why}. Save its state_dict with safetensors where it was made."


def _clean(text: object) -> str:
    """Text that cannot steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))

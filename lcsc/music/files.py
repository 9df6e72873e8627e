"""A tune as files: ABC to read, MIDI to play, a picture of its score; and what a Debian tool thinks of it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcsc.core.errors import EvaluationError
from lcsc.music.check import foreign, problems

#: What turns a tune into another form, and the Debian package that brings it.
CHECKER, ENGRAVER = "abc2midi", "abcm2ps"
PACKAGES = {CHECKER: "abcmidi", ENGRAVER: "abcm2ps"}
#: Seconds after which a tool hangs; a tune takes it milliseconds.
PATIENCE = 30


def whole_abc(abc: str, title: str, number: int = 1) -> str:
    """A tune as a file of its own.

    Args:
        abc: metre, unit, key and notes.
        title: in one line.
        number: of the tune in its file.
    """
    return f"X:{number}\nT:{title}\n{abc}"


def tune_problems(abc: str, checker: str) -> list[str]:
    """What is wrong with a tune; empty for a valid one.

    Args:
        abc: metre, unit, key and notes.
        checker: `abc2midi`, or `lcsc` for our own reading of bars and notation.
    """
    return (foreign(abc) or abc2midi_errors(abc)) if checker == CHECKER else problems(abc)


def abc2midi_errors(abc: str) -> list[str]:
    """Lines of abc2midi's that say `Error`; it writes a file and ends with 0 whatever it is given.

    Raises:
        EvaluationError: abc2midi cannot be run, or hangs.
    """
    with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
        (Path(folder) / "tune.abc").write_text(whole_abc(abc, "tune"))
        said = _run([CHECKER, "tune.abc", "-o", "tune.mid"], Path(folder))
    return [line for line in said.splitlines() if "Error" in line]


@functools.lru_cache(maxsize=1)
def abc2midi_version() -> str:
    """Such as `4.84`; empty where it is not installed."""
    if shutil.which(CHECKER) is None:
        return ""
    return (_run([CHECKER, "-ver"], Path(tempfile.gettempdir())).split() or ["unknown"])[0]


def midi_bytes(abc: str) -> bytes | None:
    """The tune as a MIDI file, by symusic; None where that is not installed or finds no note.

    Args:
        abc: metre, unit, key and notes.
    """
    try:
        from symusic import Score
    except ImportError:
        return None
    with _hushed():
        score = Score.from_abc(whole_abc(abc, "tune"))
    if not score.note_num():
        return None
    with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
        score.dump_midi(str(Path(folder) / "tune.mid"))
        return (Path(folder) / "tune.mid").read_bytes()


def picture(abc: str, title: str) -> str | None:
    """The score as SVG, its first page, by abcm2ps; None where that is not installed or draws nothing.

    Args:
        abc: metre, unit, key and notes.
        title: above it.
    """
    if shutil.which(ENGRAVER) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
        (Path(folder) / "tune.abc").write_text(whole_abc(abc, title))
        _run([ENGRAVER, "-q", "-g", "-O", "tune", "tune.abc"], Path(folder))
        pages = sorted(Path(folder).glob("tune*.svg"))
        # comments hold the command and the hour
        return re.sub(r"<!--.*?-->\n?", "", pages[0].read_text(), flags=re.S) if pages else None


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what compiled code prints; symusic's has abc2midi's warnings."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(fd) for fd in (1, 2)]
    try:
        with open(os.devnull, "w") as nothing:
            for fd in (1, 2):
                os.dup2(nothing.fileno(), fd)
        yield
    finally:
        for fd, own in zip((1, 2), kept, strict=True):
            os.dup2(own, fd)
            os.close(own)


def _run(words: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EvaluationError(f"`{words[0]}` cannot be run: {error}.") from error
    return (done.stdout + done.stderr).decode("utf-8", "replace")

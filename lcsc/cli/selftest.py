"""`lcsc selftest`: the promises tried out on this file system."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError
from lcsc.search.selftest import selftest


def main(words: Sequence[str]) -> None:
    """`[--dir PATH] [seconds=60]`; ends with 1 where a promise is not kept."""
    words = list(words)
    if "--dir" in words:  # as in the usage; `dir=PATH` like every other setting
        at = words.index("--dir")
        words[at : at + 2] = [f"dir={' '.join(words[at + 1 : at + 2])}"]
    settings = parse_words(words, {"dir": ".", "seconds": "60"})
    folder, seconds = Path(need(settings, "dir")), _seconds(need(settings, "seconds"))
    if not folder.is_dir():
        raise ConfigError(f"`dir` is `{folder}`, which is no folder. Give one on the file system to try.")
    began, failed = time.monotonic(), 0
    for finding in selftest(folder, seconds):
        failed += finding.passed is False
        verdict = {True: "PASS", False: "FAIL", None: "none"}[finding.passed]
        print(f"{verdict}  {finding.promise:<8}  {finding.text}: {finding.detail}", flush=True)
    print(
        f"{failed or 'no'} FAIL in {time.monotonic() - began:.0f} s on the file system of {folder.resolve()}",
        flush=True,
    )
    print("not tried: I6 and I8, which are about inputs and candidates and not about a file system")
    if failed:
        raise SystemExit(1)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise ConfigError(f"`seconds` is `{text}`; it must be a number from 0 to 86400.")
    return seconds

"""How far a pass over files has come: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

#: seconds between two plain lines
PAUSE = 10.0


@contextlib.contextmanager
def passing(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A function that takes what is done and what there is in all.

    Args:
        what: name of the work.
        unit: `bytes` are shown as GB, anything else as a share.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console, amount = Console(stderr=True), (DownloadColumn(),) if unit == "bytes" else ()
        bar = Progress(TextColumn(what), BarColumn(), *amount, TimeRemainingColumn(), console=console, transient=True)
        with bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PAUSE:
            last = time.monotonic()
            amount = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, " if unit == "bytes" else ""
            print(f"{what}: {amount}{done / max(total, 1):.0%}", file=sys.stderr, flush=True)

    yield say

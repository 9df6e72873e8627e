"""`lcsc watch`: follow a run by its directory until it is finished."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from lcsc.core.errors import ConfigError
from lcsc.report.status import Status, open_runs, status_text

#: Seconds between two looks, and between two plain lines.
LOOK, PAUSE = 2.0, 10.0


def main(words: Sequence[str]) -> None:
    """`RUN`: a run directory; nothing in it is written."""
    if len(words) > 1:
        raise ConfigError(f"`watch` follows one run, not {len(words)}. `lcsc status` takes several.")
    status = Status(open_runs(words)[0])
    if sys.stdout.isatty():
        _redraw(status)
    else:
        _print(status)
    print(status_text(status.run, status.rows()), flush=True)


def _redraw(status: Status) -> None:
    """One text that is drawn anew."""
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4, transient=True) as live:
        while not status.run.finished:
            live.update(Text(status_text(status.run, status.rows())))
            time.sleep(LOOK)


def _print(status: Status) -> None:
    """A line whenever the phase changes, and now and then."""
    said, phase = -PAUSE, ""
    while not status.run.finished:
        rows = dict(status.rows())
        now = time.monotonic()
        if rows["phase"] != phase or now - said >= PAUSE:
            said, phase = now, rows["phase"]
            print(" · ".join(f"{name} {text}" for name, text in rows.items()), flush=True)
        time.sleep(LOOK)

"""Runs whose search has come to its end, for verbs that take the winner."""

from __future__ import annotations

from pathlib import Path

from lcsc.core.errors import RunError
from lcsc.report.run import Run


def finished_run(path: Path) -> Run:
    """The run of a directory; raises RunError, with the line that continues it, where it is not finished."""
    run = Run.open(path)
    if run.summary is None:
        raise RunError(f"`{path}` is not finished. Continue it with: {run.info['command'] or 'lcsc search ...'}")
    return run

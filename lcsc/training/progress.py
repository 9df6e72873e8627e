"""How a run tells where it is: a bar on a terminal, about ten lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Report = Callable[[int, float], None]


@contextlib.contextmanager
def reporter(title: str, start: int, total: int, *, progress: bool | None) -> Iterator[Report]:
    """A function to call with (steps done, loss) after every step.

    Args:
        title: what is being trained.
        start: steps done before this session.
        total: steps in all.
        progress: False for silence.
    """
    if progress is False:
        yield lambda step, loss: None
    elif sys.stderr.isatty():
        with _bar(title, start, total) as report:
            yield report
    else:
        yield _lines(title, start, total)


@contextlib.contextmanager
def _bar(title: str, start: int, total: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("loss {task.fields[loss]:.4f}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=start, loss=float("nan"))
        yield lambda step, loss: bar.update(task, completed=step, loss=loss)


def _lines(title: str, start: int, total: int) -> Report:
    began, every = time.monotonic(), max(1, total // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0 or step == total:
            left = (time.monotonic() - began) / (step - start) * (total - step)
            print(f"{title}: step {step}/{total}, loss {loss:.4f}, {left:.0f} s left", file=sys.stderr, flush=True)

    return report

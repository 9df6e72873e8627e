"""What a search shows while it works: one live table on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table


class Progress:
    """Counts steps of a known plan; use as a context manager.

    Args:
        name: what is running.
        total: steps of the plan, 0 while unknown.
        quiet: show nothing at all.
        items: what scores are made of, several of them, such as `images` or `blocks`.
    """

    def __init__(self, name: str, total: int, quiet: bool = False, items: str = "images") -> None:
        self._name, self._total, self._quiet, self._unit = name, total, quiet, f"{items}/s"
        self._console = Console(stderr=False)
        self._live = (
            Live(console=self._console, refresh_per_second=4) if self._console.is_terminal and not quiet else None
        )
        self._done = self._replayed = self._images = 0
        self._best: float | None = None
        self._baseline = ""
        self._phase = ""
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._table())
            self._live.stop()

    def expect(self, total: int) -> None:
        """Set the number of steps of the plan, once it is known."""
        self._total = total

    def note(self, text: str) -> None:
        """Say one line."""
        if not self._quiet:
            (self._live.console if self._live else self._console).print(
                text, highlight=False, markup=False, soft_wrap=True
            )

    def baseline(self, text: str) -> None:
        """Show the best baseline."""
        self._baseline = text

    def step(self, phase: str, value: float | None = None, images: int = 0, replayed: bool = False) -> None:
        """Count one step; `value` is a trial's score."""
        self._done += 1
        self._replayed += replayed
        self._images += 0 if replayed else images
        if value is not None and (self._best is None or value < self._best):
            self._best = value
        changed, self._phase = phase != self._phase, phase
        if self._live:
            self._live.update(self._table())
        elif (
            not self._quiet
            and not replayed
            and (changed or time.monotonic() - self._said > 10 or self._done == self._total)
        ):
            self._said = time.monotonic()
            self._console.print(self._line(), highlight=False, markup=False, soft_wrap=True)

    def _rate(self) -> float:
        return self._images / max(time.monotonic() - self._began, 1e-9)

    def _left(self) -> str:
        done = self._done - self._replayed
        if not done:
            return "?"
        seconds = (time.monotonic() - self._began) / done * max(0, self._total - self._done)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def _line(self) -> str:
        best = "-" if self._best is None else f"{self._best:.2f}"
        return (
            f"{self._name} {self._phase:<9} {self._done}/{self._total} best {best} "
            f"[{self._baseline or 'no baseline yet'}] {self._rate():.0f} {self._unit}, {self._left()} left"
        )

    def _table(self) -> Table:
        table = Table(title=self._name, title_justify="left", show_header=True)
        for column in ("phase", "steps", "best so far", "best baseline", self._unit, "time left"):
            table.add_column(column)
        best = "-" if self._best is None else f"{self._best:.2f}"
        steps = f"{self._done}/{self._total}"
        table.add_row(self._phase, steps, best, self._baseline or "-", f"{self._rate():.0f}", self._left())
        return table


def say(text: str) -> None:
    """One plain line to standard output."""
    print(text, file=sys.stdout, flush=True)

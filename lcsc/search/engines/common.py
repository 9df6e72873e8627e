"""What engines with processes of their own share: checks of settings, the number of tries, the far end of a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from lcsc.core.errors import ConfigError

#: Workers, or processes of one, that may die of an evaluation before it is taken for the cause.
TRIES = 2


def check_settings(engine: Any, least: Mapping[str, float], above_zero: Sequence[str] = ()) -> None:
    """Raise ConfigError where a setting of an engine is too small.

    Args:
        engine: a part; a setting whose default is None may be None.
        least: the smallest allowed value by name; an int allows whole numbers alone.
        above_zero: names of settings that must be above 0.
    """
    for name, low in {**least, **dict.fromkeys(above_zero)}.items():
        value, null = getattr(engine, name), getattr(type(engine), name) is None
        if value is None and null:
            continue
        if low is None:
            good, rule = value > 0, "above 0"
        else:
            good, rule = value >= low and (isinstance(value, int) or not isinstance(low, int)), f"at least {low}"
        if not good:
            raise ConfigError(f"`engine.{name}` is {value}; it must be {rule}{', or null' if null else ''}.")


def private_stdin() -> BinaryIO:
    """What the parent says; nothing that an evaluation starts reads it from now on, or keeps the pipe open."""
    lines = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return lines


def listen(lines: BinaryIO, hear: Callable[[Any], None], last: Callable[[], object] = lambda: None) -> None:
    """Hear each line of JSON in a thread; when there are no more, the parent is gone, and this process group goes too.

    Args:
        lines: from the parent.
        hear: what to do with a value.
        last: done before the end.
    """

    def run() -> None:
        try:
            for line in lines:
                hear(json.loads(line))
        finally:  # whatever is being done: no evaluation outlives who wants it
            with contextlib.suppress(Exception):
                last()
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=run, daemon=True).start()

"""How fine pictures are drawn: in tests coarsely, because drawing them as users get them is half of a small search."""

from __future__ import annotations

import contextlib

from lcsc.report import style

FINE = style.DPI


def coarse():
    """Draw all pictures of this process with few dots."""
    style.DPI = 25


@contextlib.contextmanager
def fine():
    """Draw them as users get them."""
    before, style.DPI = style.DPI, FINE
    try:
        yield
    finally:
        style.DPI = before

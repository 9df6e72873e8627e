"""Bytes for a reader."""

from __future__ import annotations


def size_text(nbytes: int) -> str:
    """Bytes in decimal units, as file managers and the Hugging Face libraries count: `4.48 GB`."""
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"

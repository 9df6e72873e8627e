"""How two plain configurations differ, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc.core.digests import canonical_json


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`` `section.field`: old -> new `` for every leaf in which two plain values differ; absent reads None.

    1 and 1.0, and True and 1, are different values.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        rows = []
        for key in sorted({*old, *new}):
            rows += differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return rows
    return [] if canonical_json(old) == canonical_json(new) else [f"`{where}`: {old} -> {new}"]

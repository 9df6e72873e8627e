"""Numbers of a configuration that are none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lcsc.core.errors import ConfigError


def need_finite(value: Any, where: str = "") -> None:
    """Raise ConfigError that names the key of a number in a plain `value`, at any depth, that is inf or nan."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"`{where}` is {value}; it must be a finite number.")
    rows = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in rows:
        need_finite(item, f"{where}.{key}" if where else str(key))

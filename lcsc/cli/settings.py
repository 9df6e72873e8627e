"""`key=value` words for the verbs that need no experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lcsc.bank.bank import Selection
from lcsc.core.errors import ConfigError, did_you_mean


def parse_words(words: Sequence[str], defaults: Mapping[str, str | None]) -> dict[str, str | None]:
    """Settings from `key=value` words over `defaults`.

    Raises:
        ConfigError: a word without `=`, an unknown key or a key given twice.
    """
    given: dict[str, str | None] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"`{word}` is not understood. Write key=value.{did_you_mean(key, defaults)}")
        if key not in defaults:
            raise ConfigError(f"no setting named `{key}`.{did_you_mean(key, defaults)}")
        if key in given:
            raise ConfigError(f"`{key}` is given twice: `{given[key]}` and `{value}`. Give it once.")
        given[key] = value
    return {**defaults, **given}


def need(settings: Mapping[str, str | None], key: str) -> str:
    """The value of a mandatory setting."""
    value = settings[key]
    if value is None:
        raise ConfigError(f"`{key}` is not set. Give it as {key}=...")
    return value


def read_selection(settings: Mapping[str, str | None]) -> Selection:
    """`start`, `stop`, `every` and `last` as a selection.

    Raises:
        ConfigError: one of them is no whole number.
    """
    numbers: dict[str, int | None] = {}
    for key in ("start", "stop", "every", "last"):
        text = settings[key]
        if text is not None and not text.isdecimal():
            raise ConfigError(f"`{key}` is `{text}`; it must be a whole number.")
        numbers[key] = None if text is None else int(text)
    return Selection(numbers["start"], numbers["stop"], numbers["every"] or 1, numbers["last"])

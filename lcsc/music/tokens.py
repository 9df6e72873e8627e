"""Tokens of texts and tunes: characters, and the notations of several characters that are common."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Marks of a pair: TEXT, the text, TUNE, the tune, END. Padding stands behind it.
PAD, END, TEXT, TUNE = range(4)
_CHARS = ["\n", *map(chr, range(32, 127))]
_NOTATIONS = [
    *("|:", ":|", "||", "|]", "[|", "::", ":||:", ":|2", "|1", "|2", "[1", "[2", "(2", "(3", "/2", "/4", "3/2"),
    *("1/8", "1/16", "6/8", "4/4", "3/4", "2/4", "2/2", "9/8", "M:", "L:", "K:"),
]
#: What each token stands for, 128 of them; the marks stand for nothing.
TOKENS = ("", "", "", "", *_CHARS, *_NOTATIONS)
VOCAB_SIZE = len(TOKENS)
_NUMBERS = {token: number for number, token in enumerate(TOKENS) if token}
_LONGEST_FIRST = re.compile("|".join(map(re.escape, sorted(_NUMBERS, key=len, reverse=True))))


def encode(text: str) -> list[int]:
    """Tokens of printable ASCII and line ends, the longest notation first; `decode` gives the same text back.

    Raises:
        ValueError: another character.
    """
    tokens = [_NUMBERS[found] for found in _LONGEST_FIRST.findall(text)]
    if sum(len(TOKENS[token]) for token in tokens) != len(text):
        wrong = next(char for char in text if char not in _NUMBERS)
        raise ValueError(f"{wrong!r} has no token; use printable ASCII (`ascii_text`)")
    return tokens


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens; marks are nothing."""
    return "".join(TOKENS[token] for token in tokens)


def prompt_tokens(text: str) -> list[int]:
    """What a model is given to write the tune of a text."""
    return [TEXT, *encode(text), TUNE]


def pair_tokens(text: str, tune: str) -> list[int]:
    """A text and its tune."""
    return [*prompt_tokens(text), *encode(tune), END]

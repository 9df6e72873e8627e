"""ABC notation read and cleaned: the fields of a tune, and its notes without comments, chord names and words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

#: a field, such as `K:D`; `A:|` is a note before a bar line
FIELD = re.compile(r"([A-Za-z+]):(?![|:\]])\s*(.*)")
#: fields that change how the notes behind them are read
CHANGES = "MLK"
#: chord names and remarks, ornaments by name, spacers
_UNHEARD = re.compile(r'"[^"\n]*"|![^!\n|]*!|`')
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "\t": " "})


@dataclass(frozen=True)
class Tune:
    """A tune of one voice.

    Args:
        title: first title; empty where it has none, as are rhythm and origin.
        rhythm: such as `jig`.
        origin: such as `Ireland`.
        metre: such as `6/8`; `none` where the tune is free.
        unit: length of a note without a number, such as `1/8`.
        key: such as `D` or `Em`.
        body: the notes, printable ASCII in lines; fields M, L and K between them.
    """

    title: str
    rhythm: str
    origin: str
    metre: str
    unit: str
    key: str
    body: str

    @property
    def abc(self) -> str:
        """Metre, unit, key and notes: what a model writes, and all that is heard."""
        return f"M:{self.metre}\nL:{self.unit}\nK:{self.key}\n{self.body}\n"


def read_tunes(text: str) -> Iterator[Tune]:
    """The tunes of an ABC file, in its order. Tunes without a key or without notes and those of several voices are
    left out, since a line of one voice would be no tune.
    """
    shared: list[str] = []
    for place, block in enumerate(re.split(r"^(?=X:)", text.replace("\r\n", "\n").replace("\r", "\n"), flags=re.M)):
        lines = [line for line in (_bare(line) for line in block.split("\n")) if line]
        if not block.startswith("X:"):
            shared = lines if place == 0 and all(FIELD.fullmatch(line) for line in lines) else []
            continue
        if (tune := _tune(shared + lines)) is not None:
            yield tune


def ascii_text(text: str) -> str:
    """`text` in printable ASCII and line ends: accents and what has no likeness are dropped."""
    plain = unicodedata.normalize("NFKD", text.translate(_QUOTES)).encode("ascii", "ignore").decode()
    return "".join(char for char in plain if char == "\n" or char.isprintable())


def _bare(line: str) -> str:
    """A line without its comment and what is not heard."""
    line = re.sub(r"(?<!\\)%.*", "", ascii_text(line)).strip()
    if not FIELD.fullmatch(line):
        line = _UNHEARD.sub("", line)
    return re.sub(r" +", " ", line).strip()


def _tune(lines: list[str]) -> Tune | None:
    heads: dict[str, str] = {}
    rest = iter(lines)
    for line in rest:
        if (found := FIELD.fullmatch(line)) is None:
            return None  # notes before a key
        heads.setdefault(*found.groups())
        if found[1] == "K":
            break
    body: list[str] = []
    for line in rest:
        if (found := FIELD.fullmatch(line)) is None:
            body.append(line)
        elif found[1] == "V":
            return None
        elif found[1] in CHANGES and body:
            body.append(f"{found[1]}:{_value(*found.groups())}")
        elif found[1] in CHANGES:  # before the first note it is the tune's own
            heads[found[1]] = found[2]
    while body and FIELD.fullmatch(body[-1]):
        body.pop()
    # a line that goes on in the next one, unless that is a field
    joined = re.sub(r" *\\\n(?![A-Z]:(?![|:\]]))", " ", "\n".join(body))
    joined = "\n".join(line for line in (re.sub(" +", " ", part).strip(" \\") for part in joined.split("\n")) if line)
    if not heads.get("K") or not re.search("[A-Ga-g]", joined) or "V" in heads or "[V:" in joined:
        return None
    metre = _value("M", heads.get("M", "none"))
    unit = _value("L", heads.get("L", "")) or default_unit(metre)
    named = [heads.get(field, "").strip() for field in "TRO"]
    return Tune(*named, metre, unit, _value("K", heads["K"]), joined)


def _value(field: str, value: str) -> str:
    """A metre, unit or key as it is always written."""
    value = value.strip()
    if field == "M":
        return {"C": "4/4", "C|": "2/2", "": "none"}.get(value, value.replace(" ", ""))
    return value.replace(" ", "") if field == "L" else re.sub(r"(?i)\s*(clef=\S+|treble)", "", value).strip()


def default_unit(metre: str) -> str:
    """Of a tune that has no `L:`: a sixteenth in metres below 3/4, an eighth otherwise."""
    length = metre_length(metre)
    return "1/16" if length is not None and length < Fraction(3, 4) else "1/8"


def metre_length(metre: str) -> Fraction | None:
    """Of a bar, as a part of a whole note; None for a free metre, and for one that is not understood."""
    if not re.fullmatch(r"[1-9]\d?(\+[1-9]\d?)*/[1-9]\d?", metre):
        return None
    above, _, below = metre.partition("/")
    return Fraction(sum(map(int, above.split("+"))), int(below))

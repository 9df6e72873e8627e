"""Whether a tune in ABC notation can be read, and whether its bars are as long as its metre says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from lcsc.music.abc import FIELD, metre_length

_NOTE = r"(?:\^\^?|__?|=)?[A-Ga-g](?:'+|,+)?"
_LENGTH = r"(?P<{0}above>\d*)(?P<{0}slashes>/*)(?P<{0}below>\d*)"
#: What may stand in a line of notes; the first that fits is meant.
_WORDS = re.compile(
    "|".join(
        (
            r"(?P<inline>\[[MLK]:[^\]]*\])",
            r"(?P<bar>\[\||:*\|+(?:[\]|:]|\[(?=\|))*|::+)(?P<ending>\[?[1-9](?:[,-][1-9])*)?",
            r"(?P<lone>\[[1-9](?:[,-][1-9])*)",
            rf"(?P<note>{_NOTE}|[xz]){_LENGTH.format('n')}",
            rf"(?P<chord>\[(?:{_NOTE}\d*/*\d*-? ?)+\]){_LENGTH.format('c')}",
            r"Z(?P<rests>\d*)",
            rf"(?P<grace>\{{/?(?:{_NOTE}\d*/*\d*)+\}})",
            r"\((?P<tuplet>[2-9])(?::(?P<time>\d?))?(?::(?P<count>\d?))?",
            r"(?P<broken>>{1,3}|<{1,3})",
            r"(?P<slur>[()])",
            r"(?P<else>[-.~HLMOPSTuvy ]|![^!]*!|\"[^\"]*\")",
        )
    )
)
#: Problems that what comes behind may mend.
UNFINISHED = ("a slur is open", "it has no bars", "a repeat is open")
_TIMES = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}


@dataclass
class _Bars:
    """The state of reading: what a bar holds so far, and what changes the notes to come."""

    unit: Fraction
    metre: Fraction | None
    length: Fraction = Fraction(0)
    begins: str = ""
    number: int = 0
    wrong: int = 0
    lines: int = 0
    notes: int = 0
    slurs: int = 0
    repeats: bool = False
    tuplet: tuple[int, Fraction] = (0, Fraction(1))
    next_factor: Fraction = Fraction(1)
    last: Fraction | None = None
    problems: list[str] = field(default_factory=list)

    def sound(self, written: Fraction) -> None:
        left, factor = self.tuplet
        self.tuplet = (max(left - 1, 0), factor if left > 1 else Fraction(1))
        self.last = written * self.unit * factor * self.next_factor
        self.next_factor = Fraction(1)
        self.length += self.last
        self.notes += 1

    def broken(self, sign: str) -> None:
        if self.last is None:
            self.problems.append(f"`{sign}` has no note before it")
            return
        short = Fraction(1, 2 ** len(sign))
        before, after = (2 - short, short) if sign[0] == ">" else (short, 2 - short)
        self.length += self.last * (before - 1)
        self.last, self.next_factor = None, after

    def bar(self, sign: str) -> None:
        self.number += bool(self.length)
        if self.metre is not None and self.length:
            whole = self.begins == sign == "|"
            if self.length > self.metre or (whole and self.length < self.metre):
                self.wrong += 1
                self.problems.append(f"bar {self.number} is {self.length} long instead of {self.metre}")
        if self.next_factor != 1 or self.tuplet[0]:
            self.problems.append(f"bar {self.number} ends within a figure")
        self.repeat(sign)
        self.length, self.begins, self.last = Fraction(0), sign, None
        self.next_factor, self.tuplet = Fraction(1), (0, Fraction(1))

    def repeat(self, sign: str) -> None:
        """A repeat or a first ending is to be followed by `:|`; without `|:` it goes back to the beginning."""
        lines = sign.rstrip("[1234567890,-")
        ends, begins, ending = lines.startswith(":"), lines.endswith(":"), sign[len(lines) :].lstrip("[")
        if self.repeats and begins and not ends:
            self.problems.append(f"a repeat begins behind bar {self.number}, and the one before has no end")
        behind = ends or (not self.length and self.begins.startswith(":"))  # `:|` and `[2` may stand in two lines
        if ending[:1] > "1" and not behind:
            self.problems.append(f"ending {ending} behind bar {self.number} has no repeat before it")
        self.repeats = begins or ending.startswith("1") or (self.repeats and not ends)

    def change(self, name: str, value: str) -> None:
        if name == "L":
            self.unit = _unit(value) or self.unit
        elif name == "M":
            self.metre = metre_length(value)


def problems(abc: str) -> list[str]:
    """What is wrong with a tune, in sentences; empty for one that can be played.

    A bar between two plain bar lines has to be as long as the metre says. One beside a repeat, an ending or a double
    bar line may be a part of a bar, since its rest often stands elsewhere, but not longer. A repeat that begins has an
    end, and a second ending stands behind one.

    Args:
        abc: fields M, L and K, each once and in a line of its own, and lines of notes.
    """
    return _read(abc).problems


def whole_bars(abc: str) -> float:
    """Share of a tune's bars that `problems` finds neither too long nor too short; 0 where there are none."""
    bars = _read(abc)
    return 1 - bars.wrong / bars.number if bars.number else 0.0


def _read(abc: str) -> _Bars:
    heads = re.match(r"M:(.+)\nL:(.+)\nK:([A-G][#b]?[ A-Za-z]*)\n", abc)
    if heads is None:
        said = ["it does not begin with metre, unit and key, as in `M:6/8`, `L:1/8`, `K:D`"]
        return _Bars(Fraction(1), None, problems=said)
    unit, metre = _unit(heads[2]), metre_length(heads[1])
    if unit is None or (metre is None and heads[1] != "none"):
        return _Bars(Fraction(1), None, problems=[f"`M:{heads[1]}` or `L:{heads[2]}` is no length"])
    bars = _Bars(unit, metre, problems=foreign(abc))
    for line in abc[heads.end() :].split("\n"):
        if (found := FIELD.fullmatch(line)) is not None:
            bars.change(*found.groups())
            continue
        if (place := _read_line(line, bars)) < len(line):
            bars.problems.append(f"`{line[place : place + 8]}` in bar {bars.number + 1} is no notation")
    if bars.slurs:
        bars.problems.append(UNFINISHED[0])
    if bars.length:
        bars.bar("|]")
    if not bars.notes or not bars.lines:
        bars.problems.append(UNFINISHED[1])
    if bars.repeats:
        bars.problems.append(UNFINISHED[2])
    return bars


def foreign(abc: str) -> list[str]:
    """Lines with orders to programs, such as to read a file: anything but notes and the fields M, L and K."""
    order = re.compile(r".*%|(?![MLK]:)[A-Za-z+]:(?![|:\]])|.*\[(?![MLK]:)[A-Za-z]:")
    lines = [line for line in abc.split("\n") if order.match(line)]
    return [f"`{line[:20]}` is neither notes nor metre, unit or key" for line in lines]


def _read_line(line: str, bars: _Bars) -> int:
    """Read what can be read; returns where that ends."""
    place = 0
    while place < len(line) and (word := _WORDS.match(line, place)) is not None:
        place = word.end()
        if word["bar"]:
            bars.lines += 1
            bars.bar(word["bar"] + (word["ending"] or ""))
        elif word["lone"]:
            bars.bar(word["lone"])
        elif word["note"]:
            bars.sound(_length(word, "n"))
        elif word["chord"]:
            bars.sound(_length(word, "c"))
        elif word["rests"] is not None:
            bars.length += (bars.metre or Fraction(0)) * int(word["rests"] or 1)
        elif word["tuplet"]:
            _begin_tuplet(word, bars)
        elif word["broken"]:
            bars.broken(word["broken"])
        elif word["slur"]:
            bars.slurs += 1 if word["slur"] == "(" else -1
            if bars.slurs < 0:
                bars.problems.append("a slur is closed and was not open")
                bars.slurs = 0
        elif word["inline"]:
            bars.change(word["inline"][1], word["inline"][3:-1].strip())
    return place


def _begin_tuplet(word: re.Match[str], bars: _Bars) -> None:
    notes = int(word["tuplet"])
    compound = (bars.metre is not None and bars.metre.denominator == 8) or bars.metre == Fraction(3, 4)
    time = int(word["time"] or 0) or _TIMES.get(notes, 3 if compound else 2)
    bars.tuplet = (int(word["count"] or 0) or notes, Fraction(time, notes))


def _length(word: re.Match[str], kind: str) -> Fraction:
    above, slashes, below = (word[kind + part] for part in ("above", "slashes", "below"))
    under = int(below) if slashes and below else 2 ** len(slashes)
    return Fraction(int(above or 1), under or 1)


def _unit(text: str) -> Fraction | None:
    found = re.fullmatch(r"1/(1|2|4|8|16|32)", text.strip())
    return None if found is None else Fraction(1, int(found[1]))

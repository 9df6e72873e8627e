"""Dance tunes composed by rule, so that there is music without a download and without anybody's rights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcsc.music.abc import Tune

_LETTERS = "CDEFGAB"
#: notes of chords, in steps above middle C: the G below to the B of the second octave above
LOWEST, HIGHEST = -3, 13
#: the chords that a phrase may pass, by degrees of the scale; letter of the tonic and field K
_MAJOR = ((0, 3, 4, 0), (0, 0, 3, 4), (0, 5, 3, 4), (0, 4, 0, 4))
_MINOR = ((0, 6, 0, 6), (0, 0, 6, 0), (0, 3, 6, 0), (0, 5, 6, 6))
_KEYS = (*(("D", "D"), ("G", "G"), ("A", "A"), ("C", "C"), ("F", "F")), *(("E", "Em"), ("A", "Am"), ("B", "Bm")))


@dataclass(frozen=True)
class _Dance:
    """A rhythm: its metre, and the ways to fill one group of a bar, in units of 1/8."""

    name: str
    metre: str
    groups: int
    cells: tuple[tuple[int, ...], ...]
    close: tuple[int, ...]
    dotted: bool = False


_DANCES = (
    _Dance("jig", "6/8", 2, ((1, 1, 1), (1, 1, 1), (2, 1), (3,)), (3, 3)),
    _Dance("slip jig", "9/8", 3, ((1, 1, 1), (2, 1), (2, 1), (3,)), (3, 3, 3)),
    _Dance("reel", "4/4", 2, ((1, 1, 1, 1), (1, 1, 1, 1), (2, 1, 1), (1, 1, 2)), (2, 2, 4)),
    _Dance("hornpipe", "4/4", 2, ((1, 1, 1, 1), (1, 1, 1, 1), (2, 1, 1)), (2, 2, 4), dotted=True),
    _Dance("polka", "2/4", 1, ((1, 1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 2)), (2, 2)),
    _Dance("waltz", "3/4", 1, ((2, 2, 2), (4, 2), (2, 1, 1, 2), (2, 2, 1, 1), (6,)), (4, 2)),
)
_FIRST = (
    *("Amber", "Bramble", "Copper", "Crooked", "Early", "Fallow", "Floating", "Gentle", "Hidden", "Idle", "Juniper"),
    *("Kindly", "Lantern", "Marble", "Northern", "Painted", "Quiet", "Restless", "Silver", "Tidy", "Umber", "Velvet"),
    *("Wandering", "Yellow"),
)
_SECOND = (
    *("Anchor", "Bellows", "Candle", "Doorstep", "Echo", "Ferry", "Garden", "Harbour", "Inkwell", "Jackdaw", "Kettle"),
    *("Ladder", "Meadow", "Needle", "Orchard", "Pebble", "Quarry", "Rook", "Saddle", "Thimble", "Village", "Willow"),
    *("Yard", "Zephyr"),
)


def compose(rng: np.random.Generator, number: int = 0) -> Tune:
    """A tune of two parts of eight bars: a jig, slip jig, reel, hornpipe, polka or waltz in one of eight keys.

    Each part is a phrase of four bars that ends open, and again with an end on the tonic. Notes that begin a group
    belong to the chord of the bar; those between lead on by steps.

    Args:
        rng: what the notes are drawn by.
        number: of the tune; each has a title of its own.
    """
    dance = _DANCES[rng.integers(len(_DANCES))]
    letter, key = _KEYS[rng.integers(len(_KEYS))]
    tonic = _LETTERS.index(letter)
    progressions = _MINOR if key.endswith("m") else _MAJOR
    parts = []
    for lift in (0, int(rng.choice([2, 4, 4]))):
        chords = progressions[rng.integers(len(progressions))]
        parts.append(_part(dance, chords, tonic, lift, rng))
    turn, place = divmod(number, len(_FIRST) * len(_SECOND))
    title = f"The {_FIRST[place // len(_SECOND)]} {_SECOND[place % len(_SECOND)]}" + (
        f" No. {turn + 1}" if turn else ""
    )
    return Tune(title, dance.name, "", dance.metre, "1/8", key, "\n".join(parts))


def _part(dance: _Dance, chords: Sequence[int], tonic: int, lift: int, rng: np.random.Generator) -> str:
    reach = range(max(lift - 5, LOWEST - tonic), min(lift + 8, HIGHEST - tonic + 1))
    height, phrase = lift, []
    for chord in chords:
        bar, height = _bar(dance, chord, height, reach, rng)
        phrase.append(bar)
    before, height = _bar(dance, 4, height, reach, rng)
    end = _written(dance, [(0 if i else int(rng.choice([-1, 1, 2])), n) for i, n in enumerate(dance.close)])
    bars = [*phrase, *phrase[:2], before, end]
    spelled = ["".join(_pitch(tonic + step) + rest for step, rest in bar) for bar in bars]
    return f"|:{'|'.join(spelled[:4])}|\n{'|'.join(spelled[4:])}:|"


def _bar(
    dance: _Dance, chord: int, height: int, reach: range, rng: np.random.Generator
) -> tuple[list[tuple[int, str]], int]:
    """Steps above the tonic with what is written behind each, and the height that the melody has reached."""
    notes: list[tuple[int, int]] = []
    for _ in range(dance.groups):
        near = [step for step in reach if (step - chord) % 7 in (0, 2, 4)]
        weight = np.array([1 / (1 + abs(step - height)) ** 1.5 * (0.3 if step == height else 1) for step in near])
        height = int(near[rng.choice(len(near), p=weight / weight.sum())])
        way = int(rng.choice([-1, 1]))
        for i, length in enumerate(dance.cells[rng.integers(len(dance.cells))]):
            notes.append((height + i * way, length))
        height = notes[-1][0]
    return _written(dance, notes, dance.groups), height


def _written(dance: _Dance, notes: Sequence[tuple[int, int]], groups: int = 1) -> list[tuple[int, str]]:
    """Lengths, dots and the spaces between groups."""
    out, at, whole = [], 0, sum(length for _, length in notes) // groups
    for (step, length), (_, after) in zip(notes, [*notes[1:], (0, 0)], strict=True):
        rest = str(length) if length > 1 else ""
        if dance.dotted and length == after == 1 and at % 2 == 0:
            rest += ">"
        at += length
        out.append((step, rest + (" " if at % whole == 0 and at < whole * groups else "")))
    return out


def _pitch(height: int) -> str:
    """The note so many steps above middle C."""
    octave, letter = divmod(height, 7)
    if octave <= 0:
        return _LETTERS[letter] + "," * -octave
    return _LETTERS[letter].lower() + "'" * (octave - 1)

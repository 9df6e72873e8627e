"""A tune and the words that ask for it, made of the tune's own headers."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from lcsc.music.abc import Tune

MODES = {
    **{"m": "minor", "min": "minor", "aeo": "aeolian", "dor": "dorian", "phr": "phrygian"},
    **{"lyd": "lydian", "mix": "mixolydian", "loc": "locrian", "maj": "", "ion": "", "": ""},
}
#: rhythms that a file's name may tell where its tunes do not, `slip` before `jig`
RHYTHMS = ("slip jig", "jig", "reel", "hornpipe", "polka", "waltz", "march", "strathspey", "mazurka", "schottische")
#: most characters of a title or an origin in a text
MOST = 60


@dataclass(frozen=True)
class Pair:
    """A text and its tune.

    Args:
        text: such as `a jig in D, 6/8, called The Mill`.
        tune: metre, unit, key and notes in ABC notation.
        group: number of the tunes that are nearly the same; two pairs of one group are in one part.
    """

    text: str
    tune: str
    group: int


def text_of(tune: Tune) -> str:
    """`a jig in D, 6/8`, with the origin or the title of half the tunes behind it, chosen by the notes."""
    bits = zlib.crc32(tune.abc.encode())
    rhythm = re.sub(r"\s+", " ", tune.rhythm.lower())[:MOST] or "tune"
    text = f"{'an' if rhythm[0] in 'aeiou' else 'a'} {rhythm} in {key_text(tune.key)}"
    if tune.metre != "none":
        text += f", {tune.metre}"
    if tune.origin and bits & 1:
        text += f", from {tune.origin[:MOST]}"
    if tune.title and bits & 2:
        text += f", called {tune.title[:MOST]}"
    return text


def key_text(key: str) -> str:
    """`D` for `Dmaj`, `E minor` for `Em`; what is no key stays as it is."""
    found = re.match(r"([A-G][#b]?)\s*([A-Za-z]*)", key)
    if found is None:
        return key[:MOST] or "no key"
    given = found[2].lower()
    mode = MODES.get(given, MODES.get(given[:3], ""))
    return f"{found[1]} {mode}".strip()


def rhythm_of_file(stem: str) -> str:
    """The rhythm that a file's name begins with, such as `jig` for `jigs`; empty where it tells none."""
    name = stem.lower()
    return next((rhythm for rhythm in RHYTHMS if name.startswith(rhythm.partition(" ")[0])), "")

"""What is no tune: bars, notation, and against abc2midi and music21 where they are there."""

from __future__ import annotations

import random
import shutil
from fractions import Fraction

import numpy as np
import pytest

from lcsc.core.errors import EvaluationError
from lcsc.music.abc import metre_length
from lcsc.music.check import problems, whole_bars
from lcsc.music.compose import compose
from lcsc.music.files import abc2midi_errors, midi_bytes, picture, tune_problems

TUNES = [compose(np.random.default_rng(i), i).abc for i in range(40)]
CHARS = sorted(set("".join(tune.split("\n", 3)[3] for tune in TUNES)) | set("^_=()[]{}-~ 3568"))


def tune(body, metre="6/8", unit="1/8"):
    return f"M:{metre}\nL:{unit}\nK:D\n{body}\n"


def corrupted(abc, share, rng):
    *heads, body = abc.split("\n", 3)
    return "\n".join([*heads, "".join(rng.choice(CHARS) if rng.random() < share else char for char in body)])


@pytest.mark.parametrize(
    "abc",
    [
        *TUNES[:3],
        tune("A|:d2f e/2f/2ge|d3 c3|d6:|"),  # an upbeat, halves
        tune("|:d2f e2c|d3 c3|1 d3 c2A:|2 d6||"),
        tune("d>e f<g a2b2|a2 (3bag z2 c2|(3:2:2a2b d6|d8|", "4/4"),
        tune("[df]2 [eg]2|{g}f4|Z|\nM:3/4\nd2e2f2|g6|", "2/4"),
        tune("d2e2|[M:3/4]d2e2f2|g6|[L:1/4]a3|", "2/4"),
        tune("(d2 e2)-|e4|!trill!d4|d2d2|", "2/4"),
        tune("ABc|defga|", "none"),
    ],
)
def test_what_can_be_played_has_no_problems(abc):
    assert problems(abc) == []


@pytest.mark.parametrize(
    ("abc", "said"),
    [
        (tune("d2f e2c|d3 c2|d3 d3|"), "bar 2 is 5/8 long instead of 3/4"),
        (tune("d2f e2c|d3 c4|d3 d3|"), "bar 2 is 7/8 long instead of 3/4"),
        (tune("|:d2f e2cd:|d6|"), "bar 1 is 7/8 long instead of 3/4"),
        (tune("d3 e3|(3def e2|d6|", "4/4"), "bar 2 is 1/2 long instead of 1"),
        (tune("d3 e3|d>|d6|"), "bar 2 ends within a figure"),
        (tune(">d2e d3|d6|"), "`>` has no note before it"),
        (tune("(d3 e3|d6|"), "a slur is open"),
        (tune("d3 e3)|d6|"), "a slur is closed and was not open"),
        (tune("d3 e3|d3 [eg|d6|"), "`[eg|d6|` in bar 2 is no notation"),
        (tune("d3 e3|d3 #e3|d6|"), "`#e3|d6|` in bar 2 is no notation"),
        (tune("|:d6|d6|"), "a repeat is open"),
        (tune("d6::d6|d6|"), "a repeat is open"),
        (tune("|:d6|1d6|"), "a repeat is open"),
        (tune("|:d6|d6|:e6|e6:|"), "a repeat begins behind bar 2, and the one before has no end"),
        (tune("d6|d6:|e6|2d6|"), "ending 2 behind bar 3 has no repeat before it"),
        (tune("d3e3"), "it has no bars"),
        (tune(""), "it has no bars"),
        (tune("d3 e3|\n%%EPS /a/file\nd6|"), "`%%EPS /a/file` is neither notes nor metre, unit or key"),
        (tune("d3 e3|\nI:abc-include x\nd6|"), "`I:abc-include x` is neither notes nor metre, unit or key"),
        (tune("d6|d6|", "6/0"), "`M:6/0` or `L:1/8` is no length"),
        (tune("d6|d6|", "6/8", "1/7"), "`M:6/8` or `L:1/7` is no length"),
        ("d6|d6|", "it does not begin with metre, unit and key, as in `M:6/8`, `L:1/8`, `K:D`"),
    ],
)
def test_what_is_wrong_is_said(abc, said):
    assert said in problems(abc)


def test_bars_are_counted():
    assert whole_bars(tune("d2f e2c|d3 c2|d3 d3|d6|")) == 3 / 4
    assert whole_bars(tune("d7|d5|d6|d6|")) == 2 / 4
    assert [whole_bars(abc) for abc in (TUNES[0], tune(""), "d6|d6|", "")] == [1, 0, 0, 0]


def test_damaged_tunes_are_told_from_whole_ones():
    assert all(problems(abc) == [] for abc in TUNES)
    rng = random.Random(0)
    for share, most in ((0.02, 0.25), (0.1, 0.05)):
        assert np.mean([problems(corrupted(abc, share, rng)) == [] for abc in TUNES * 2]) <= most


def test_bars_are_as_long_as_music21_says():
    converter = pytest.importorskip("music21").converter
    for abc in TUNES[:4]:
        for piece in (abc, abc.replace("2", "3")):
            score = converter.parse(f"X:1\n{piece}", format="abc")
            whole = metre_length(piece.split("\n")[0][2:]) * 4
            bars = score.recurse().getElementsByClass("Measure")
            # it cuts a bar that is too long into whole ones and a rest
            wrong = any(Fraction(bar.duration.quarterLength) != whole for bar in bars)
            assert wrong == bool(problems(piece))


REPEATS = {  # and whether it is in order
    **{"|:d6|d6:|": True, "d6:|d6:|": True, "d6::e6|d6:|": True, "|:d6|e6||d6|d6:|": True},
    **{"|:d6|1e6:|2d6||": True, "|:d6| [1e6:|\n[2d6||": True, "d6|1e6:|2d6|": True, "|:d6|e6|]": False},
    **{"|:d6|d6:|:e6|e6:|": True, "|:d6|:e6:|": False, "d6|1e6|2d6|": False, "d6|d6:|e6|2d6|": False},
}


@pytest.mark.parametrize("judge", ["lcsc", "abc2midi"])
def test_repeats_are_judged_as_abc2midi_judges_them(judge):
    if shutil.which(judge) is None and judge != "lcsc":
        pytest.skip("abc2midi is not installed")
    assert {body: not tune_problems(tune(body), judge) for body in REPEATS} == REPEATS


@pytest.mark.skipif(shutil.which("abc2midi") is None, reason="abc2midi is not installed")
def test_composed_tunes_are_played_by_abc2midi():
    assert [abc2midi_errors(abc) for abc in TUNES[:10]] == [[]] * 10
    assert abc2midi_errors(tune("d3 e3|d3 #$e(3|d6[|"))


def test_a_tune_becomes_midi(tmp_path, capfd):
    symusic = pytest.importorskip("symusic")
    abc = tune("|:d2f efg|[df]3 z3:|")
    (tmp_path / "a.mid").write_bytes(midi_bytes(abc))
    score = symusic.Score(str(tmp_path / "a.mid"))
    quarter = score.ticks_per_quarter
    heard = [(note.start * 2 // quarter, note.pitch) for note in score.tracks[0].notes]
    once = [(0, 74), (2, 78), (3, 76), (4, 78), (5, 79), (6, 74), (6, 78)]  # in eighths; K:D has F sharp
    assert sorted(heard) == sorted(once + [(at + 12, pitch) for at, pitch in once])
    assert midi_bytes(tune("z6|z6|")) is None
    capfd.readouterr()
    midi_bytes(tune("d3 e3|d3 e2|d6|"))  # of which the library's compiled code warns
    assert capfd.readouterr() == ("", "")


def test_without_tools_there_is_no_picture_and_our_own_check(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert picture(TUNES[0], "A") is None
    assert tune_problems(TUNES[0], "lcsc") == []
    assert tune_problems(tune("d3"), "lcsc") == ["it has no bars"]
    assert "neither notes" in tune_problems(tune("%%MIDI program 1"), "abc2midi")[0]  # before it is run
    with pytest.raises(EvaluationError, match="`abc2midi` cannot be run"):
        tune_problems(TUNES[0], "abc2midi")


@pytest.mark.skipif(shutil.which("abcm2ps") is None, reason="abcm2ps is not installed")
def test_a_tune_becomes_a_picture():
    drawn = picture(TUNES[0], "The Amber Anchor")
    assert drawn.rstrip().endswith("</svg>")
    assert drawn == picture(TUNES[0], "The Amber Anchor")

"""Tunes in ABC notation: reading, tokens, texts, near-duplicates and the cut into parts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.datasets.base import TextPart
from lcsc.datasets.content import text_digest
from lcsc.music.abc import read_tunes
from lcsc.music.compose import compose
from lcsc.music.pairs import key_text, rhythm_of_file, text_of
from lcsc.music.similar import groups_of, melody
from lcsc.music.tokens import END, TEXT, TOKENS, TUNE, VOCAB_SIZE, decode, encode, pair_tokens

# of our own making, in the shapes that files have
FILE = """O:Nowhere
R:jig

X:1
T:The Caf\u00e9 Lamp % a remark
T:Another name
C:lcsc
M:4/4
L:1/8
K:Dmaj
M:6/8
P:A
"D"A2d "A7"dcB|\\
"G"!trill!B2e e^cA|1 d3 d2A:|2 d6|]
K:Em
w: la la la
e2f g2e | [M:9/8] fed efg b3 ||

X:2
T:Two Voices
M:C
K:G
V:1
GABc|

X:3
T:No Notes
K:C
% nothing

X:4
T:Free
M:none
K:A dorian
ABcd
"""


def test_a_file_is_read_and_cleaned():
    first, free = read_tunes(FILE)
    assert (first.title, first.rhythm, first.origin) == ("The Cafe Lamp", "jig", "Nowhere")
    assert first.abc == (
        "M:6/8\nL:1/8\nK:Dmaj\nA2d dcB| B2e e^cA|1 d3 d2A:|2 d6|]\nK:Em\ne2f g2e | [M:9/8] fed efg b3 ||\n"
    )
    assert (free.metre, free.unit, free.key, free.body) == ("none", "1/8", "A dorian", "ABcd")
    # the headers before the first tune are all tunes'
    assert (free.title, free.rhythm, free.origin) == ("Free", "jig", "Nowhere")


@pytest.mark.parametrize(("metre", "unit"), [("2/4", "1/16"), ("3/4", "1/8"), ("C|", "1/8")])
def test_a_missing_unit_follows_from_the_metre(metre, unit):
    (tune,) = read_tunes(f"X:1\nM:{metre}\nK:G\nGABc|\n")
    assert (tune.metre, tune.unit) == ("2/2" if metre == "C|" else metre, unit)


def test_texts_are_made_of_the_headers():
    first, free = read_tunes(FILE)
    assert text_of(first).startswith("a jig in D, 6/8")
    assert text_of(free).startswith("a jig in A dorian")
    tunes = [compose(np.random.default_rng(i), i) for i in range(40)]
    texts = [text_of(tune) for tune in tunes]
    titles = {compose(np.random.default_rng(0), number).title for number in (0, 1, 24, 575, 576, 1152)}
    assert {"The Amber Anchor", "The Amber Anchor No. 2", "The Yellow Zephyr"} <= titles
    assert len(titles) == 6
    assert 10 <= sum(", called The " in text for text in texts) <= 30
    assert all(
        text.startswith(f"a {tune.rhythm} in {key_text(tune.key)}, {tune.metre}")
        for text, tune in zip(texts, tunes, strict=True)
    )
    assert [key_text(key) for key in ("D", "Bbmaj", "F#m", "Emix", "E Dor", "HP")] == [
        "D", "Bb", "F# minor", "E mixolydian", "E dorian", "HP"
    ]  # fmt: skip
    assert [rhythm_of_file(stem) for stem in ("jigs", "reelsa-c", "slip", "xmas")] == ["jig", "reel", "slip jig", ""]


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=["\n", *map(chr, range(32, 127))], max_size=80))
def test_any_printable_text_comes_back(text):
    tokens = encode(text)
    assert decode(tokens) == text
    assert all(0 < token < VOCAB_SIZE for token in tokens)


def test_tokens_are_characters_and_notations():
    assert VOCAB_SIZE == len(set(TOKENS)) + 3 == 128  # four marks stand for nothing
    assert [TOKENS[token] for token in encode("|:A/2(3BcA:|2 d|]")] == [
        *("|:", "A", "/2", "(3", "B", "c", "A", ":|2", " ", "d", "|]")
    ]
    pair = pair_tokens("a jig", "K:D\n")
    assert (pair[0], pair[-1], pair.count(TUNE)) == (TEXT, END, 1)
    assert decode(pair) == "a jigK:D\n"
    with pytest.raises(ValueError, match="'é' has no token"):
        encode("café")


def test_a_tune_in_another_key_or_with_another_ending_is_the_same():
    one, two, three = (compose(np.random.default_rng(i)).body for i in range(3))
    assert melody("CEG") == melody("D2F/2|A") == (2, 2)
    assert melody("{c}C[K:D]E\nK:G\nG,") == (2, -5)
    up = "".join({"B": "c", "b": "c'"}.get(char, chr(ord(char) + 1)) if char.isalpha() else char for char in three)
    up = up.replace("H", "A").replace("h", "a")
    assert melody(up) == melody(three)
    assert up != three
    varied = one[: len(one) * 4 // 5] + "f2d2 g2e2"
    assert list(groups_of([one, two, three, varied, up])) == [0, 1, 2, 0, 2]
    assert list(groups_of([one, two, three], ["The Mill", "", "Mill!"])) == [0, 1, 0]


def test_parts_share_no_family_and_no_token_is_lost():
    data = build("dataset", "tunes", num=60, stretch=128)
    pairs = {part: data.pairs(part) for part in TextPart}
    assert {part.name: len(found) for part, found in pairs.items()} == {"TRAIN": 48, "SEARCH": 6, "REPORT": 6}
    families = [{pair.group for pair in found} for found in pairs.values()]
    assert sum(map(len, families)) == len(set.union(*families))
    for part, found in pairs.items():
        stretches = data.tokens(part)
        assert (stretches.dtype, stretches.shape[1]) == (torch.uint8, 128)
        stream = [token for pair in found for token in pair_tokens(pair.text, pair.tune)]
        flat = stretches.flatten().tolist()
        assert flat[: len(stream)] == stream
        assert flat[len(stream) :] == stream[: len(flat) - len(stream)]
        assert int(data.byte_counts(part).sum()) == len(decode(flat))
    again, other = build("dataset", "tunes", num=60, stretch=128), build("dataset", "tunes", num=60, seed=1)
    assert text_digest(again) == text_digest(data) != text_digest(other)


def test_near_duplicates_are_kept_on_one_side(tmp_path):
    tunes = [compose(np.random.default_rng(i), i) for i in range(12)]
    text = "".join(
        f"X:{i}\nT:{tune.title} {name}\nR:{tune.rhythm}\n{tune.abc}\n\n"
        for name, change in (("one", ""), ("two", "z"))
        for i, tune in enumerate(tunes)
        for tune in [tune.__class__(**{**vars(tune), "body": tune.body + change})]
    )
    (tmp_path / "all.abc").write_text(text)
    data = build("dataset", "tunes", path=str(tmp_path), every=4)
    parts = [[pair.tune.rstrip("z\n") for pair in data.pairs(part)] for part in TextPart]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert all(part.count(tune) == 2 for part in parts for tune in part)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 2}, "`every` 2; it must be at least 3"),
        ({"longest": 3}, "`longest` 3; it must be at least 8"),
        ({"path": "nowhere.abc"}, "cannot read `nowhere.abc`: No such file or directory. Give a file in ABC notation"),
        ({"path": "empty"}, "`path` `empty`, a folder without an `.abc` file. Give another one"),
        ({"num": 20, "longest": 40}, "has 0 tunes of at most 40 tokens in 0 families"),
        (
            {"num": 5},
            "has 5 tunes of at most 1024 tokens in 5 families, which gives {'train': 5, 'search': 0, 'report'",
        ),
    ],
)
def test_what_is_no_set_of_tunes_is_refused(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        build("dataset", "tunes", **fields).pairs(TextPart.TRAIN)


@pytest.mark.skipif("LCSC_ABC" not in os.environ, reason="LCSC_ABC names no folder of ABC files")
def test_real_tunes_come_back_exactly():
    folder = os.environ["LCSC_ABC"]
    for file in sorted(Path(folder).rglob("*.abc")):
        for tune in read_tunes(file.read_text(encoding="latin-1")):
            assert decode(encode(tune.abc)) == tune.abc
            (again,) = read_tunes(f"X:1\n{tune.abc}")
            assert again.abc == tune.abc
    data = build("dataset", "tunes", path=folder)
    families = [{pair.group for pair in data.pairs(part)} for part in TextPart]
    assert sum(map(len, families)) == len(set.union(*families))

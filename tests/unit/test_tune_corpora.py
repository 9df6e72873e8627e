"""Real tunes of music21's corpus, where that is installed: read for the test and never copied."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from lcsc.music.abc import read_tunes
from lcsc.music.check import problems
from lcsc.music.tokens import decode, encode

CORPUS = find_spec("music21")


@pytest.mark.skipif(CORPUS is None, reason="music21 is not installed")
@pytest.mark.parametrize(("name", "valid"), [("airdsAirs", 0.95), ("oneills1850", 0.8), ("ryansMammoth", 0.75)])
def test_tunes_of_a_corpus_come_back_and_most_are_valid(name, valid):
    folder = Path(CORPUS.submodule_search_locations[0]) / "corpus" / name
    texts = (file.read_text("latin-1") for file in sorted(folder.glob("*.abc")))
    tunes = [tune.abc for tune in islice((tune for text in texts for tune in read_tunes(text)), 300)]
    assert len(tunes) == 300
    assert [decode(encode(tune)) for tune in tunes] == tunes
    assert sum(not problems(tune) for tune in tunes) >= valid * len(tunes)

"""Random damage to a journal is always noticed; a torn tail is dropped at every byte."""

from __future__ import annotations

import numpy as np
import pytest
from small_search import search

from lcsc.core.errors import RunError
from lcsc.search.frames import read_records

FAULTS = pytest.mark.faults


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """The bytes of a finished search's journal."""
    return (search(tmp_path_factory.mktemp("runs")) / "journal.jsonl").read_bytes()


@pytest.mark.parametrize("num", [300, pytest.param(10_000, marks=FAULTS)])
def test_every_random_flip_is_noticed(journal, tmp_path, num, count):
    """Refused; or, where it is the last newline that changed, the last record is taken for torn and computed again."""
    rng, path, noticed = np.random.default_rng(num), tmp_path / "journal.jsonl", 0
    records = len(journal.splitlines())
    for _ in range(num):
        place, data = int(rng.integers(len(journal))), bytearray(journal)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(data))
        try:
            found, good = read_records(path)
        except RunError as error:
            noticed += str(error).startswith(f"`{path}` is damaged at record ")
        else:
            noticed += place == len(journal) - 1 and len(found) == records - 1 and good < len(journal)
    assert noticed == num
    count("byte_flips", flips=num, noticed=noticed)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=FAULTS)])
def test_a_journal_cut_inside_its_last_two_records_continues(journal, tmp_path, step, count):
    whole = search(tmp_path / "whole")
    path, lines = whole / "journal.jsonl", journal.splitlines(keepends=True)
    begin = len(journal) - len(lines[-1]) - len(lines[-2])
    cuts = sorted({*range(begin, len(journal), step), begin + len(lines[-2]), len(journal) - 1})
    for cut in cuts:
        path.write_bytes(journal[:cut])
        (whole / "summary.json").unlink(missing_ok=True)
        notes = []
        search(tmp_path / "whole", note=notes.append)
        assert path.read_bytes() == journal
        torn = cut not in (begin, begin + len(lines[-2]))
        assert [note.startswith("dropped a torn last line") for note in notes] == [True] * torn
    count("truncations", cuts=len(cuts))

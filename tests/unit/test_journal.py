"""The journal replays what it holds, drops a torn tail, and refuses damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers_fake_run import framed

from lcsc.core.errors import RunError
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal


def write(folder, num, notes=None):
    """Run the first `num` steps of a plan; returns how many were computed."""
    computed = []
    with Journal(folder, (notes if notes is not None else []).append) as journal:
        for index in range(num):
            journal.step("trial", {"uid": index}, lambda i=index: computed.append(i) or {"value": i / 3})
    return computed


def test_continuing_computes_only_what_is_missing_and_leaves_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert write(tmp_path / "a", 5) == [0, 1, 2, 3, 4]
    assert write(tmp_path / "b", 3) == [0, 1, 2]
    assert write(tmp_path / "b", 5) == [3, 4]
    assert (tmp_path / "a" / "journal.jsonl").read_bytes() == (tmp_path / "b" / "journal.jsonl").read_bytes()
    records, _ = read_records(tmp_path / "a" / "journal.jsonl")
    assert records[4] == {"seq": 4, "kind": "trial", "uid": 4, "value": 4 / 3}
    timing = [json.loads(line) for line in (tmp_path / "b" / "timing.jsonl").read_text().splitlines()]
    assert [line["seq"] for line in timing] == [0, 1, 2, 3, 4]


def test_torn_tail_is_dropped_at_every_byte(tmp_path):
    write(tmp_path, 3)
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        notes = []
        assert write(tmp_path, 3, notes) == [2]
        assert path.read_bytes() == whole
        assert len(notes) == (cut > second)
        assert all("dropped a torn last line" in note for note in notes)


def test_damage_in_the_middle_is_refused_with_its_place(tmp_path):
    write(tmp_path, 3)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(RunError, match=rf"damaged at record 1 \(byte {len(lines[0])}\): its checksum is wrong"):
        write(tmp_path, 3)
    path.write_bytes(lines[0] + lines[2])  # a lost line
    with pytest.raises(RunError, match=r"at record 1 .*does not follow the record before"):
        write(tmp_path, 3)
    path.write_bytes(lines[0] + lines[1] + lines[1])  # a doubled one
    with pytest.raises(RunError, match=r"at record 2 .*does not follow the record before"):
        write(tmp_path, 3)


def test_a_line_of_another_journal_is_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        with Journal(tmp_path / name, print) as journal:
            for uid in range(2):
                journal.step("trial", {"uid": uid}, lambda name=name: {"value": ord(name)})
    mine, theirs = ((tmp_path / name / "journal.jsonl").read_bytes().splitlines(keepends=True) for name in "ab")
    (tmp_path / "a" / "journal.jsonl").write_bytes(mine[0] + theirs[1])
    with pytest.raises(RunError, match=r"at record 1 .*does not follow the record before"):
        read_records(tmp_path / "a" / "journal.jsonl")


def test_a_frame_is_the_checksum_of_zlib_and_the_digest_of_hashlib(tmp_path):
    write(tmp_path, 3)
    records = [{"seq": i, "kind": "trial", "uid": i, "value": i / 3} for i in range(3)]
    assert (tmp_path / "journal.jsonl").read_bytes() == framed(records)


def test_every_flipped_byte_is_noticed(tmp_path):
    """Never read as other records: refused, or, in the last newline alone, taken for a torn line."""
    write(tmp_path, 3)
    path, rng = tmp_path / "journal.jsonl", np.random.default_rng(0)
    whole, missed = path.read_bytes(), []
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(data))
        try:
            records, good = read_records(path)
        except RunError:
            continue
        if place != len(whole) - 1 or len(records) != 2 or good == len(whole):
            missed.append(place)
    assert missed == []


def test_another_step_in_the_same_place_is_refused(tmp_path):
    write(tmp_path, 2)
    with (
        Journal(tmp_path, print) as journal,
        pytest.raises(RunError, match="record 0 has `uid` = 0, this search computes 7"),
    ):
        journal.step("trial", {"uid": 7}, dict)


def test_second_writer_is_refused(tmp_path):
    with Journal(tmp_path, print), pytest.raises(RunError, match="another process is running"):
        Journal(tmp_path, print)


def test_nothing_is_recorded_when_a_step_fails(tmp_path):
    with Journal(tmp_path, print) as journal, pytest.raises(ZeroDivisionError):
        journal.step("trial", {}, lambda: {"value": 1 / 0})
    assert (tmp_path / "journal.jsonl").read_bytes() == b""
    with Journal(tmp_path, print) as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.step("trial", {}, lambda: {"value": float("nan")})
    assert (tmp_path / "journal.jsonl").read_bytes() == b""

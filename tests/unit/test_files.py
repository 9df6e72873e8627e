"""Files and folders are absent or complete."""

from __future__ import annotations

import errno
import json

import pytest

from lcsc.core.errors import ConfigError, OutputExistsError
from lcsc.core.files import new_directory, write_bytes, write_json, writing


def test_failed_folder_leaves_nothing(tmp_path):
    def fill():
        with new_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_finished_folder_appears_whole(tmp_path):
    with new_directory(tmp_path / "deep" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text() == "x"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_what_another_fills_is_not(tmp_path):
    for name in (".out.0123abcd.tmp", ".out.other.tmp", ".out2.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    others = {".out.other.tmp", ".out2.0123abcd.tmp"}
    with new_directory(tmp_path / "out") as mine:
        twice = new_directory(tmp_path / "out")
        theirs = twice.__enter__()
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, theirs.name, *others}
    with pytest.raises(OutputExistsError, match="appeared"):
        twice.__exit__(None, None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}
    with pytest.raises(ConfigError, match="cannot be written"), new_directory(tmp_path / ".out2.0123abcd.tmp/half/x"):
        pass


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"), new_directory(tmp_path / "out"):
        pass


def test_a_full_disk_is_a_sentence_also_where_the_folders_were_not_made(tmp_path):
    path = tmp_path / "deep" / "deeper" / "out"
    sentence = r"out` cannot be written: No space left on device, \d+ bytes are free"
    with pytest.raises(ConfigError, match=sentence), writing(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path.parent))


def test_replacing_a_file_is_atomic_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

"""A run directory is made once, found again, and never shared by two configurations."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lcsc.core.differences import differences
from lcsc.core.errors import RunError
from lcsc.search.rundir import RunDir, open_run_dir
from lcsc.search.setup import PROTOCOL

INFO = {"name": "toy", "config": {"seed": 0, "search": {"num_trials": 5}}, "fingerprints": {"bank": "abc"}}


def test_the_same_search_is_found_again_and_another_is_not(tmp_path):
    run, state = open_run_dir(tmp_path, None, INFO, print)
    assert state == "new"
    assert run.path.name.startswith("toy-")
    assert open_run_dir(tmp_path, None, INFO, print) == (run, "resumed")
    (run.path / "summary.json").write_text("{}")
    assert open_run_dir(tmp_path, None, INFO, print) == (run, "finished")
    other, state = open_run_dir(tmp_path, None, {**INFO, "config": {"seed": 1, "search": {"num_trials": 5}}}, print)
    assert state == "new"
    assert other.path != run.path


def test_other_circumstances_start_a_new_run_and_say_why(tmp_path):
    old, _ = open_run_dir(tmp_path, None, INFO, print)
    notes = []
    changed = {**INFO, "fingerprints": {"bank": "xyz"}}
    run, state = open_run_dir(tmp_path, None, changed, notes.append)
    assert state == "new"
    assert run.path != old.path
    assert notes == [f"not continuing `{old.path}`, its circumstances differ: `fingerprints.bank`: abc -> xyz"]


def test_a_run_from_before_steps_were_counted_is_not_continued(tmp_path):
    old, _ = open_run_dir(tmp_path, None, INFO, print)
    notes, prints = [], {**INFO["fingerprints"], "protocol": PROTOCOL}
    assert open_run_dir(tmp_path, None, {**INFO, "fingerprints": prints}, notes.append)[1] == "new"
    assert notes == [f"not continuing `{old.path}`, its circumstances differ: `fingerprints.protocol`: None -> 2"]


def test_a_named_directory_of_another_configuration_is_refused_field_by_field(tmp_path):
    open_run_dir(tmp_path, tmp_path / "mine", INFO, print)
    other = {**INFO, "config": {"seed": 1, "search": {"num_trials": 9}}, "fingerprints": {"bank": "xyz"}}
    with pytest.raises(RunError) as caught:
        open_run_dir(tmp_path, tmp_path / "mine", other, print)
    text = str(caught.value)
    assert "`search.num_trials`: 5 -> 9" in text
    assert "`seed`: 0 -> 1" in text
    assert "`fingerprints.bank`: abc -> xyz" in text


def test_starts_in_the_same_second_never_share_a_directory(tmp_path):
    def start(index):
        return open_run_dir(tmp_path, None, {**INFO, "config": {"seed": index}}, print)[0].path

    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(start, range(100)))
    assert len(set(paths)) == 100


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is no run directory: it has no run\.json"):
        RunDir.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(RunError, match="has schema 99; this lcsc reads 2"):
        RunDir.load(tmp_path)


def test_differences_name_every_leaf():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["`a.c`: 2 -> 3", "`d`: None -> 4"]
    assert differences({"a": 1}, {"a": 1.0}) == ["`a`: 1 -> 1.0"]


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("a/b", "a-b-2"),
        ("../../out", "-..-out-2"),
        (".hidden", "hidden-2"),
        ("..", "run-2"),
        ("x" * 300, "x" * 180 + "-2"),
        ("\u00fc" * 200, "\u00fc" * 90 + "-2"),
        ("two\nlines and spaces", "two\nlines and spaces-2"),
        ("CON: *?", "CON: *?-2"),
    ],
)
def test_any_name_is_one_folder_that_is_found_again(tmp_path, name, begins):
    info = {**INFO, "name": name}
    run, _ = open_run_dir(tmp_path, None, info, print)
    assert run.path.parent == tmp_path
    assert run.path.name.startswith(begins)
    assert run.info["name"] == name
    assert open_run_dir(tmp_path, None, info, print) == (run, "resumed")

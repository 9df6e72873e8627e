"""What a run directory takes, beside what was told before it was made."""

from __future__ import annotations

import pytest
from helpers_cli import TOY
from helpers_pictures import fine

from lcsc.cli.main import main
from lcsc.config.hydra_app import compose_config
from lcsc.config.schema import SEARCH_SECTIONS
from lcsc.core.errors import ConfigError
from lcsc.search import disk, run
from lcsc.search.problem import Problem
from lcsc.search.setup import build_parts, open_bank


def foretold(words, monkeypatch):
    """The number that `run_search` works with."""
    told = []
    monkeypatch.setattr(run, "run_bytes", lambda *args, **how: told.append(disk.run_bytes(*args, **how)) or told[-1])
    assert main(["search", *words, "run_dir=run"]) == 0
    return told[0]


def taken(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.faults
def test_it_is_known_within_ten_per_cent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TOY, "train_if_missing=true", "searcher=cma", "search.num_trials=300", "bank.path=toy"]
    with fine():
        need = foretold(words, monkeypatch)
    assert taken(tmp_path / "run") == pytest.approx(need, rel=0.1)


def test_a_disk_without_room_is_refused_and_nothing_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 999_999)
    assert main(["train", "experiment=toy_gaussian", "bank.path=toy"]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert main(["search", *TOY, "bank.path=toy", "run_dir=run"]) == 2
    assert "will take about 1," in (said := capsys.readouterr().err)
    assert "and its disk has 999,999 free. Make room" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_derivatives_take_room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=toy_gaussian", "bank.path=toy"]) == 0
    config = compose_config([*TOY, "bank.path=toy"])
    sections = {key: config[key] for key in SEARCH_SECTIONS}
    problem = Problem(bank=open_bank(sections), **build_parts(sections))
    size, trials = problem.space().size, problem.budget.num_trials
    more = disk.run_bytes(problem, slopes=True) - disk.run_bytes(problem, slopes=False)
    assert more == pytest.approx(disk.VECTOR * size * trials, abs=1)
    with pytest.raises(ConfigError, match="Make room"):
        disk.need_room(tmp_path, 2**60)

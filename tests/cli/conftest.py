"""The command line, run in this process and in real second ones."""

from __future__ import annotations

import sys

import pytest

from lcsc.cli.main import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lcsc"])
    return tmp_path


@pytest.fixture
def lcsc(capsys):
    """Run `lcsc WORDS` in this process: (exit code, standard output, standard error)."""

    def call(*words):
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call

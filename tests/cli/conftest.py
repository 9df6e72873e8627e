"""The command line, run in this process and in real second ones."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from lcsc.cli.main import main
from lcsc.models.network import build_network, save_network


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lcsc"])
    return tmp_path


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tiny_arch):
    """Five checkpoints of a tiny UNet2DModel, as diffusers saves them; not to be touched."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for step in (50, 100, 200, 400, 1000):
        save_network(build_network(tiny_arch), folder / f"checkpoint-{step}" / "unet")
    return folder


@pytest.fixture
def lcsc(capsys, monkeypatch):
    """Run `lcsc WORDS` in this process: (exit code, standard output, standard error).

    The clock that says how far a pass has come never strikes, however slow the machine is.
    """
    monkeypatch.setattr("lcsc.cli.passes.PAUSE", math.inf)

    def call(*words):
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call

"""Made once and read by the tests of several files; not to be touched."""

from __future__ import annotations

import pytest
from helpers_fake_run import make_fake_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of 60 trials."""
    return make_fake_run(tmp_path_factory.mktemp("runs") / "finished", num_trials=60)


@pytest.fixture(scope="session")
def grouped_descent(tmp_path_factory):
    """A descent on coefficients for each layer group."""
    path = tmp_path_factory.mktemp("runs") / "grouped"
    return make_fake_run(path, num_trials=60, groups=("down", "mid", "up"), descent=True)


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    """A search that has done 45 of 100 trials and is writing a line."""
    path = tmp_path_factory.mktemp("runs") / "running"
    return make_fake_run(path, finished=False, num_trials=100, done=45, torn=True)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The bank of `helpers_training.SMALL`, made in one go."""
    from helpers_training import SMALL, train

    return train(SMALL, tmp_path_factory.mktemp("unbroken") / "bank")

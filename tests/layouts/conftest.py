"""Folders as the trainers' own libraries write them, kept tiny; made once a session and never changed by a test."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Make a folder for one layout."""
    return lambda name: tmp_path_factory.mktemp(name)

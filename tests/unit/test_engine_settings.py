"""Numbers that are too small are refused by every engine in the same words, and so is a missing package."""

from __future__ import annotations

import math

import pytest

from lcsc.core import registry
from lcsc.core.errors import ConfigError


@pytest.mark.parametrize(
    ("engine", "name", "value", "rule"),
    [
        ("local", "num_workers", 0, "at least 1, or null"),
        ("local", "threads", 1.5, "at least 1, or null"),
        ("local", "timeout_seconds", math.nan, "above 0, or null"),
        ("ray", "num_workers", 0, "at least 1, or null"),
        ("ray", "cpus_per_worker", 0, "at least 1"),
        ("ray", "gpus_per_worker", -0.5, "at least 0.0, or null"),
        ("ray", "max_restarts", -2, "at least -1"),
        ("ray", "timeout_seconds", 0.0, "above 0, or null"),
        ("slurm", "num_workers", 0, "at least 1"),
        ("slurm", "time_minutes", 0, "at least 1"),
        ("slurm", "max_restarts", -1, "at least 0"),
        ("slurm", "lease_seconds", 0.0, "above 0"),
        ("slurm", "timeout_seconds", math.nan, "above 0, or null"),
    ],
)
def test_settings_that_are_too_small_are_refused_in_a_sentence(engine, name, value, rule):
    with pytest.raises(ConfigError) as said:
        registry.build("engine", engine, **{name: value})
    assert str(said.value) == f"`engine.{name}` is {value}; it must be {rule}."


def test_settings_at_the_edge_are_taken():
    assert registry.build("engine", "ray", gpus_per_worker=0, max_restarts=-1).gpus_per_worker == 0
    assert registry.build("engine", "slurm", max_restarts=0, timeout_seconds=0.1).timeout_seconds == 0.1
    assert registry.build("engine", "local", num_workers=None).num_workers is None

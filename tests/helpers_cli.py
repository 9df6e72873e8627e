"""What the command-line tests share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

#: A toy search small enough for tests.
TOY = [
    "experiment=toy_gaussian",
    "search.num_trials=30",
    "search.num_images=64",
    "search.num_finalists=3",
    "search.num_images_select=100",
    "search.num_images_report=200",
]


#: The digits experiment with a network and a training small enough for tests.
TINY_TRAINING = [
    "network.config.block_out_channels=[8]",
    "network.config.norm_num_groups=4",
    "network.config.down_block_types=[DownBlock2D]",
    "network.config.up_block_types=[UpBlock2D]",
    "trainer.num_steps=20",
    "trainer.batch_size=16",
    "trainer.save_every=4",
]


def start(*words, cwd, env=None):
    """Start `python -m lcsc WORDS` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lcsc", *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def load_script(name: str) -> ModuleType:
    """`scripts/NAME.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for types
    spec.loader.exec_module(module)
    return module

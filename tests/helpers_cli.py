"""What the command-line tests share."""

from __future__ import annotations

import os
import subprocess
import sys

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

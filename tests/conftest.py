"""Shared by all tests: two threads in all (suites run on small machines) and tiny banks made by the real writers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers inherit what the process that started them has set below
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start jobs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests interrupt inherit it

import pytest
import torch
from helpers_pictures import coarse

from lcsc.models.network import build_network, save_network

coarse()
with contextlib.suppress(ImportError):
    from absl import logging as absl_logging  # rouge-score imports it

    # Hydra closes all handlers, and this one closes its stream, unless that is the process's own
    absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

TINY = {
    "class": "UNet2DModel",
    "config": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8],
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "add_attention": False,
    },
}


@pytest.fixture(scope="session")
def tiny_arch():
    """The smallest UNet2DModel the tests use."""
    return TINY


@pytest.fixture
def tiny_bank(tmp_path):
    """A folder of five checkpoints of a tiny UNet2DModel, as diffusers saves them."""
    folder = tmp_path / "bank"
    torch.manual_seed(0)
    for step in (50, 100, 200, 400, 1000):
        save_network(build_network(TINY), folder / f"checkpoint-{step}" / "unet")
    return folder


@pytest.fixture
def count():
    """A function that files numbers under a name for docs/how_it_is_tested.md; see benchmarks/faults.py.

    It does nothing unless `LCSC_FAULT_COUNTS` names a folder. Each name has a file of its own, for tests run side by
    side.
    """

    named = os.environ.get("LCSC_FAULT_COUNTS")
    folder = None if named is None else Path(named).resolve()  # before the test goes elsewhere

    def file(name, **numbers):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(numbers))

    return file

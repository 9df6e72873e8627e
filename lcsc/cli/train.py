"""`lcsc train`: make a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc.config.hydra_app import run_job
from lcsc.core import registry
from lcsc.core.errors import ConfigError


def main(words: Sequence[str]) -> None:
    """Train, or continue; see `lcsc --help`."""
    run_job("train", words, lambda config: print(f"bank: {train(config)}", flush=True))


def train(config: Mapping[str, Any]) -> Path:
    """Train the experiment's network and return the folder of its checkpoints."""
    if config["network"] is None:
        raise ConfigError(
            "`network` is not set, so there is nothing to train. Choose an experiment with `experiment=...`."
        )
    return registry.build("trainer", config["trainer"]).train(
        arch=config["network"],
        model=registry.build("model", config["model"]),
        dataset=registry.build("dataset", config["dataset"]),
        out=Path(config["bank"]["path"]),
        seed=config["seed"],
        progress=False if config["quiet"] else None,
    )

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
    return registry.build("trainer", config["trainer"]).train(
        arch=config["network"] or _arch_of_start(config["trainer"].get("start")),
        model=registry.build("model", config["model"]),
        dataset=registry.build("dataset", config["dataset"]),
        out=Path(config["bank"]["path"]),
        seed=config["seed"],
        progress=False if config["quiet"] else None,
    )


def _arch_of_start(start: str | None) -> Mapping[str, Any]:
    """The architecture of the model that a training begins with, which need not be written out again."""
    if start is None:
        raise ConfigError(
            "`network` is not set, so there is nothing to train. Choose an experiment with `experiment=...`, or begin "
            "with a model by `trainer.start=FOLDER`."
        )
    from lcsc.bank import CheckpointBank

    arch = CheckpointBank.open(Path(start)).arch
    if arch is None:
        raise ConfigError(f"`trainer.start` is `{start}`, which has no config.json of a network. Set `network` too.")
    return arch

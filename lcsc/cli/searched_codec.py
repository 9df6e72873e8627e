"""What a search with operator=compress found, as the settings of a codec for a whole bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from lcsc.bank import CheckpointBank
from lcsc.cli.finished import finished_run
from lcsc.codec.settings import CodecSettings
from lcsc.core import registry
from lcsc.core.errors import ConfigError

#: settings that the search has an answer to
FOUND = ("bits_w", "layers", "tau", "anchor_every")


def searched_codec(
    path: Path, bank: CheckpointBank, how: CodecSettings, said: Collection[str]
) -> tuple[CodecSettings, str]:
    """The settings `how` with the bits, threshold and interval of the winner of the finished run `path`; told in words.

    Args:
        path: of the run.
        bank: what will be coded; of the tensors that were searched, whichever steps of them.
        how: further settings.
        said: names of those that were given.

    Raises:
        ConfigError: a setting is given twice, codec=lossless, another operator, or a bank of other tensors.
        RunError: the run is not finished.
    """
    if how.mode != "lossy":
        raise ConfigError(f"`run` is `{path}` and `codec` is `{how.mode}`, which has no bits to take. Use codec=lossy.")
    if twice := [name for name in FOUND if name in said]:
        raise ConfigError(
            f"`{twice[0]}` is given, and the search in `run={path}` found its own. Leave one of them out."
        )
    run = finished_run(path)
    config = run.info["config"]["operator"]
    if config["name"] != "compress":
        raise ConfigError(f"`run` is `{path}`, a search with operator={config['name']}; one with compress finds bits.")
    operator, searched = registry.build("operator", config), run.info["bank"]["num_parameters"]
    assert run.best is not None, "a finished run has a winner"
    groups, bits = operator.groups(bank), run.best["bits"]
    if len(groups) != len(bits) or bank.layout.num_parameters != searched:
        raise ConfigError(
            f"`run` is `{path}`, which searched {len(bits)} groups of {searched:,} parameters, and `from={bank.path}` "
            f"holds {len(groups)} groups of {bank.layout.num_parameters:,}. Take a bank of the same model."
        )
    found: CodecSettings = operator.codec(groups, bits, run.best["tau"], run.best["anchor_every"])
    told = f"bits {', '.join(map(str, bits))}, tau {found.tau:g}, an anchor every {found.anchor_every} checkpoints"
    return dataclasses.replace(how, **{name: getattr(found, name) for name in FOUND}), told

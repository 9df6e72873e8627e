"""`lcsc transform`: another architecture of one model, without a search."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words
from lcsc.cli.sizes import size_text
from lcsc.core.errors import ConfigError

DEFAULTS = {**dict.fromkeys(("operator", "model", "to", "component", "weights")), "max_shard_size": "5GB"}


def main(words: Sequence[str]) -> None:
    """`operator=NAME model=DIR to=OUT [operator.SETTING=VALUE ...] [max_shard_size=5GB]`."""
    own = [word for word in words if word.startswith("operator.")]
    settings = parse_words([word for word in words if word not in own], DEFAULTS)
    name, path, to = (need(settings, key) for key in ("operator", "model", "to"))
    began, operator = time.perf_counter(), _operator(name, own)
    from lcsc.export.transform import transform_model

    how = {key: settings[key] for key in ("component", "weights")}
    bank = CheckpointBank.open(Path(path), storage="streamed", **how)
    print(f"model: {path} (step {bank.steps[-1]}, {bank.layout.num_parameters:,} parameters)", flush=True)
    with passing("transform") as progress:
        done = transform_model(
            bank,
            operator,
            Path(to),
            max_shard_size=need(settings, "max_shard_size"),
            command=shlex.join(["lcsc", "transform", *words]),
            progress=progress,
        )
    for line in _facts(done.recipe):
        print(line)
    if done.companions:
        print(f"copied: {', '.join(done.companions)}")
    print(f"model: {to} ({size_text(done.nbytes)}, {time.perf_counter() - began:.1f} s)", flush=True)


def _operator(name: str, words: Sequence[str]) -> Any:
    """The operator with its settings, checked as a search checks them; one that needs a search is a ConfigError."""
    from lcsc.config.hydra_app import compose_config
    from lcsc.core import registry
    from lcsc.operators.surgery import Transforms

    able = [key for key, part in registry.discover("operator").items() if issubclass(part.cls, Transforms)]
    if not issubclass(registry.part("operator", name).cls, Transforms):
        raise ConfigError(f"operator `{name}` combines checkpoints; `lcsc transform` takes one of: {', '.join(able)}.")
    config = compose_config([f"operator={name}", *words, "name=transform", "bank.path=none"])
    return registry.build("operator", config["operator"])


def _facts(recipe: Mapping[str, Any]) -> list[str]:
    """What a user of the model has to know: where its tensors are from, how to train on, the sizes of its cache."""
    if how := recipe.get("train_on"):
        layers, factor = how["fresh_optimizer_for_layers"], how["lr_factor"]
        return [f"to train on: a fresh optimizer and {factor} times the learning rate for layers {layers}"]
    if "counts" in recipe:
        counts = dict(recipe["counts"])
        total = counts.pop("parameters")
        said = ", ".join(f"{count:,} {way}" for way, count in counts.items() if count)
        return [f"parameters: {total:,} ({said}); provenance.csv says where each tensor is from"]
    if "cache_bytes_per_token" not in recipe:
        return []
    need, stored = recipe["cache_bytes_per_token"], recipe["stored_cache_bytes_per_token"]
    lines = [f"cache: {size_text(need)} a token with {recipe['num_kv_heads']} key/value heads by layer"]
    if isinstance(recipe["stored_kv_heads"], list):
        lines.append(
            "note: layers keep their own numbers of heads, which only lcsc opens (lcsc.models.network.load_network); "
            "without operator.repeat_heads=false transformers opens it too"
        )
    if stored != need:
        lines.append(
            f"note: classes of transformers have one number of heads for all layers, so heads are repeated to "
            f"{recipe['stored_kv_heads']} and its cache takes {size_text(stored)} a token"
        )
    return lines

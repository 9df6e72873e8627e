"""`lcsc verify`: make a model again from its recipe and compare; decode a coded bank and compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lcsc.bank.coded import is_coded
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words
from lcsc.cli.sizes import size_text
from lcsc.cli.verify_coded import verify_coded
from lcsc.codec.container import SUFFIX
from lcsc.core.errors import ConfigError
from lcsc.export.verify import verify


def main(words: Sequence[str]) -> None:
    """`OUT [bank=PATH]`: a model folder, a folder of them, or a coded bank."""
    plain = [word for word in words if "=" not in word or Path(word).exists()]
    settings = parse_words(
        [word for word in words if word not in plain] + [f"model={word}" for word in plain],
        {"model": None, "bank": None},
    )
    if settings["model"] is None:
        raise ConfigError("no model is named. Write: lcsc verify OUT [bank=PATH]")
    began = time.perf_counter()
    bank = settings["bank"]
    if Path(settings["model"]).suffix == SUFFIX and Path(settings["model"]).is_file():
        raise ConfigError(
            f"`{settings['model']}` is one of a chain of coded checkpoints, each needs others. Give their folder."
        )
    if is_coded(Path(settings["model"])):
        print(verify_coded(Path(settings["model"]), None if bank is None else Path(bank)))
        return
    with passing("verify") as progress:
        checked = verify(Path(need(settings, "model")), None if bank is None else Path(bank), progress)
    for model in checked:
        print(
            f"verified: {model.path} ({model.num_tensors} tensors, {size_text(model.nbytes)}, bit for bit from "
            f"{model.num_parents} checkpoints of {model.bank})"
        )
    print(f"{time.perf_counter() - began:.1f} s", flush=True)

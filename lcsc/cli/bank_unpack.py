"""`lcsc bank unpack`: coded checkpoints as plain files again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lcsc.bank.bank import Selection
from lcsc.bank.coded import is_coded
from lcsc.bank.optimizer_file import NAMES, PLAIN, contents_of, optimizer_tensors
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words, read_selection
from lcsc.codec.arrays import STATES, Tensors
from lcsc.codec.chain import Chain
from lcsc.codec.container import damaged
from lcsc.core.errors import ConfigError
from lcsc.core.files import new_directory, refuse_inside, writing


class _Step:
    def __init__(self, step: int) -> None:
        self.step = step


def main(words: Sequence[str]) -> None:
    """`from=FOLDER to=FOLDER [start= stop= every= last=]`.

    Each step becomes a folder `checkpoint-STEP` with weights and config.json as its library names them, and where an
    optimizer was coded too the torch file that it was, or `optimizer.safetensors` if a training coded it.
    """
    settings = parse_words(words, {"from": None, "to": None, "start": None, "stop": None, "every": "1", "last": None})
    path, to = Path(need(settings, "from")), Path(need(settings, "to"))
    if not is_coded(path):
        raise ConfigError(f"`from` is `{path}`, which holds no coded checkpoints. Give what `lcsc bank pack` wrote.")
    chain, select = Chain(path), read_selection(settings)
    steps = _picked(chain, select)
    refuse_inside(path, to)
    with passing("unpack", unit="checkpoints") as progress, writing(to), new_directory(to) as folder:
        for done, (step, state) in enumerate(chain.walk(steps), 1):
            about, place = chain.header(step).get("about") or {}, folder / f"checkpoint-{step:06d}"
            _write(place, state.tensors, about)
            try:
                _write_optimizer(place, state.tensors, about)
            except (KeyError, TypeError, ValueError, RecursionError):
                raise damaged(chain.files[step].path, "what it says of an optimizer is no file") from None
            progress(done, len(steps))
    print(f"unpacked: {to} ({len(steps)} checkpoints)")


def _picked(chain: Chain, select: Selection) -> list[int]:
    return [item.step for item in select.pick([_Step(step) for step in chain.steps])]  # type: ignore[type-var]


def _write(folder: Path, tensors: Tensors, about: dict) -> None:
    from safetensors.torch import save_file

    from lcsc.bank.storage import as_tensor
    from lcsc.models.network import saved_config

    folder.mkdir()
    ties = about.get("ties") or {}
    weights = {n: as_tensor(a.bits, a.dtype) for n, a in tensors.items() if not n.startswith(STATES)}
    weights |= {name: weights[twin].clone() for name, twin in ties.items()}
    library, config = saved_config(about["arch"]) if about.get("arch") else ("", {})
    name = "diffusion_pytorch_model" if library == "diffusers" else "model"
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_optimizer(folder: Path, tensors: Tensors, about: dict) -> None:
    import torch
    from safetensors.torch import save_file

    from lcsc.bank.storage import as_tensor

    states = {n: as_tensor(a.bits, a.dtype) for n, a in optimizer_tensors(tensors).items()}
    if said := about.get("optimizer"):
        if said["file"] not in NAMES:
            raise ValueError
        torch.save(contents_of(said["contents"], states), folder / said["file"])
    elif states:
        metadata = {"format": "pt"} | ({PLAIN: json.dumps(about["plain"])} if "plain" in about else {})
        save_file({_slot(n): t for n, t in states.items()}, folder / "optimizer.safetensors", metadata=metadata)


def _slot(name: str) -> str:
    """As `lcsc.bank.optimizer_file` reads it."""
    return f"optimizer/{name.removeprefix('state/')}"

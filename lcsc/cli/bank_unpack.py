"""`lcsc bank unpack`: coded checkpoints as plain files again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lcsc.bank.bank import Selection
from lcsc.bank.coded import STATES, is_coded
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words, read_selection
from lcsc.codec.arrays import Tensors
from lcsc.codec.chain import Chain
from lcsc.core.errors import ConfigError
from lcsc.core.files import new_directory


class _Step:
    def __init__(self, step: int) -> None:
        self.step = step


def main(words: Sequence[str]) -> None:
    """`from=FOLDER to=FOLDER [start= stop= every= last=]`.

    Each step becomes a folder `checkpoint-STEP` with weights and config.json as its library names them, and
    `optimizer.safetensors` where an optimizer was coded too.
    """
    settings = parse_words(words, {"from": None, "to": None, "start": None, "stop": None, "every": "1", "last": None})
    path, to = Path(need(settings, "from")), Path(need(settings, "to"))
    if not is_coded(path):
        raise ConfigError(f"`from` is `{path}`, which holds no coded checkpoints. Give what `lcsc bank pack` wrote.")
    chain, select = Chain(path), read_selection(settings)
    steps = _picked(chain, select)
    with passing("unpack", unit="checkpoints") as progress, new_directory(to) as folder:
        for done, (step, state) in enumerate(chain.walk(steps), 1):
            about = chain.header(step).get("about") or {}
            _write(folder / f"checkpoint-{step:06d}", state.tensors, about)
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
    metadata = {"format": "pt"}
    save_file(weights, folder / f"{name}.safetensors", metadata=metadata)
    states = {_slot(n): as_tensor(a.bits, a.dtype) for n, a in tensors.items() if n.startswith(STATES)}
    if states:
        save_file(states, folder / "optimizer.safetensors", metadata=metadata)
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _slot(name: str) -> str:
    """As `lcsc.bank.optimizer_file` reads it."""
    return f"optimizer/{name.removeprefix('state/')}"

"""What the experiments on encoder-decoders share: sources pretrained here, on the training part of a text alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml
from machine import ROOT

#: kind -> network of `conf/network`, trainer, and what their settings for layers and dropout are called
KINDS = {
    "bert": ("bert_tiny", "masked_lm", "num_hidden_layers", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "roberta": (
        "roberta_tiny",
        "masked_lm",
        "num_hidden_layers",
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "gpt2": ("gpt2_tiny", "causal_lm", "n_layer", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
}
#: windows of a pretraining and how long each is; windows of a fine-tuning
BATCH, BLOCK, TUNED = 32, 32, 16
#: of everything that is drawn: at this width the usual 0.02 keeps a masked model from learning for thousands of steps
STD = 0.1


class Clock:
    """Says when a piece of work is to be the last of this call, so that a machine can be shared; the same call goes on.

    Args:
        minutes: after which no new piece begins; None never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Raise SystemExit (75, "try again") when the time is over."""
        if self._end is not None and time.monotonic() > self._end:
            raise SystemExit(75)


class Notes:
    """Measured values by name in a JSON file, each written as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self._path, self.values = path, json.loads(path.read_text()) if path.exists() else {}

    def keep(self, name: str, value: Any) -> Any:
        """File a value; returns it."""
        self.values[name] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.values, indent=1))
        return value


def text_of(path: Path | None) -> Any:
    """The data set: a text file, or the text of dataset=text."""
    from lcsc.core.registry import build

    return build("dataset", "text", **({} if path is None else {"path": str(path)}))


def arch_of(kind: str, layers: int) -> dict[str, Any]:
    """A network of `conf/network` with so many layers, without dropout, drawn from N(0, STD^2)."""
    network, _, key, drops = KINDS[kind]
    arch = yaml.safe_load((ROOT / "conf" / "network" / f"{network}.yaml").read_text())
    return {**arch, "config": {**arch["config"], key: layers, "initializer_range": STD, **dict.fromkeys(drops, 0.0)}}


def pretrained(kind: str, layers: int, steps: int, every: int, dataset: Any, seed: int, out: Path) -> Path:
    """The bank of a source, trained where it is not there."""
    from lcsc.core.registry import build

    trainer = build(
        "trainer",
        KINDS[kind][1],
        num_steps=steps,
        batch_size=BATCH,
        block_length=BLOCK,
        learning_rate=3e-3,
        schedule="constant_with_warmup",
        warmup_steps=50,
        save_every=every,
        **({} if kind == "gpt2" else {"mask_probability": 0.3}),
    )
    arch = arch_of(kind, layers)
    return trainer.train(arch=arch, model=None, dataset=dataset, out=out, seed=seed, progress=False)

"""What the experiments share in which a small language model is changed by an operator and trained on.

Their settings on the command line, the trainings of a seed with their losses, and the results file, which is written
after every seed. What lies in `--folder` is gone on with, also where a run was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from machine import ROOT, circumstances

#: settings that are not told by a results file: places, and what `results` says itself
_PLACES = ("seeds", "text", "folder", "to", "figure", "redraw")


def parser(said: str, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """The settings of an experiment; `defaults` has `network`, `steps` and `num_blocks`."""
    made = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--text", type=Path, help="a text file; without it the text of dataset=text")
    made.add_argument("--network", nargs="*", default=defaults["network"], help="entries of its configuration, k=v")
    made.add_argument("--steps", type=int, default=defaults["steps"], help="of the base")
    made.add_argument("--batch-size", type=int, default=8, help="blocks of a step")
    made.add_argument("--block-length", type=int, default=64, help="tokens of a block")
    made.add_argument("--learning-rate", type=float, default=2e-3)
    made.add_argument("--num-blocks", type=int, default=defaults["num_blocks"], help="that a loss is measured on")
    made.add_argument("--folder", type=Path, help="keeps banks and runs, and goes on with what is there")
    made.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    made.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / f"{name}.svg")
    made.add_argument("--redraw", action="store_true", help="only the figure, from the results file")
    return made


def results(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, int, Path], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    draw: Callable[[Mapping[str, Any], Path], None],
) -> None:
    """Measure seed by seed, write the results file after each, and draw it.

    Args:
        args: of `parser`.
        measure: everything of one seed, from the settings, the seed and the folder.
        summary: means over what was measured.
        draw: the figure of a results file.
    """
    if not args.redraw:
        args.text = None if args.text is None else args.text.resolve()
        with tempfile.TemporaryDirectory() as spare:
            folder, rows = (args.folder or Path(spare)).resolve(), []
            for seed in args.seeds:
                rows.append(measure(args, seed, folder))
                settings = {key: value for key, value in vars(args).items() if key not in _PLACES}
                result = {
                    **circumstances(),
                    "seeds": [row["seed"] for row in rows],
                    "text": "dataset=text" if args.text is None else args.text.name,
                    **settings,
                    "batch_tokens": args.block_length * args.batch_size,
                    **summary(rows),
                    "runs": rows,
                }
                args.to.write_text(json.dumps(result, indent=2) + "\n")
                print(json.dumps(result["differences_nats"], indent=2), flush=True)
    draw(json.loads(args.to.read_text()), args.figure)


class Runs:
    """The trainings of one seed, each a bank in a folder of its own, and their losses.

    Args:
        args: of `parser`.
        seed: of everything; the base and what goes on from it see windows of their own, all arms the same ones.
        folder: where the seed's folder is or will be.
        network: of `conf/network`, changed by the setting `network`.
        operator: that changes the base.
        experiment: that its searches are of.
        warmup_steps: of all trainings but the base's.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        seed: int,
        folder: Path,
        *,
        network: str,
        operator: str,
        experiment: str,
        warmup_steps: int = 0,
    ) -> None:
        from lcsc.core.registry import build

        self.args, self.seed, self.folder = args, seed, folder / f"seed-{seed}"
        self.operator, self.experiment, self.warmup_steps = operator, experiment, warmup_steps
        arch = yaml.safe_load((ROOT / "conf" / "network" / f"{network}.yaml").read_text())
        changes = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in args.network)}
        self.arch = {**arch, "config": {**arch["config"], **changes}}
        self.dataset = build("dataset", "text", **({} if args.text is None else {"path": str(args.text)}))
        self.objective = build("objective", "language_modeling", dataset=self.dataset, block_length=args.block_length)
        self._losses_path = self.folder / "losses.json"
        self._losses = json.loads(self._losses_path.read_text()) if self._losses_path.exists() else {}

    def place(self, name: str) -> Path:
        """Folder of a training or of a model by its name."""
        return self.folder / name.replace(" ", "-").replace(",", "")

    def train(
        self, name: str, arch: Mapping[str, Any], steps: int, every: int, start: Path | None = None, **settings: Any
    ) -> Path:
        """A bank of so many steps, saved every so often."""
        from lcsc.core.registry import build

        how = {
            "num_steps": steps,
            "batch_size": self.args.batch_size,
            "block_length": self.args.block_length,
            "learning_rate": self.args.learning_rate,
            "schedule": "constant_with_warmup",
            "warmup_steps": 0 if name == "base" else self.warmup_steps,
            "save_every": every,
            "start": None if start is None else str(start),
        }
        trainer = build("trainer", "causal_lm", **{**how, **settings})
        seed = self.seed if name == "base" else 1000 + self.seed
        return trainer.train(
            arch=arch, model=None, dataset=self.dataset, out=self.place(name), seed=seed, progress=False
        )

    def change(self, name: str, settings: Mapping[str, Any], base: str = "base") -> Path:
        """The operator's folder for a checkpoint of the base, the last unless `step` says another."""
        from lcsc.bank import CheckpointBank
        from lcsc.core.registry import build
        from lcsc.export.transform import transform_model

        to = self.place(f"start-{name}")
        if not to.exists():
            bank = CheckpointBank.open(self.place(base), storage="streamed")
            transform_model(bank, build("operator", self.operator, seed=self.seed, **settings), to)
        return to

    def same(self, one: str, other: str) -> bool:
        """Whether two folders hold the same weights, as where a search finds what a rule says."""
        from safetensors.torch import load_file

        a, b = (load_file(self.place(name) / "model.safetensors") for name in (one, other))
        return set(a) == set(b) and all(bool((a[key] == b[key]).all()) for key in a)

    def loss(self, folder: Path) -> float:
        """Mean loss of the network in a folder on blocks of the report half; measured once."""
        from lcsc.bank import CheckpointBank
        from lcsc.core.seeds import Purpose
        from lcsc.operators.base import Candidate

        key = f"{folder.relative_to(self.folder)} on {self.args.num_blocks}"
        if key not in self._losses:
            bank = CheckpointBank.open(folder)
            row = bank.matrix()[-1]
            candidate = Candidate(bank.arch, bank.layout, lambda out: out.copy_(row), {}, bank.constants)
            images = range(self.args.num_blocks)
            self._losses[key] = self.objective(candidate, seed=0, purpose=Purpose.REPORT, images=images).value
            self._losses_path.write_text(json.dumps(self._losses, indent=1))
        return self._losses[key]

    def arm(self, name: str, start: Path, steps: int, every: int, marks: Sequence[int]) -> dict[str, float]:
        """Train from a folder; losses at the start and at the marks."""
        bank = self.train(name, config_of(start), steps, every, start)
        return {"0": self.loss(start)} | {str(mark): self.loss(bank / f"checkpoint-{mark:06d}") for mark in marks}

    def search(self, name: str, words: Sequence[str]) -> Path:
        """The run of the experiment from the base, with further settings; it trains as the arms do."""
        run, args = self.place(name), self.args
        if (run / "summary.json").exists():  # finished
            return run
        own = [f"seed={self.seed}", f"bank.path={self.place('base')}", f"run_dir={run}", "quiet=true"]
        own += [f"objective.block_length={args.block_length}", f"objective.train_batch_size={args.batch_size}"]
        own += [f"objective.learning_rate={args.learning_rate}", f"objective.warmup_steps={self.warmup_steps}"]
        own += [] if args.text is None else [f"dataset.path={args.text}"]
        line = ["search", f"operator={self.operator}", f"experiment={self.experiment}", *own, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "lcsc", *line], env=environment, stdout=subprocess.DEVNULL, check=True)
        return run


def config_of(folder: Path) -> dict[str, Any]:
    """`{"class", "config"}` of a folder."""
    from lcsc.bank import CheckpointBank

    return dict(CheckpointBank.open(folder, storage="streamed").arch)


def recipe_of(folder: Path) -> dict[str, Any]:
    """Recipe in the header of a folder's weights."""
    from lcsc.export.weights import read_recipe

    return dict(read_recipe(folder))


def parameters_of(arch: Mapping[str, Any]) -> int:
    """Numbers of a network, tied ones once."""
    from lcsc.models.network import build_network

    return sum(parameter.numel() for parameter in build_network(arch).parameters())


def flops_per_token(arch: Mapping[str, Any], block_length: int) -> int:
    """Of a training step on blocks, by the experts that a token meets; see `lcsc.models.flops`."""
    from lcsc.models.flops import training_flops
    from lcsc.models.network import build_network

    return training_flops(build_network(arch), 1, block_length)

"""Orthogonal growth against a mixture from scratch, at equal added compute, from three bases of one training.

    python benchmarks/recycling_growth.py --seeds 0 1 2 --to benchmarks/results/recycling_growth.json

A Mixtral of bytes is trained first; its checkpoints after a quarter, a half and all of the steps are the bases (the
sunk cost). Every arm then trains as many further steps on the same windows with a new optimizer: grown models, the
base itself, and the same larger mixture from scratch. The base goes on to as many floating-point operations as its
deeper child took. The two ways to deepen are compared in the first steps from a base that was trained on. Losses are
nats a byte on the text's report half. What lies in `--folder` is gone on with; the results file is written after every
seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, circumstances, mean_se

BLOCK, BATCH = 64, 8
#: growth of every base, by its settings; `depth` and `width` have a model from scratch beside them
GROWTHS: dict[str, dict[str, Any]] = {
    "depth": {"axis": "depth", "copies": 2, "method": "interposition"},
    "width": {"axis": "width", "noise": 0.01, "scale_top_k": True},
}
#: of the last base alone
LAST: dict[str, dict[str, Any]] = {
    "stack": {"axis": "depth", "copies": 2, "method": "stack"},
    "zeroed": {"axis": "depth", "copies": 2, "method": "interposition", "copy_scale": 0.0},
    "no noise": {"axis": "width", "noise": 0.0, "scale_top_k": True},
    "top-k kept": {"axis": "width", "noise": 0.01, "scale_top_k": False},
}
#: of a base that was trained on: both methods with as many copies, and with the first and last layer once
ONCE = {"keep_first": 1, "keep_last": 1}
COPIES: dict[str, dict[str, Any]] = {"x2": {"copies": 2}, "x4": {"copies": 4}, "x2, edges once": {"copies": 2, **ONCE}}
METHODS = ("interposition", "stack")
#: steps after which arms of the last base are measured, as far as they go; the others at their end
MARKS = (10, 25, 50)


class Runs:
    """The trainings of one seed, each a bank in a folder of its own."""

    def __init__(self, args: argparse.Namespace, seed: int, folder: Path) -> None:
        from lcsc.core.registry import build

        self.args, self.seed, self.folder = args, seed, folder / f"seed-{seed}"
        self.dataset = build("dataset", "text", **({} if args.text is None else {"path": str(args.text)}))
        self.objective = build("objective", "language_modeling", dataset=self.dataset, block_length=BLOCK)
        path = self.folder / "losses.json"
        self._losses_path, self._losses = path, json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def arch(self) -> dict[str, Any]:
        """The network of the experiment `growth_small`, with as many layers as asked for."""
        arch = yaml.safe_load((ROOT / "conf" / "network" / "mixtral_tiny.yaml").read_text())
        return {**arch, "config": {**arch["config"], "num_hidden_layers": self.args.num_layers}}

    def train(self, name: str, arch: Mapping[str, Any], steps: int, every: int, start: Path | None = None) -> Path:
        """A bank of so many steps; arms that go on see other windows than the base, all the same ones."""
        from lcsc.core.registry import build

        trainer = build(
            "trainer",
            "causal_lm",
            num_steps=steps,
            batch_size=BATCH,
            block_length=BLOCK,
            learning_rate=self.args.learning_rate,
            schedule="constant_with_warmup",
            warmup_steps=0 if name == "base" else self.args.warmup_steps,
            save_every=every,
            start=None if start is None else str(start),
        )
        seed = self.seed if name == "base" else 1000 + self.seed
        out = self.folder / name.replace(" ", "-").replace(",", "")
        return trainer.train(arch=arch, model=None, dataset=self.dataset, out=out, seed=seed, progress=False)

    def grow(self, name: str, step: int, settings: Mapping[str, Any], base: str = "base") -> Path:
        """The operator's folder for the base after so many steps."""
        from lcsc.bank import CheckpointBank
        from lcsc.core.registry import build
        from lcsc.export.transform import transform_model

        to = self.folder / f"start-{name.replace(' ', '-').replace(',', '')}"
        if not to.exists():
            bank = CheckpointBank.open(self.folder / base, storage="streamed")
            transform_model(bank, build("operator", "orthogonal_growth", step=step, seed=self.seed, **settings), to)
        return to

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
            score = self.objective(candidate, seed=0, purpose=Purpose.REPORT, images=images)
            self._losses[key] = score.value
            self._losses_path.write_text(json.dumps(self._losses, indent=1))
        return self._losses[key]

    def arm(self, name: str, start: Path, steps: int, every: int, marks: Sequence[int]) -> dict[str, float]:
        """Train from a folder; losses at the start and at the marks."""
        bank = self.train(name, config_of(start), steps, every, start)
        return {"0": self.loss(start)} | {str(mark): self.loss(bank / f"checkpoint-{mark:06d}") for mark in marks}

    def search(self) -> Path:
        """The run of the experiment that chooses which layers of the last base to copy."""
        run = self.folder / "search"
        words = ["search", "operator=orthogonal_growth", "experiment=growth_small", "quiet=true", *self.args.search]
        words += [f"seed={self.seed}", f"bank.path={self.folder / 'base'}", f"run_dir={run}"]
        words += [
            f"operator.num_layers={3 * self.args.num_layers // 2}",
            "operator.method=interposition",
            "operator.copy_scale=1",
        ]
        if self.args.text is not None:
            words += [f"dataset.path={self.args.text}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "lcsc", *words], env=environment, stdout=subprocess.DEVNULL, check=True)
        return run


def config_of(folder: Path) -> dict[str, Any]:
    """`{"class", "config"}` of a folder."""
    from lcsc.bank import CheckpointBank

    return dict(CheckpointBank.open(folder, storage="streamed").arch)


def flops_per_token(arch: Mapping[str, Any]) -> int:
    """Of a training step on blocks, by the experts that a token meets; see `lcsc.models.flops`."""
    from lcsc.models.flops import training_flops
    from lcsc.models.network import build_network

    return training_flops(build_network(arch), 1, BLOCK)


def measure(runs: Runs) -> dict[str, Any]:
    """All arms of one seed."""
    args, added = runs.args, runs.args.added
    points = [args.steps // 4, args.steps // 2, args.steps]
    base = runs.train("base", runs.arch, args.steps, args.steps // 4)
    flops = {"base": flops_per_token(runs.arch)}
    losses: dict[str, dict[str, float]] = {}
    for point in points:
        start = base / f"checkpoint-{point:06d}"
        last = point == points[-1]
        for growth, settings in GROWTHS.items():
            name = f"{growth} from {point}"
            grown = runs.grow(name, point, settings)
            flops[growth] = flops_per_token(config_of(grown))
            every, marks = (5, (*MARKS, added)) if last else (added, (added,))
            losses[name] = runs.arm(name, grown, added, every, marks)
        same = round(added * flops["depth"] / flops["base"] / 25) * 25
        steps = same if last else added
        marks = (*(MARKS if last else ()), added, *((same,) if last else ()))
        losses[f"base from {point}"] = runs.arm(f"continued from {point}", start, steps, 5 if last else added, marks)
    for growth in GROWTHS:
        arch = config_of(runs.folder / f"start-{growth}-from-{points[-1]}")
        bank = runs.train(f"{growth} from scratch", arch, added, added)
        losses[f"{growth} from scratch"] = {str(added): runs.loss(bank / f"checkpoint-{added:06d}")}
    for name in args.arms:
        steps = max(MARKS) if name == "zeroed" else added
        marks = tuple(sorted({*MARKS, steps}))
        losses[name] = runs.arm(name, runs.grow(name, points[-1], LAST[name]), steps, 5, marks)
    longer = args.converged - args.steps
    bank = runs.train("converged", runs.arch, longer, longer, base / f"checkpoint-{args.steps:06d}")
    losses["converged"] = {"0": runs.loss(bank / f"checkpoint-{longer:06d}")}
    for name, copies in COPIES.items():
        for method in METHODS:
            own = f"converged {method} {name}"
            start = runs.grow(own, longer, {"axis": "depth", "method": method, **copies}, "converged")
            losses[own] = runs.arm(own, start, max(MARKS), 5, MARKS)
    return {
        "seed": runs.seed,
        "points": points,
        "losses": losses,
        "flops_per_token": flops,
        "base_steps_at_equal_flops": {"exact": added * flops["depth"] / flops["base"], "measured": same},
        "norms": norms_of(runs.folder / f"start-depth-from-{points[-1]}"),
        "norms_converged": norms_of(runs.folder / "start-converged-stack-x2"),
        **({"searched": searched(runs, points[-1])} if args.with_search else {}),
    }


def searched(runs: Runs, point: int) -> dict[str, Any]:
    """Which half of the layers to copy: the search's choice against the rules, all trained on as the other arms."""
    added, rows = runs.args.added, {}
    L, report = runs.args.num_layers, runs.search()
    found = recipe_of(report / "best")["layers"]
    half = L // 2
    choices = {
        "searched": [found.count(i) for i in range(L)],
        "spread": [2 if i % 2 == 0 else 1 for i in range(L)],
        "first": [2] * half + [1] * (L - half),
        "last": [1] * (L - half) + [2] * half,
    }
    for name, copies in choices.items():
        own = f"half {'-'.join(map(str, copies))}"  # two rules with one choice share a training
        start = runs.grow(own, point, {"axis": "depth", "method": "interposition", "copies": copies})
        rows[name] = {"copies": copies, "losses": runs.arm(own, start, added, added, (added,))}
    return rows


def norms_of(folder: Path) -> list[float]:
    """Norm of the experts of each layer of a base, by what was grown of it."""
    return [fact["norm"] for fact in recipe_of(folder)["pieces"]]


def recipe_of(folder: Path) -> dict[str, Any]:
    """Recipe in the header of a folder's weights."""
    from lcsc.export.weights import read_recipe

    return dict(read_recipe(folder))


def summary(rows: list[dict[str, Any]], added: int) -> dict[str, Any]:
    """Means over seeds of losses, and of differences on the same seed."""
    first, points, end = rows[0], rows[0]["points"], str(added)
    table = {
        arm: {mark: mean_se([row["losses"][arm][mark] for row in rows]) for mark in marks}
        for arm, marks in first["losses"].items()
    }

    def less(a: tuple[str, str], b: tuple[str, str]) -> dict[str, Any]:
        """Arm a less arm b, each with its mark."""
        each = [row["losses"][a[0]][a[1]] - row["losses"][b[0]][b[1]] for row in rows]
        return {**mean_se(each), "each": each}

    against: dict[str, Any] = {}
    for growth in GROWTHS:
        for point in points:
            here = (f"{growth} from {point}", end)
            against[f"{growth} from {point} - scratch"] = less(here, (f"{growth} from scratch", end))
            against[f"{growth} from {point} - base continued, equal steps"] = less(here, (f"base from {point}", end))
        for early, late in itertools.pairwise(points):
            against[f"{growth}: from {late} - from {early}"] = less(
                (f"{growth} from {late}", end), (f"{growth} from {early}", end)
            )
    same = str(first["base_steps_at_equal_flops"]["measured"])
    grown, base = f"depth from {points[-1]}", f"base from {points[-1]}"
    against["depth - base continued, equal FLOPs, last base"] = less((grown, end), (base, same))
    pairs = {f"converged {name}": [f"converged {method} {name}" for method in METHODS] for name in COPIES}
    if "stack" in first["losses"]:
        pairs = {f"from {points[-1]} x2": [grown, "stack"], **pairs}
    for name, (interposed, stacked) in pairs.items():
        for mark in ("0", *map(str, MARKS)):
            against[f"interposition - stack, {name}, after {mark}"] = less((interposed, mark), (stacked, mark))
    if all("searched" in row for row in rows):
        for rule in ("spread", "first", "last"):
            each = [row["searched"]["searched"]["losses"][end] - row["searched"][rule]["losses"][end] for row in rows]
            against[f"searched half - {rule}"] = {**mean_se(each), "each": each}
    return {"loss_nats": table, "differences_nats": against}


def draw(result: Mapping[str, Any], to: Path) -> None:
    """Losses after the added steps over the sunk steps; the first steps of both methods; norms by depth."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lcsc"
    from matplotlib import pyplot as plt

    table, points, end = result["loss_nats"], result["runs"][0]["points"], str(result["added_steps"])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3))
    for growth, label in (("depth", "deeper"), ("width", "wider"), ("base", "base continued")):
        rows = [table[f"{growth} from {point}"][end] for point in points]
        left.errorbar(points, [r["mean"] for r in rows], [r["se"] or 0 for r in rows], marker="o", ms=3, label=label)
    for growth, style in (("depth", "--"), ("width", ":")):
        value = table[f"{growth} from scratch"][end]["mean"]
        left.axhline(value, color="0.5", ls=style, label=f"{growth} from scratch")
    left.set(xlabel="sunk steps", ylabel=f"loss after {end} more, nats a byte")
    left.legend(frameon=False, fontsize=7)
    for name in COPIES:
        for method, style in zip(METHODS, ("-", "--"), strict=True):
            rows = [table[f"converged {method} {name}"][mark] for mark in ("0", *map(str, MARKS))]
            means, errors = [r["mean"] for r in rows], [r["se"] or 0 for r in rows]
            middle.errorbar((0, *MARKS), means, errors, ls=style, marker="o", ms=3, label=f"{method} {name}")
    middle.set(xlabel="steps after growth", ylabel="held-out loss")
    middle.legend(frameon=False, fontsize=7)
    for row in result["runs"]:
        right.plot(row["norms_converged"], marker="o", ms=3, label=f"seed {row['seed']}")
    right.set(xlabel="layer of the base that was trained on", ylabel="norm of the experts")
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    """Measure, then write the results file after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", type=Path, help="a text file; without it the text of dataset=text")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1200, help="of the base; a multiple of 4")
    parser.add_argument("--converged", type=int, default=2400, help="steps of the base that was trained on")
    parser.add_argument("--added", type=int, default=150, help="steps of every arm; a multiple of 25, at least 50")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=5, help="of every arm")
    parser.add_argument("--num-blocks", type=int, default=256, help="of the report half that a loss is measured on")
    parser.add_argument("--arms", nargs="*", default=list(LAST), choices=LAST, help="of the last base")
    parser.add_argument("--with-search", action="store_true", help="also search which half of the layers to copy")
    parser.add_argument("--search", nargs="*", default=[], help="settings of the search")
    parser.add_argument("--folder", type=Path, help="keeps banks and runs, and goes on with what is there")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results" / "recycling_growth.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "recycling_growth.svg")
    args = parser.parse_args()
    if args.text is not None:
        args.text = args.text.resolve()
    with tempfile.TemporaryDirectory() as spare:
        folder, rows = (args.folder or Path(spare)).resolve(), []
        for seed in args.seeds:
            rows.append(measure(Runs(args, seed, folder)))
            names = ("num_layers", "steps", "converged", "learning_rate", "warmup_steps", "num_blocks")
            result = {
                **circumstances(),
                "seeds": [row["seed"] for row in rows],
                "text": "dataset=text" if args.text is None else args.text.name,
                **{key: getattr(args, key) for key in names},
                "batch_tokens": BLOCK * BATCH,
                "added_steps": args.added,
                "settings": {**GROWTHS, **{name: LAST[name] for name in args.arms}, "converged": COPIES},
            }
            result |= {**summary(rows, args.added), "runs": rows}
            args.to.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(result["differences_nats"], indent=2), flush=True)
        draw(result, args.figure)


if __name__ == "__main__":
    main()

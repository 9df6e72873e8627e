"""Sparse upcycling against training the dense model on and against a mixture from scratch, at equal added compute.

    python benchmarks/recycling_upcycling.py --seeds 0 1 2 --text FILE --to benchmarks/results/recycling_upcycling.json

A dense Qwen3 of bytes is trained first (the sunk cost). Every arm then trains half as many steps on the same windows
with a new optimizer: the dense model itself, its mixtures, and the same mixture from scratch. The dense arm goes on to
as many floating-point operations as the largest mixture took. Losses are nats a byte on the text's report half. What
lies in `--folder` is gone on with; the results file is written after every seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, circumstances, mean_se

BLOCK, BATCH, EXPERTS, TOP_K = 64, 16, 4, 2
#: arm -> settings of the operator; those of `SEARCHES` take the layers that their search found
MIXTURES: dict[str, dict[str, Any]] = {
    "all": {"layers": "all"},
    "alternate": {"layers": "alternate"},
    "last_half": {"layers": "last_half"},
    "searched": {},
    "searched_any": {},
    "slices": {"layers": "all", "groups": 2, "num_experts": 2 * EXPERTS},
    "drop": {"layers": "all", "drop": 0.5},
}


def dense_arch() -> dict[str, Any]:
    """The network of the experiment `upcycling_small`."""
    return yaml.safe_load((ROOT / "conf" / "network" / "qwen3_tiny.yaml").read_text())


#: arm -> settings of its search: of the experiment with more of everything; and of any number of layers, scored behind
#: as many steps as the arms take
SEARCHES = {
    "searched": ["objective.num_steps=75", "search.num_trials=24", "search.num_images=384"],
    "searched_any": [
        "operator.num_sparse=null",
        "objective.num_steps=375",
        "search.num_trials=8",
        "search.num_images=384",
    ],
}
RULES = ("all", "alternate", "last_half")


class Runs:
    """The trainings of one seed, each a bank in a folder of its own."""

    def __init__(self, args: argparse.Namespace, seed: int, folder: Path) -> None:
        from lcsc.core.registry import build

        self.args, self.seed, self.folder = args, seed, folder / f"seed-{seed}"
        self.dataset = build("dataset", "text", **({} if args.text is None else {"path": str(args.text)}))
        self.objective = build("objective", "language_modeling", dataset=self.dataset, block_length=BLOCK)

    def train(self, name: str, arch: Mapping[str, Any], steps: int, start: Path | None = None) -> Path:
        """A bank of so many steps, saved every so often; arms that go on see other windows than the base."""
        from lcsc.core.registry import build

        trainer = build(
            "trainer",
            "causal_lm",
            num_steps=steps,
            batch_size=BATCH,
            learning_rate=self.args.learning_rate,
            block_length=BLOCK,
            save_every=self.args.save_every,
            start=None if start is None else str(start),
        )
        seed = self.seed if name == "base" else 1000 + self.seed
        out = self.folder / name
        return trainer.train(arch=arch, model=None, dataset=self.dataset, out=out, seed=seed, progress=False)

    def upcycle(self, name: str, settings: Mapping[str, Any]) -> Path:
        """The operator's folder for the base's last checkpoint."""
        from lcsc.bank import CheckpointBank
        from lcsc.core.registry import build
        from lcsc.export.transform import transform_model

        to = self.folder / f"start-{name}"
        if not to.exists():
            how = {"num_experts": EXPERTS, "top_k": TOP_K, "seed": self.seed, **settings}
            bank = CheckpointBank.open(self.folder / "base", storage="streamed")
            transform_model(bank, build("operator", "sparse_upcycling", **how), to)
        return to

    def loss(self, folder: Path) -> float:
        """Mean loss of the network in a folder on blocks of the report half."""
        from lcsc.bank import CheckpointBank
        from lcsc.core.seeds import Purpose
        from lcsc.operators.base import Candidate

        bank = CheckpointBank.open(folder)
        row = bank.matrix()[-1]
        candidate = Candidate(bank.arch, bank.layout, lambda out: out.copy_(row), {}, bank.constants)
        images = range(self.args.num_blocks)
        return self.objective(candidate, seed=0, purpose=Purpose.REPORT, images=images).value

    def search(self, arm: str) -> list[int]:
        """The layers that the search of an arm finds."""
        run = self.folder / arm.replace("searched", "search")
        words = ["search", "operator=sparse_upcycling", "experiment=upcycling_small", "quiet=true"]
        words += [f"seed={self.seed}", f"bank.path={self.folder / 'base'}", f"run_dir={run}"]
        words += [f"operator.num_experts={EXPERTS}", *getattr(self.args, arm)]
        if self.args.text is not None:
            words += [f"dataset.path={self.args.text}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "lcsc", *words], env=environment, stdout=subprocess.DEVNULL, check=True)
        from lcsc.export.weights import read_recipe

        return list(read_recipe(run / "best")["layers"])


def config_of(folder: Path) -> dict[str, Any]:
    """`{"class", "config"}` of a folder."""
    from lcsc.bank import CheckpointBank

    return dict(CheckpointBank.open(folder, storage="streamed").arch)


def flops_per_token(arch: Mapping[str, Any]) -> int:
    """Of a training step on blocks, by the experts that a token meets; see `lcsc.models.flops`."""
    from lcsc.models.flops import training_flops
    from lcsc.models.network import build_network

    return training_flops(build_network(arch), 1, BLOCK)


def at(steps: int, every: int) -> str:
    """Name of the first checkpoint at or after a step."""
    return f"checkpoint-{math.ceil(steps / every) * every:06d}"


def measure(runs: Runs) -> dict[str, Any]:
    """All arms of one seed."""
    args, arch = runs.args, dense_arch()
    added, every = args.steps // 2, args.save_every
    base = runs.train("base", arch, args.steps) / at(args.steps, every)
    marks = sorted({math.ceil(added * share / every) * every for share in (0.2, 0.6, 1.0)})
    losses: dict[str, dict[str, float]] = {"base": {"0": runs.loss(base)}}
    flops: dict[str, float] = {}
    layers: dict[str, list[int]] = {}
    for name in args.arms:
        settings = MIXTURES[name]
        if name in SEARCHES:
            settings = {"layers": runs.search(name)}
        start = runs.upcycle(name, settings)
        own = config_of(start)
        layers[name] = [
            i for i in range(own["config"]["num_hidden_layers"]) if i not in own["config"]["mlp_only_layers"]
        ]
        flops[name] = flops_per_token(own)
        bank = runs.train(name, own, added, start)
        losses[name] = {"0": runs.loss(start)} | {str(m): runs.loss(bank / at(m, every)) for m in marks}
        if name == "all":
            bank = runs.train("scratch", own, added)
            losses["scratch"] = {str(m): runs.loss(bank / at(m, every)) for m in marks}
            flops["scratch"] = flops["all"]
    flops["dense"] = flops_per_token(arch)
    longest = math.ceil(added * max(flops.values()) / flops["dense"] / every) * every
    bank = runs.train("dense", arch, longest, base)
    losses["dense"] = {"0": losses["base"]["0"]} | {str(m): runs.loss(bank / at(m, every)) for m in marks}
    same = {name: added * own / flops["dense"] for name, own in flops.items()}
    nearest = {name: round(steps / every) * every for name, steps in same.items()}
    equal = {name: runs.loss(bank / at(steps, every)) for name, steps in nearest.items() if name != "dense"}
    return {
        "seed": runs.seed,
        "losses": losses,
        "dense_at_equal_flops": equal,
        "dense_steps_at_equal_flops": {name: {"exact": same[name], "measured": nearest[name]} for name in same},
        "flops_per_token": flops,
        "layers": layers,
    }


def summary(rows: list[dict[str, Any]], last: str) -> dict[str, Any]:
    """Means over seeds of losses, and of differences on the same seed."""
    mixtures = [name for name in MIXTURES if name in rows[0]["losses"]]
    arms = ("dense", "scratch", *mixtures)
    table = {
        arm: {mark: mean_se([row["losses"][arm][mark] for row in rows]) for mark in rows[0]["losses"][arm]}
        for arm in arms
    }
    end = {arm: [row["losses"][arm][last] for row in rows] for arm in arms}

    def less(a: list[float], b: list[float]) -> dict[str, float]:
        return mean_se([x - y for x, y in zip(a, b, strict=True)])

    against = {
        **{f"{arm} - dense, equal steps": less(end[arm], end["dense"]) for arm in mixtures},
        **{
            f"{arm} - dense, equal FLOPs": less(end[arm], [row["dense_at_equal_flops"][arm] for row in rows])
            for arm in mixtures
        },
        "all - scratch": less(end["all"], end["scratch"]),
        **{f"{arm} - {rule}": less(end[arm], end[rule]) for arm in SEARCHES if arm in end for rule in RULES},
    }
    started = {arm: max(abs(row["losses"][arm]["0"] - row["losses"]["base"]["0"]) for row in rows) for arm in mixtures}
    return {"loss_nats": table, "differences_nats": against, "largest_change_at_start": started}


def draw(result: Mapping[str, Any], to: Path) -> None:
    """Losses of the arms over the floating-point operations that they added."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lcsc"
    from matplotlib import pyplot as plt

    flops, shown = result["runs"][0]["flops_per_token"], ("dense", "all", "alternate", "searched", "slices")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 1))
    tokens = BLOCK * BATCH
    for arm in (arm for arm in shown if arm in result["loss_nats"]):
        marks = result["loss_nats"][arm]
        x = [int(mark) * tokens * flops[arm] / 1e12 for mark in marks]
        y, se = ([row[key] or 0 for row in marks.values()] for key in ("mean", "se"))
        if arm == "dense":  # and on to as many operations as the largest mixture took
            rows = result["runs"]
            x.append(rows[0]["dense_steps_at_equal_flops"]["all"]["measured"] * tokens * flops[arm] / 1e12)
            more = mean_se([row["dense_at_equal_flops"]["all"] for row in rows])
            y.append(more["mean"])
            se.append(more["se"] or 0)
        left.errorbar(x, y, se, marker="o", ms=3, capsize=2, label=arm)
    left.set(xlabel="added training, 10^12 floating-point operations", ylabel="held-out loss, nats a byte")
    left.legend(frameon=False)
    arms = [name for name in MIXTURES if name in result["loss_nats"]][::-1]
    for kind, shift, color in (("steps", 0.15, "tab:blue"), ("FLOPs", -0.15, "tab:red")):
        rows = [result["differences_nats"][f"{arm} - dense, equal {kind}"] for arm in arms]
        places = [at + shift for at in range(len(arms))]
        errors = [row["se"] or 0 for row in rows]
        right.errorbar([row["mean"] for row in rows], places, xerr=errors, fmt="o", ms=3, color=color, label=kind)
    right.axvline(0, color="0.7", lw=1, zorder=0)
    right.set(xlabel="loss less that of dense, at equal", yticks=range(len(arms)), yticklabels=arms)
    right.legend(frameon=False)
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    """Measure, then write the results file after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", type=Path, help="a text file; without it the text of dataset=text")
    parser.add_argument("--steps", type=int, default=750, help="of the dense model; the arms take half as many")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--num-blocks", type=int, default=512, help="of the report half that a loss is measured on")
    parser.add_argument(
        "--arms", nargs="+", default=list(MIXTURES), choices=MIXTURES, help="`all` has to be among them"
    )
    for arm, words in SEARCHES.items():
        parser.add_argument(f"--{arm}", nargs="*", default=words, help="settings of its search")
    parser.add_argument("--folder", type=Path, help="keeps banks and runs, and goes on with what is there")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results" / "recycling_upcycling.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "recycling_upcycling.svg")
    parser.add_argument("--redraw", action="store_true", help="only the figure, from the results file")
    args = parser.parse_args()
    if args.redraw:
        draw(json.loads(args.to.read_text()), args.figure)
        return
    if args.text is not None:
        args.text = args.text.resolve()
    with tempfile.TemporaryDirectory() as spare:
        folder, rows = (args.folder or Path(spare)).resolve(), []
        for seed in args.seeds:
            rows.append(measure(Runs(args, seed, folder)))
            settings = {key: getattr(args, key) for key in ("steps", "learning_rate", "save_every", "num_blocks")}
            result = {
                **circumstances(),
                "seeds": [row["seed"] for row in rows],
                "text": "dataset=text" if args.text is None else args.text.name,
                **settings,
                "batch_tokens": BLOCK * BATCH,
                "added_steps": math.ceil(args.steps // 2 / args.save_every) * args.save_every,
                "operator": {"num_experts": EXPERTS, "top_k": TOP_K, "router_std": 0.02},
                "search": {arm: getattr(args, arm) for arm in SEARCHES},
            }
            result |= {**summary(rows, str(result["added_steps"])), "runs": rows}
            args.to.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(result["differences_nats"], indent=2), flush=True)
        draw(result, args.figure)


if __name__ == "__main__":
    main()

"""Orthogonal growth against a mixture from scratch, at equal added compute, from three bases of one training.

    python benchmarks/recycling_growth.py --seeds 0 1 2 --to benchmarks/results/recycling_growth.json

A Mixtral of bytes is trained first; its checkpoints after a quarter, a half and all of the steps are the bases (the
sunk cost). Every arm then trains as many further steps on the same windows with a new optimizer: grown models, the
base itself, and the same larger mixture from scratch. The base goes on to as many floating-point operations as its
deeper child took. The two ways to deepen are compared in the first steps from the last base. Noise and the number of
a token's experts are searched as well, each candidate by a training. Losses are nats a byte on the text's report half.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import mean_se
from uptraining import Runs, config_of, flops_per_token, parameters_of, parser, recipe_of, results

#: growth of every base, by its settings; each has a model from scratch beside it
GROWTHS: dict[str, dict[str, Any]] = {
    "depth": {"axis": "depth", "copies": 2, "method": "interposition"},
    "width": {"axis": "width", "noise": 0.01, "scale_top_k": True},
}
#: of the last base alone; the first few are trained for the last of `MARKS` only
SHORT = ("zeroed", "interposition x4", "stack x4")
LAST: dict[str, dict[str, Any]] = {
    "stack": {"axis": "depth", "copies": 2, "method": "stack"},
    "zeroed": {"axis": "depth", "copies": 2, "method": "interposition", "copy_scale": 0.0},
    "interposition x4": {"axis": "depth", "copies": 4, "method": "interposition"},
    "stack x4": {"axis": "depth", "copies": 4, "method": "stack"},
    "no noise": {"axis": "width", "noise": 0.0, "scale_top_k": True},
    "top-k kept": {"axis": "width", "noise": 0.01, "scale_top_k": False},
    "searched width": {"axis": "width"},
}
SEARCH = [
    *("operator.axis=width", "operator.num_layers=null", "operator.copy_scale=1"),
    *("operator.noise=null", "operator.scale_top_k=null"),
]
#: steps after which arms of the last base are measured, beside their last; the others at their end
MARKS = (10, 25, 50)


def searched(runs: Runs) -> dict[str, Any]:
    """Noise and top-k that the search finds, as settings of the operator."""
    args = runs.args
    words = [*SEARCH, f"objective.num_steps={args.steps_searched}", f"search.num_trials={args.trials}"]
    words += [f"search.num_images{half}={args.num_blocks}" for half in ("", "_select", "_report")]
    run = runs.search("search", words)
    old, found = runs.arch["config"], recipe_of(run / "best")
    scaled = found["num_experts_per_tok"] > old["num_experts_per_tok"]
    return {"axis": "width", "noise": found["noise"], "scale_top_k": scaled}


def measure(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """All arms of one seed."""
    places = {"network": "mixtral_tiny", "operator": "orthogonal_growth", "experiment": "growth_small"}
    runs = Runs(args, seed, folder, **places, warmup_steps=args.warmup_steps)
    added, points = args.added, [args.steps // 4, args.steps // 2, args.steps]
    base = runs.train("base", runs.arch, args.steps, args.steps // 4)
    flops, sizes = {"base": flops_per_token(runs.arch, args.block_length)}, {"base": parameters_of(runs.arch)}
    losses: dict[str, dict[str, float]] = {}
    for point in points:
        last = point == points[-1]
        every, marks = (5, (*MARKS, added)) if last else (added, (added,))
        for growth, settings in GROWTHS.items():
            name = f"{growth} from {point}"
            grown = runs.change(name, {**settings, "step": point})
            flops[growth] = flops_per_token(config_of(grown), args.block_length)
            sizes[growth] = parameters_of(config_of(grown))
            losses[name] = runs.arm(name, grown, added, every, marks)
        same = round(added * flops["depth"] / flops["base"] / 5) * 5
        steps, own = (same, (*marks, same)) if last else (added, marks)
        start = base / f"checkpoint-{point:06d}"
        losses[f"base from {point}"] = runs.arm(f"continued from {point}", start, steps, every, own)
    for growth in GROWTHS:
        arch = config_of(runs.place(f"start-{growth} from {points[-1]}"))
        bank = runs.train(f"{growth} from scratch", arch, added, added)
        losses[f"{growth} from scratch"] = {str(added): runs.loss(bank / f"checkpoint-{added:06d}")}
    chosen: dict[str, Any] = {}
    for name in args.arms:
        chosen[name] = searched(runs) if name == "searched width" else LAST[name]
        steps = max(MARKS) if name in SHORT else added
        start = runs.change(name, {**chosen[name], "step": points[-1]})
        losses[name] = runs.arm(name, start, steps, 5, tuple(sorted({*MARKS, steps})))
    return {
        "seed": seed,
        "points": points,
        "losses": losses,
        "flops_per_token": flops,
        "parameters": sizes,
        "base_steps_at_equal_flops": {"exact": added * flops["depth"] / flops["base"], "measured": same},
        "norms": [fact["norm"] for fact in recipe_of(runs.place(f"start-depth from {points[-1]}"))["pieces"]],
        "settings": {**GROWTHS, **chosen},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of losses, and of differences on the same seed."""
    first, points = rows[0], rows[0]["points"]
    end = max(first["losses"][f"depth from {points[0]}"], key=int)
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
    pairs = {"x2": (grown, "stack"), "x4": ("interposition x4", "stack x4")}
    for name, (interposed, stacked) in pairs.items():
        for mark in ("0", *map(str, MARKS)) if {interposed, stacked} <= set(first["losses"]) else ():
            against[f"interposition - stack, {name}, after {mark}"] = less((interposed, mark), (stacked, mark))
    wide = f"width from {points[-1]}"
    for one, other in ((wide, "no noise"), (wide, "top-k kept"), ("searched width", wide)):
        if {one, other} <= set(first["losses"]):
            against[f"{one} - {other}"] = less((one, end), (other, end))
    return {"loss_nats": table, "differences_nats": against}


def draw(result: Mapping[str, Any], to: Path) -> None:
    """Losses after the added steps over the sunk steps; the first steps of both methods; norms by depth."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lcsc"
    from matplotlib import pyplot as plt

    table, points, end = result["loss_nats"], result["runs"][0]["points"], str(result["added"])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3))
    for growth, label in (("depth", "deeper"), ("width", "wider"), ("base", "base continued")):
        rows = [table[f"{growth} from {point}"][end] for point in points]
        left.errorbar(points, [r["mean"] for r in rows], [r["se"] or 0 for r in rows], marker="o", ms=3, label=label)
    for growth, style in (("depth", "--"), ("width", ":")):
        value = table[f"{growth} from scratch"][end]["mean"]
        left.axhline(value, color="0.5", ls=style, label=f"{growth} from scratch")
    left.set(xlabel="sunk steps", ylabel=f"loss after {end} more, nats a byte")
    left.legend(frameon=False, fontsize=7)
    pairs = ((f"depth from {points[-1]}", "stack"), ("interposition x4", "stack x4"))
    for times, pair in zip(("x2", "x4"), pairs, strict=True):
        for arm, label, style in zip(pair, ("interposition", "stack"), ("-", "--"), strict=True):
            if arm in table:
                rows = [table[arm][mark] for mark in ("0", *map(str, MARKS))]
                means, errors = [r["mean"] for r in rows], [r["se"] or 0 for r in rows]
                middle.errorbar((0, *MARKS), means, errors, ls=style, marker="o", ms=3, label=f"{label} {times}")
    middle.set(xlabel="steps after growth", ylabel="held-out loss")
    middle.legend(frameon=False, fontsize=7)
    for row in result["runs"]:
        right.plot(row["norms"], marker="o", ms=3, label=f"seed {row['seed']}")
    right.set(xlabel="layer of the last base", ylabel="norm of the experts")
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    """Measure and draw; see `uptraining.results`."""
    sizes = ["hidden_size=128", "num_hidden_layers=6", "tie_word_embeddings=false", "initializer_range=0.05"]
    made = parser(__doc__, "recycling_growth", network=sizes, steps=600, num_blocks=128)
    made.add_argument("--added", type=int, default=50, help="steps of every arm; a multiple of 5, at least 50")
    made.add_argument("--warmup-steps", type=int, default=5, help="of every arm")
    made.add_argument("--arms", nargs="*", default=list(LAST), choices=LAST, help="of the last base")
    made.add_argument("--trials", type=int, default=4, help="of the search")
    made.add_argument("--steps-searched", type=int, default=40, help="that its candidates are trained for")
    results(made.parse_args(), measure, summary, draw)


if __name__ == "__main__":
    main()

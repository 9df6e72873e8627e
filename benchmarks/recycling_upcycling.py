"""Sparse upcycling against training the dense model on and against a mixture from scratch, at equal added compute.

    python benchmarks/recycling_upcycling.py --seeds 0 1 2 --text FILE --to benchmarks/results/recycling_upcycling.json

A dense Qwen3 of bytes is trained first (the sunk cost). Every arm then trains half as many steps on the same windows
with a new optimizer: the dense model itself, its mixtures, and the same mixture from scratch. The dense arm goes on to
as many floating-point operations as the largest mixture took. Two arms are searched, each candidate by a training:
which layers become mixtures, and noise, share of new units and number of experts where all do. Losses are nats a byte
on the text's report half.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import mean_se
from uptraining import Runs, config_of, flops_per_token, parameters_of, parser, recipe_of, results

EXPERTS, TOP_K = 4, 2
#: arm -> settings of the operator; those of `SEARCHES` take what their search found
MIXTURES: dict[str, dict[str, Any]] = {
    "all": {"layers": "all"},
    "alternate": {"layers": "alternate"},
    "last_half": {"layers": "last_half"},
    "searched": {},
    "slices": {"layers": "all", "groups": 2, "num_experts": 2 * EXPERTS},
    "drop": {"layers": "all", "drop": 0.5},
    "searched_start": {"layers": "all"},
}
#: arm -> settings of its search: any number of layers; and how the experts of all layers begin
SEARCHES = {
    "searched": ["operator.num_sparse=null", f"operator.num_experts={EXPERTS}"],
    "searched_start": [
        *("operator.num_sparse=null", "operator.layers=all", "operator.num_experts=null"),
        *("operator.noise=null", "operator.drop=null"),
    ],
}
RULES = ("all", "alternate", "last_half")
#: where the searched start is held to what papers fixed: plain copies, and half of the units anew
STARTS = (("searched_start", "all"), ("searched_start", "drop"), ("drop", "all"))


def searched(runs: Runs, arm: str) -> dict[str, Any]:
    """What the search of an arm finds, as settings of the operator."""
    trials = f"search.num_trials={getattr(runs.args, f'trials_{arm}')}"
    steps = f"objective.num_steps={getattr(runs.args, f'steps_{arm}')}"
    sizes = [f"search.num_images{half}={runs.args.num_blocks}" for half in ("", "_select", "_report")]
    found = recipe_of(runs.search(f"search-{arm}", [*SEARCHES[arm], trials, steps, *sizes]) / "best")
    if arm == "searched":
        return {"layers": list(found["layers"])}
    return {"layers": "all", **{key: found[key] for key in ("num_experts", "noise", "drop")}}


def at(steps: int, every: int) -> str:
    """Name of the first checkpoint at or after a step."""
    return f"checkpoint-{math.ceil(steps / every) * every:06d}"


def measure(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """All arms of one seed."""
    places = {"network": "qwen3_tiny", "operator": "sparse_upcycling", "experiment": "upcycling_small"}
    runs = Runs(args, seed, folder, **places)
    added, every = added_steps(args), args.save_every
    base = runs.train("base", runs.arch, args.steps, args.steps) / at(args.steps, args.steps)
    marks = sorted({math.ceil(added * share / every) * every for share in (0.2, 0.6, 1.0)})
    losses: dict[str, dict[str, float]] = {"base": {"0": runs.loss(base)}}
    flops, sizes = {"dense": flops_per_token(runs.arch, args.block_length)}, {"dense": parameters_of(runs.arch)}
    settings: dict[str, dict[str, Any]] = {}
    for name in args.arms:
        how = MIXTURES[name] if name not in SEARCHES else searched(runs, name)
        settings[name] = {"num_experts": EXPERTS, "top_k": TOP_K, **how}
        start = runs.change(name, settings[name])
        own = config_of(start)
        flops[name], sizes[name] = flops_per_token(own, args.block_length), parameters_of(own)
        twin = next(arm for arm in settings if arm == name or runs.same(f"start-{arm}", f"start-{name}"))
        losses[name] = runs.arm(twin, start, added, every, marks)
        if name == "all":
            bank = runs.train("scratch", own, added, every)
            losses["scratch"] = {str(m): runs.loss(bank / at(m, every)) for m in marks}
            flops["scratch"] = flops["all"]
    longest = math.ceil(added * max(flops.values()) / flops["dense"] / every) * every
    bank = runs.train("dense", runs.arch, longest, every, base)
    losses["dense"] = {"0": losses["base"]["0"]} | {str(m): runs.loss(bank / at(m, every)) for m in marks}
    same = {name: added * own / flops["dense"] for name, own in flops.items()}
    nearest = {name: round(steps / every) * every for name, steps in same.items()}
    equal = {name: runs.loss(bank / at(steps, every)) for name, steps in nearest.items() if name != "dense"}
    return {
        "seed": seed,
        "losses": losses,
        "dense_at_equal_flops": equal,
        "dense_steps_at_equal_flops": {name: {"exact": same[name], "measured": nearest[name]} for name in same},
        "flops_per_token": flops,
        "parameters": sizes,
        "settings": settings,
    }


def added_steps(args: argparse.Namespace) -> int:
    """Of every arm: half of the base's, to the next checkpoint."""
    return math.ceil(args.steps // 2 / args.save_every) * args.save_every


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of losses, and of differences on the same seed."""
    last = max(rows[0]["losses"]["all"], key=int)
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
        **{f"searched - {rule}": less(end["searched"], end[rule]) for rule in RULES if {"searched", rule} <= set(end)},
        **{f"{arm} - {other}": less(end[arm], end[other]) for arm, other in STARTS if {arm, other} <= set(end)},
    }
    started = {arm: max(abs(row["losses"][arm]["0"] - row["losses"]["base"]["0"]) for row in rows) for arm in mixtures}
    found = {"loss_nats": table, "differences_nats": against, "largest_change_at_start": started}
    return {"added_steps": int(last), **found}


def draw(result: Mapping[str, Any], to: Path) -> None:
    """Losses of the arms over the floating-point operations that they added."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lcsc"
    from matplotlib import pyplot as plt

    flops, shown = result["runs"][0]["flops_per_token"], ("dense", "all", "alternate", "searched", "slices")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 1))
    tokens = result["batch_tokens"]
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
    """Measure and draw; see `uptraining.results`."""
    sizes = ["hidden_size=144", "head_dim=36", "intermediate_size=384", "initializer_range=0.05"]
    made = parser(__doc__, "recycling_upcycling", network=sizes, steps=300, num_blocks=192)
    made.add_argument("--save-every", type=int, default=25)
    made.add_argument("--arms", nargs="+", default=list(MIXTURES), choices=MIXTURES, help="`all` among them")
    for arm, trials, steps in (("searched", 2, 50), ("searched_start", 4, 50)):
        made.add_argument(f"--trials-{arm}", type=int, default=trials, help="of its search")
        made.add_argument(f"--steps-{arm}", type=int, default=steps, help="that its candidates are trained for")
    results(made.parse_args(), measure, summary, draw)


if __name__ == "__main__":
    main()

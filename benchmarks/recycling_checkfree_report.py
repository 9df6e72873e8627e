"""What the trainings of `recycling_checkfree.py` say: losses, steps to a loss, wall-clock, targets; and the figure.

python benchmarks/recycling_checkfree_report.py benchmarks/results/recycling_checkfree.json docs/images/checkfree.png
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import mean_se

from lcsc.recycling.failures import (
    PAPER_STEP,
    Parts,
    best_period,
    draw_failures,
    per_step,
    replayed,
    steps_to_reach,
    train_seconds,
)

STEP_SECONDS, STAGES, HOURLY = 91.3, 6, (5, 10, 16)
#: seconds that the paper's table does not tell, assumed: 1 GB a stage at 50 MB/s, and its recovery of about 30 s
PAPER_SAVE, PAPER_RECOVER = 20.0, 30.0
#: the loss to be reached is that of a training without failures after these shares of its steps
SHARES = (0.5, 0.75)
FREQUENCIES = (100, 10)


def counted(values: list[float]) -> dict:
    """Mean over seeds, its standard error, and of how many."""
    return {**mean_se(values), "seeds": len(values)}


def report(args) -> dict:
    """Everything of the results file but its circumstances."""
    runs = {}
    for path in sorted(args.folder.glob("*.json")):
        told = json.loads(path.read_text())
        if "arm" in told:
            runs[told["arm"], told["seed"]] = told
    seeds = [seed for seed in args.seeds if all((arm, seed) in runs for arm in {arm for arm, _ in runs})]
    parts = json.loads(args.parts.read_text())["parts_seconds"] if args.parts.is_file() else None
    repairs = {s: path for s in seeds if (path := args.folder / f"repairs-{s}.json").is_file()}
    repairs = {s: json.loads(path.read_text()) for s, path in repairs.items()}
    size, tokens = runs["none", seeds[0]]["parameters"], args.steps * args.batch_size * args.block_length
    # forward and backward of a training that never goes back; redundancy adds a forward, 2 of 6
    found = {"seeds_done": seeds, "parameters": size, "tokens": tokens, "flops": 6 * size * tokens}
    found |= {"final_loss": finals(runs, seeds), "repair": repaired(repairs), "search": searched(args, seeds)}
    for share in SHARES:
        goal = int(args.steps * share)
        rows = {str(s): to_loss(runs, s, args.steps, goal) for s in seeds}
        table = {"steps": rows, "hours_paper_seconds": hours(rows, paper_parts, seeds, args.steps, goal)}
        if parts:
            table["seconds_measured"] = hours(rows, lambda _: Parts(**parts), seeds, args.steps, goal, unit=1.0)
        found[f"to_loss_of_step_{goal}"] = table
    found["targets"] = targets(found)
    found["curves"] = {f"{arm}-{seed}": run["losses"] for (arm, seed), run in runs.items()}
    return found


def finals(runs: dict, seeds: list[int]) -> dict:
    """Loss after all steps by arm, and what it is above the training without failures."""
    rows = {}
    for arm in dict.fromkeys(arm for arm, _ in runs):
        last = {s: list(runs[arm, s]["losses"].values())[-1] for s in seeds}
        base = {s: list(runs["none", s]["losses"].values())[-1] for s in seeds}
        rows[arm] = {
            "loss": counted(list(last.values())),
            "above_none": counted([last[s] - base[s] for s in seeds]),
            "failures": [len(runs[arm, s]["failures"]) for s in seeds],
        }
    return rows


def repaired(repairs: dict) -> dict:
    """What the loss of each stage adds right after the repair, by rule."""
    rows: dict = {}
    for arm in ("none", "none_swapped"):
        keys = [key for key in next(iter(repairs.values()))[arm] if key != "whole"]
        rows[arm] = {key: counted([told[arm][key] - told[arm]["whole"] for told in repairs.values()]) for key in keys}
    return rows


def searched(args, seeds: list[int]) -> dict:
    """Report losses of the searched weights, the rules', and their differences, by lost stage."""
    rows = {}
    for lost in args.search_stages:
        paths = [args.folder / f"search-{lost}-{s}.json" for s in seeds]
        told = [json.loads(path.read_text())["report"] for path in paths if path.is_file()]
        best = [report["best"]["value"] for report in told]
        rules = {rule: [report["baselines"][rule]["value"] for report in told] for rule in told[0]["baselines"]}
        gains = {rule: counted([v - b for v, b in zip(values, best, strict=True)]) for rule, values in rules.items()}
        rows[str(lost)] = {"searched": counted(best), "gain_over": gains}
    return rows


def crossing(losses: dict, wanted: float) -> float | None:
    """The step at which a loss is reached, between evaluations on a line; None where it is not."""
    before = None
    for step, loss in losses.items():
        if loss <= wanted:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (int(step) - before[0]) * (before[1] - wanted) / (before[1] - loss)
        before = (int(step), loss)
    return None


def to_loss(runs: dict, seed: int, steps: int, goal: int) -> dict:
    """Real steps until the loss that a training without failures has after `goal` steps, by rate and method."""
    base, rows = runs["none", seed]["losses"], {}
    wanted = base[str(goal)]
    for rate in HOURLY:
        horizon = 60 * steps
        dead = draw_failures(per_step(rate / 100, STEP_SECONDS), horizon, STAGES, seed)
        row = {"redundant": goal}
        for method in ("checkfree", "checkfree_plus"):
            row[method] = crossing(runs[f"{method}_{rate}", seed]["losses"], wanted)
        for period in FREQUENCIES:
            row[f"checkpoint_{period}"] = steps_to_reach(goal, dead, horizon, period)
        rows[str(rate)] = row
    return rows


def paper_parts(rate: int) -> Parts:
    """The paper's seconds; recovery is in its mean seconds of an iteration."""
    step = PAPER_STEP["checkfree"][rate]
    return Parts(step, PAPER_STEP["redundant"][rate], PAPER_SAVE, PAPER_RECOVER, 0.0)


def hours(rows: dict, parts_of, seeds: list[int], steps: int, goal: int, unit: float = 3600.0) -> dict:
    """Time to the loss by rate and method, mean over seeds; no mean where a seed did not get there."""
    table: dict = {}
    for rate in HOURLY:
        parts, row = parts_of(rate), {}
        tuned = tuned_period(parts, rate)
        for method in ("checkfree", "checkfree_plus", "redundant", *FREQUENCIES, "tuned"):
            times = [time_to(rows[str(s)][str(rate)], s, method, parts, tuned, rate, steps, goal) for s in seeds]
            name = f"checkpoint_{method}" if isinstance(method, int) else method
            there = [t / unit for t in times if t is not None]
            row[name] = counted(there) if len(there) == len(seeds) else {"mean": None, "reached_by_seeds": len(there)}
        table[str(rate)] = row | {"tuned_period": tuned}
    return table


def tuned_period(parts: Parts, rate: int) -> int:
    """The best period of checkpoints where a step starts over as soon as one of the stages dies in it."""
    q = 1 - (1 - per_step(rate / 100, STEP_SECONDS)) ** STAGES
    return best_period(
        step_seconds=parts.step, save_seconds=parts.save, failure_probability=q, restart_seconds=parts.restart, most=500
    )


def time_to(row: dict, seed: int, method, parts: Parts, tuned: int, rate: int, steps: int, goal: int) -> float | None:
    """Seconds to the loss in one seed."""
    horizon = 60 * steps
    dead = draw_failures(per_step(rate / 100, STEP_SECONDS), horizon, STAGES, seed)
    if method in ("checkfree", "checkfree_plus", "redundant"):
        period, num = None, row[method]
    else:
        period = tuned if method == "tuned" else method
        num = steps_to_reach(goal, dead, horizon, period)
    if num is None:
        return None
    count = sum(failure.step < num for failure in dead)
    return train_seconds(method if period is None else "checkpointing", parts, math.ceil(num), count, period)


def targets(found: dict) -> dict:
    """Each target with its number."""
    losses = {arm: row["loss"]["mean"] for arm, row in found["final_loss"].items()}
    at_16 = {arm: losses[arm] for arm in ("random_16", "copy_16", "average_16", "checkfree_16")}
    first = {arm: found["repair"][arm]["0/checkfree_plus"]["mean"] for arm in ("none", "none_swapped")}
    gains = {lost: row["gain_over"]["checkfree"] for lost, row in found["search"].items()}
    return {
        "random_worst_over_a_run": {"reached": max(at_16, key=at_16.get) == "random_16", "final_losses": at_16},
        "first_stage_at_least_5x_less_with_swaps": {
            "reached": first["none"] >= 5 * first["none_swapped"],
            "added_without": first["none"],
            "added_with": first["none_swapped"],
            "ratio": first["none"] / first["none_swapped"],
        },
        "order_of_figure_2": {
            "paper": "random > copy > average > checkfree",
            "reached": at_16["random_16"] > at_16["copy_16"] > at_16["average_16"] > at_16["checkfree_16"],
            "ours": " > ".join(sorted(at_16, key=at_16.get, reverse=True)),
        },
        "plus_ahead_of_checkfree": {
            str(rate): losses[f"checkfree_{rate}"] - losses[f"checkfree_plus_{rate}"] for rate in HOURLY
        },
        "searched_ahead_of_norms": {"reached": all(gain["mean"] > 0 for gain in gains.values()), "gains": gains},
    }


# ------------------------------------------------------------------------------------------------------ the figure


def progress_curve(losses: dict, dead, steps: int, period: int) -> list[float]:
    """Loss by real step of a training with checkpoints: that of one without failures at the progress made."""
    points = sorted((int(step), loss) for step, loss in losses.items())
    made = replayed(dead, steps, period)
    return [interpolated(points, at) for at in made]


def interpolated(points: list[tuple[int, float]], at: float) -> float:
    """Between evaluations on a line; before the first its own loss."""
    before = points[0]
    for point in points:
        if point[0] >= at:
            span = point[0] - before[0]
            return point[1] if not span else before[1] + (at - before[0]) / span * (point[1] - before[1])
        before = point
    return points[-1][1]


def draw(result: dict, to: Path) -> None:
    """Loss by the paper's hours at three rates, one seed, and the cost of losing each stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, seed = result["settings"]["steps"], result["seeds_done"][0]
    none = result["curves"][f"none-{seed}"]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6))
    for axis, rate in zip(axes, HOURLY, strict=False):
        parts = paper_parts(rate)
        dead = draw_failures(per_step(rate / 100, STEP_SECONDS), steps, STAGES, seed)
        lines = {
            "redundant": (none, parts.redundant_step),
            "CheckFree": (result["curves"][f"checkfree_{rate}-{seed}"], parts.step),
            "CheckFree+": (result["curves"][f"checkfree_plus_{rate}-{seed}"], parts.step),
        }
        for name, (losses, seconds) in lines.items():
            axis.plot([int(t) * seconds / 3600 for t in losses], list(losses.values()), label=name)
        tuned = tuned_period(parts, rate)
        for period, name in ((100, "checkpoints, 100"), (10, "checkpoints, 10"), (tuned, f"tuned, {tuned}")):
            curve = progress_curve(none, dead, steps, period)
            died = [sum(f.step <= t for f in dead) for t in range(steps)]
            hours_at = [train_seconds("checkpointing", parts, t + 1, died[t], period) / 3600 for t in range(0, steps)]
            axis.plot(hours_at, curve, lw=0.9, ls="--", label=name)
        axis.set(title=f"{rate} % failures an hour", xlabel="hours (the paper's seconds)")
        axis.set_ylim(min(none.values()) - 0.05, min(none.values()) + 1.3)
    axes[0].set_ylabel("held-out loss, nats a byte")
    axes[0].legend(fontsize=7)
    for k, (arm, name) in enumerate((("none", "trained in order"), ("none_swapped", "with swapped order"))):
        added = [result["repair"][arm][f"{s}/checkfree_plus"] for s in range(STAGES)]
        axes[3].bar(
            [s + 0.4 * k for s in range(STAGES)],
            [row["mean"] for row in added],
            0.4,
            yerr=[row["se"] or 0 for row in added],
            label=name,
        )
    axes[3].set(title="one stage lost and rebuilt", xlabel="stage", ylabel="added loss", yscale="log")
    axes[3].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(to, dpi=80)


# ------------------------------------------------------------------------------------------------------ the tables

BEGIN, END = "<!-- tables of recycling_checkfree_report.py -->", "<!-- end of tables -->"
METHODS = {
    "checkfree": "CheckFree",
    "checkfree_plus": "CheckFree+",
    "redundant": "redundant computation",
    "checkpoint_100": "checkpoint every 100",
    "checkpoint_10": "checkpoint every 10",
    "tuned": "checkpoint, best period",
}
LOST = ("random", "skip", "copy_previous", "copy_next", "average", "checkfree_plus")


def said(row: dict | None, digits: int = 3) -> str:
    """A mean with its standard error."""
    if row is None:
        return "-"
    if row["mean"] is None:
        return f"{row['reached_by_seeds']} seeds only"
    return f"{row['mean']:.{digits}f}" + ("" if row["se"] is None else f" ± {row['se']:.{digits}f}")


def tables(result: dict) -> str:
    """The page's tables as markdown."""
    lines = ["| training | failures by seed | loss after all steps | above no failures |", "|---|---|---|---|"]
    for arm, row in sorted(result["final_loss"].items(), key=lambda item: item[1]["loss"]["mean"]):
        dead = ", ".join(map(str, row["failures"]))
        lines.append(f"| `{arm}` | {dead} | {said(row['loss'])} | {said(row['above_none'])} |")
    for key in [key for key in result if key.startswith("to_loss_of_step")]:
        for unit, name in (("hours_paper_seconds", "hours, the paper's seconds"), ("seconds_measured", "our seconds")):
            if unit not in result[key]:
                continue
            lines += ["", f"To the loss of a training without failures at step {key.rpartition('_')[2]}, {name}:", ""]
            lines += ["| | 5 % an hour | 10 % | 16 % |", "|---|---|---|---|"]
            rates = [result[key][unit][str(rate)] for rate in HOURLY]
            for method, title in METHODS.items():
                lines.append(f"| {title} | " + " | ".join(said(rate[method], 2) for rate in rates) + " |")
    for arm, name in (("none", "in order"), ("none_swapped", "with swapped orders")):
        lines += ["", f"Loss that one lost stage adds, right after its repair, in a model trained {name}:", ""]
        lines += ["| stage | " + " | ".join(f"`{rule}`" for rule in LOST) + " |", "|---" * (len(LOST) + 1) + "|"]
        rows = result["repair"][arm]
        lines += [f"| {s} | " + " | ".join(said(rows.get(f"{s}/{r}")) for r in LOST) + " |" for s in range(STAGES)]
    lines += ["", "Report loss of rules above that of the searched weights, model trained in order:", ""]
    lines += ["| stage | " + " | ".join(f"`{rule}`" for rule in LOST) + " |", "|---" * (len(LOST) + 1) + "|"]
    for lost, row in result["search"].items():
        lines.append(f"| {lost} | " + " | ".join(said(row["gain_over"].get(rule), 4) for rule in LOST) + " |")
    return "\n".join(lines)


def main() -> None:
    """Draw, and fill the page."""
    result, page = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[3])
    draw(result, Path(sys.argv[2]))
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(result)}\n\n{END}{after}")


if __name__ == "__main__":
    main()

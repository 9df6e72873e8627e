"""One picture for each search benchmark whose results file is there.

    python benchmarks/search_figures.py [--results benchmarks/results] [--to docs/images]

Points are medians over training seeds, bars reach from the smallest to the largest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcsc.core.files import write_bytes
from lcsc.report.style import BLUE, FAINT, GREEN, INK, ORANGE, new_figure, png, styled, subtitle

DESCENTS = ("gradient", "hybrid", "ladder", "lbfgs")
SMALL = "small"
EVOLUTION = "lcsc_evolution"


def plain(ax: Axes, x: str | None = None) -> None:
    """Logarithmic scores written as plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "235" else ""))
    if x is not None:
        ax.set_xlabel(x)
    ax.grid(axis="y")


def bars(ax: Axes, x: float, row: dict, **look: object) -> None:
    """A median with its range."""
    low, high = row["median"] - row["min"], row["max"] - row["median"]
    ax.errorbar(x, row["median"], [[low], [high]], fmt="o", markersize=5, capsize=2.5, linewidth=1.2, **look)


@styled
def efficiency(results: list[dict]) -> Figure:
    """Report score against image-forwards, a panel for each experiment."""
    figure = new_figure(4.8, "What a search costs, and what it finds")
    for place, data in enumerate(results):
        wide = 0.92 / len(results)
        ax = figure.add_axes((0.065 + place * wide, 0.12, wide - 0.055, 0.68))
        ax.set_title(f"{data['experiment']}, {len(data['seeds'])} training seeds", fontsize=10, loc="left")
        plain(ax, "image-forwards of the whole search")
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g} M"))
        ax.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g} M" if f"{x:e}"[0] in "25" else ""))
        best = [min(row["value"] for row in next(iter(runs.values()))["baselines"].values()) for runs in _runs(data)]
        ax.axhline(float(np.median(best)), color=INK, linewidth=1.1, linestyle=":")
        ax.annotate("best tuned baseline", (0.99, np.median(best)), xycoords=("axes fraction", "data"), ha="right",
                    va="bottom", fontsize=8.5, color=INK)  # fmt: skip
        for name, row in data["by_contestant"].items():
            kind = name.rpartition("_")[0] if name.rpartition("_")[2].isdigit() else name
            if kind == "look":  # the same descents; their points would hide others
                continue
            color = BLUE if kind == "gradient" else GREEN if kind in (SMALL, *DESCENTS) else FAINT
            color = ORANGE if kind == EVOLUTION else color
            cost = row["image_forwards"]["median"]
            bars(ax, cost, row["report_score"], color=color)
            if kind in DESCENTS:
                at, look = row["report_score"]["max"], {"xytext": (-4, 4), "rotation": 40}
            elif kind == SMALL:  # below, where no other label is
                at, look = row["report_score"]["min"], {"xytext": (-4, -4), "rotation": -40, "va": "top"}
            else:  # beside the point, towards the middle
                last = cost == max(other["image_forwards"]["median"] for other in data["by_contestant"].values())
                at, look = row["report_score"]["median"], {"xytext": (-7, -3), "ha": "right"}
                look = look if last else {"xytext": (7, -3)}
            ax.annotate(name.replace("_", " "), (cost, at), textcoords="offset points", fontsize=8, color=color, **look)
        ax.margins(y=0.14)
    subtitle(figure, "Fréchet distance on fresh noise and the unseen half of the reference; lower is better")
    return figure


def _runs(data: dict) -> list[dict]:
    return [found for found in data["runs"].values() if found]


@styled
def training_saved(results: list[dict]) -> Figure:
    """Report score of early searches, and the best EMA of the whole training."""
    (data,) = results
    figure = new_figure(4.2, "How early a search equals the best EMA of the whole training")
    names = list(dict.fromkeys(run["experiment"] for run in data["runs"]))
    for place, name in enumerate(names):  # a metric of its own each
        wide = 0.94 / len(names)
        ax = figure.add_axes((0.075 + place * wide, 0.14, wide - 0.04, 0.62))
        ax.set_title(name, fontsize=10, loc="left")
        plain(ax, "training steps so far")
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        runs = [run for run in data["runs"] if run["experiment"] == name]
        for run, color in zip(runs, (BLUE, ORANGE, GREEN, INK), strict=False):
            _saved(ax, run, color)
        ax.legend(frameon=False, fontsize=8.5, loc="upper right")
    subtitle(
        figure,
        "solid: LCSC of runs planned short · dotted: of a long run's start · diamonds: its best EMA · "
        "x: image-forwards saved",
    )
    return figure


def _saved(ax: Axes, run: dict, color: str) -> None:
    """One long run: its best EMA, and the searches of short ones."""
    for way, line in (("planned", "o-"), ("early", "o:")):
        found = run.get(way, {}).get("searches", {})
        ax.plot([int(step) for step in found], [row["value"] for row in found.values()], line, color=color,
                linewidth=1.6 if way == "planned" else 1.0, markersize=5 if way == "planned" else 3)  # fmt: skip
    aim, total, planned = run["best_ema_of_full_run"], run["num_steps"], run.get("planned", {})
    ax.plot([100, total], [aim["value"]] * 2, "--", color=color, linewidth=0.9)
    factor = planned.get("factor_with_search")
    said = f"{factor:.0f}x" if factor and factor > 10 else f"{factor:.1f}x" if factor else "not reached"
    label = f"seed {run['seed']}, {total:,} steps, descents of {run['num_trials']}: {said}"
    ax.plot(total, aim["value"], "D", color=color, markersize=6, label=label)


@styled
def nfe_saved(results: list[dict]) -> Figure:
    """Report score against network evaluations an image."""
    (data,) = results
    figure = new_figure(4.2, "Quality at fewer network evaluations")
    num = len(data["table"])
    for place, (part, table) in enumerate(data["table"].items()):
        ax = figure.add_axes((0.075 + 0.94 * place / num, 0.14, 0.94 / num - 0.08, 0.62))
        ax.set_title(part, fontsize=10, loc="left")
        plain(ax, "network evaluations an image")
        for name, row in table["scores"].items():
            who, at = name.split(", ")
            nfe = int(at.split(" at ")[1].split()[0])
            bars(ax, nfe, row, color=ORANGE if who == "base" else BLUE)
            if row is table["scores"][table["aim"]]:
                ax.axhline(row["median"], color=ORANGE, linewidth=1.1, linestyle="--")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.margins(x=0.1)
    subtitle(figure, "blue: LCSC · orange: the best tuned baseline, the dashed one is to be reached")
    return figure


@styled
def honesty(results: list[dict]) -> Figure:
    """What the best trial promised, against what it keeps on fresh noise."""
    (data,) = results
    figure = new_figure(4.2, "Optimism: how much better a score looks on the seeds that chose it")
    ax = figure.add_axes((0.075, 0.14, 0.9, 0.66))
    ax.set_xscale("log")
    ax.grid(axis="y")
    ax.axhline(0, color=INK, linewidth=0.9)
    ax.set_xticks([row["images_per_coefficient"] for row in data["optimism"]], minor=False)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.minorticks_off()
    looks = {"gradient, fresh noise": BLUE, "gradient, common noise": "#56B4E9", "cma": FAINT, EVOLUTION: ORANGE}
    for shift, (name, color) in enumerate(looks.items()):
        rows = [row for row in data["optimism"] if row["searcher"] == name]
        places = [row["images_per_coefficient"] * 1.03**shift for row in rows]
        for x, row in zip(places, rows, strict=True):
            bars(ax, x, row["optimism_of_noise"], color=color)
        ax.plot(
            places, [row["optimism_of_noise"]["median"] for row in rows], "-", color=color, linewidth=1.4, label=name
        )
    ax.set_xlabel("images a trial for each coefficient")
    ax.set_ylabel("score on fresh noise - score promised")
    ax.legend(frameon=False, fontsize=9)
    held = data["coverage"]["share_of_95_percent_intervals_that_hold"]["report"]
    subtitle(figure, f"reported 95 % intervals held the true score in {100 * held:.1f} % of 200 searches")
    return figure


@styled
def cifar10(results: list[dict]) -> Figure:
    """Report score of the winner and of each family's best baseline, a panel for each experiment."""
    (data,) = results
    figure = new_figure(3.4, f"CIFAR-10 on one {data['gpu']}")
    wide = 0.98 / len(data["runs"])
    for place, (name, run) in enumerate(data["runs"].items()):
        ax = figure.add_axes((0.115 + place * wide, 0.15, wide - 0.14, 0.57))
        ax.set_title(f"{name}, {run['training']['num_checkpoints']} checkpoints", fontsize=10, loc="left")
        scores = {"LCSC": run, **run["baselines"]} if "baselines" in run else {"LCSC": run["report"]["best"]}
        scores |= {who: row for who, row in run.get("report", {}).items() if who != "best"}
        ranked = sorted(scores.items(), key=lambda item: -item[1]["value"])
        for height, (who, row) in enumerate(ranked):
            color = BLUE if who == "LCSC" else ORANGE
            ax.errorbar(row["value"], height, xerr=1.96 * row["se"], fmt="o", markersize=5, capsize=2.5, color=color)
            ax.annotate(f"{row['value']:.2f}", (row["value"], height), xytext=(0, 5), textcoords="offset points",
                        ha="center", fontsize=8.5, color=color)  # fmt: skip
        ax.set_yticks(range(len(ranked)), [who.replace("_", " ") for who, _ in ranked])
        ax.set_ylim(-0.6, len(ranked) - 0.3)
        ax.set_xlim(left=0)
        ax.grid(axis="x")
        if "unfinished" in run:
            ax.set_xlabel("the other baselines were not scored: the time on the machine ended", fontsize=8.5)
    accuracy = f"{100 * data['detector']['held_out_accuracy']:.1f} %"
    short = " · trainings cut short" if data.get("note") else ""
    subtitle(figure, f"Fréchet distance by a CNN of {accuracy} accuracy, bars 95 %{short} · lower is better")
    return figure


@styled
def scaling(results: list[dict]) -> Figure:
    """Idle share against the number of workers, asynchronous and in batches."""
    (data,) = results
    figure = new_figure(4.2, "How long workers wait")
    ax = figure.add_axes((0.075, 0.14, 0.9, 0.66))
    ax.set_xscale("log", base=4)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_ylim(-2, 102)
    ax.grid(axis="y")
    ax.set_xlabel("workers")
    ax.set_ylabel("idle share of their time, %")
    looks = {"asynchronous": BLUE, "batches": ORANGE}
    for size, style in (("as_measured", "o-"), ("times_60", "o--")):
        table = [row for row in data["workers"]["rows"][size] if row["searcher"] == "cma"]
        for policy, color in looks.items():
            rows = [row for row in table if row["policy"] == policy]
            if len(rows) < 2:
                continue
            seconds = rows[0]["mean_evaluation_seconds"]
            label = (
                f"{policy}, evaluations of {seconds:.0f} s" if seconds < 60 else f"{policy}, of {seconds / 60:.0f} min"
            )
            shares = [100 * row["idle_share"]["median"] for row in rows]
            ax.plot([row["workers"] for row in rows], shares, style, color=color, linewidth=1.6, label=label)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    subtitle(figure, "simulated workers, the real driver · 2 % of the evaluations take ten times as long, 1 % are lost")
    return figure


PICTURES = {
    "scaling": (scaling, ["engines"]),
    "search_efficiency": (efficiency, ["search_efficiency_digits", "search_efficiency_mnist16"]),
    "search_training_saved": (training_saved, ["search_training_saved"]),
    "search_nfe_saved": (nfe_saved, ["search_nfe_saved"]),
    "search_honesty": (honesty, ["search_honesty"]),
    "search_cifar10": (cifar10, ["search_cifar10"]),
}


def main() -> None:
    """Draw what has results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    for name, (draw, sources) in PICTURES.items():
        files = [path for source in sources if (path := args.results / f"{source}.json").exists()]
        if files:
            write_bytes(args.to / f"{name}.png", png(draw([json.loads(path.read_text()) for path in files])))
            print(args.to / f"{name}.png")


if __name__ == "__main__":
    main()

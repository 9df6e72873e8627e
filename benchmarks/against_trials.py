"""What a search would have reported after t trials: the README's picture.

    python benchmarks/against_trials.py --run demo/runs/digits-... --to docs/images/report_against_trials.png
    python benchmarks/against_trials.py  # draws again from the results file

Every incumbent (the best trial on the search seeds so far; of a descent, whose trials have noise of their own, every
tenth iterate) is scored on the report seeds and the report half of the reference, which the search never used; so are
the tuned baselines, by the run itself. The numbers go beside the picture's results file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import lcsc
from lcsc.core.seeds import Purpose

EVERY = 10  #: of a descent's iterates that are scored
LABELS = {"last": "last checkpoint", "best_single": "best single checkpoint"}


def incumbents(run: lcsc.open_run) -> list[dict]:
    """Report score and standard error of the best trial so far, at each trial where it changed."""
    problem = lcsc.build_problem(run.info["config"])
    rows, best = [], float("inf")
    for line in (run.path / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] != "trial" or record["value"] is None:
            continue
        better = record["uid"] % EVERY == 0 if "block" in record else record["value"] < best
        if not better:
            continue
        best = record["value"]
        score = problem.objective(
            problem.operator.apply(problem.bank, problem.space().to_point(record["vector"])),
            seed=problem.seed,
            purpose=Purpose.REPORT,
            images=range(problem.budget.num_images_report),
            full=True,
        )
        rows.append({"trial": record["uid"] + 1, "search": best, "report": score.value, "se": score.se})
    return rows


def draw(rows: list[dict], summary: dict, to: Path) -> None:
    """The incumbents' report scores as a staircase with its standard error, the baselines as lines."""
    figure = Figure(figsize=(9, 4.6), dpi=160, layout="constrained")
    ax = figure.subplots()
    trials = [row["trial"] for row in rows] + [summary["num_trials"]]
    report = [row["report"] for row in rows] + [rows[-1]["report"]]
    error = [row["se"] for row in rows] + [rows[-1]["se"]]
    ax.step(trials, report, where="post", color="#0072B2", linewidth=2.2)
    low, high = ([r + sign * e for r, e in zip(report, error, strict=True)] for sign in (-1, 1))
    ax.fill_between(trials, low, high, step="post", color="#0072B2", alpha=0.18, linewidth=0)
    end = summary["num_trials"] * 1.01
    best = summary["report"]["best"]
    ax.errorbar(summary["num_trials"], best["value"], best["se"], fmt="D", color="#0072B2", capsize=3)
    names = [(best["value"], f"LCSC, winner on the select seeds  {best['value']:.0f} ± {best['se']:.0f}", "#0072B2")]
    for who, row in summary["report"]["baselines"].items():
        color = "#D55E00" if "ema" in who else "#777777"
        ax.axhline(row["value"], color=color, linewidth=1.2)
        label = f"{LABELS[who]} ({row['label']})" if who in LABELS else row["label"]
        names.append((row["value"], f"{label}  {row['value']:.0f} ± {row['se']:.0f}", color))
    ax.axhline(summary["floor"], color="black", linewidth=1.2, linestyle=":")
    names.append((summary["floor"], f"real against real  {summary['floor']:.1f}", "black"))
    ax.set_yscale("log")
    ax.set_yticks([5, 10, 20, 50, 100, 200, 500], [5, 10, 20, 50, 100, 200, 500])
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(summary["floor"] / 1.3, 1.8 * max(row["value"] for row in summary["report"]["baselines"].values()))
    bottom, top = ax.get_ylim()
    least = (top / bottom) ** (1 / 26)  # label spacing on the log axis
    place = 0.0
    for value, text, color in sorted(names):
        place = max(value, place * least)
        ax.annotate(
            text, (end, value), (end * 1.03, place), color=color, va="center", fontsize=9, annotation_clip=False
        )
    ax.set_xlim(1, end)
    ax.set_xlabel("number of trials")
    ax.set_ylabel(f"{summary['metric']} on the report seeds (log scale)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{summary['experiment']}, {summary['nfe']} network evaluations an image", loc="left", weight="bold")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to)


def main() -> None:
    """Score, draw and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/images/report_against_trials.png"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/against_trials.json"))
    args = parser.parse_args()
    if args.run is not None:
        run = lcsc.open_run(args.run)
        rows = incumbents(run)
        result = {**circumstances(), "seed": run.info["config"]["seed"], "summary": run.summary, "incumbents": rows}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(result, indent=2) + "\n")
    result = json.loads(args.results.read_text())
    draw(result["incumbents"], result["summary"], args.to)


if __name__ == "__main__":
    main()

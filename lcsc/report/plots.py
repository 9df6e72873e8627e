"""The curves of a run: coefficients, convergence, final scores. Every curve is named where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lcsc.report.style import (
    BLUE,
    FAINT,
    FAMILY_COLORS,
    GROUP_COLORS,
    INK,
    ORANGE,
    circumstances,
    darker,
    empty,
    new_figure,
    short,
    styled,
    subtitle,
)
from lcsc.report.tables import display_label, number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from lcsc.report.run import Run

LEGEND_ROWS = 15  # as many fit beside a plot at full size
LOG_FROM = 5.0  # a wider range of scores gets a logarithmic axis

#: Where a curve ends: height, name, score, colour, whether it is set bold.
End = tuple[float, str, str, str, bool]


@styled
def coefficients(run: Run) -> Figure:
    """Coefficient of each checkpoint against its training step; the best EMA's and the best baseline's as lines.

    Where each layer group has coefficients of its own, a line for each group, and the best EMA's.
    """
    frame = run.coefficients()
    figure = new_figure(4.4, "Coefficient of each checkpoint")
    ax = figure.add_axes((0.08, 0.13, 0.89, 0.62))
    ax.grid(axis="y")
    if frame.empty:
        return empty(figure, ax, "no coefficients to show yet")
    if "group" in frame:
        return _draw_groups(figure, ax, run, frame)
    step, coef = frame["step"].to_numpy(), frame["coef"].to_numpy()
    label, rival = _names(run)
    ax.axhline(0, color=INK, linewidth=0.9)
    ax.vlines(step, 0, coef, color=BLUE, linewidth=1.6, alpha=0.55)
    positive = coef >= 0
    ax.plot(step[positive], coef[positive], "o", color=BLUE, markersize=5.5, label=label)
    if not positive.all():
        ax.plot(step[~positive], coef[~positive], "o", markerfacecolor="white", markeredgecolor=BLUE,
                markeredgewidth=1.5, markersize=5.5, label="negative")  # fmt: skip
    ema = run.tuned("ema")
    if ema is not None:
        ax.plot(step, frame["ema_coef"], "-", color=ORANGE, linewidth=2.0, label=short(ema["label"], 34))
    if frame["baseline_coef"].notna().all() and not frame["baseline_coef"].equals(frame["ema_coef"]):
        ax.plot(step, frame["baseline_coef"], "--", color=FAINT, linewidth=1.3, label=rival)
    ax.set_xlabel("training step of the checkpoint")
    ax.set_ylabel("coefficient")
    ax.margins(x=0.02, y=0.1)
    where = {"loc": "upper right", "bbox_to_anchor": (0.975, 0.835), "borderaxespad": 0.0}
    figure.legend(**where, ncols=4, frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.4)
    subtitle(figure, f"sum {coef.sum():.3f} · {(coef < 0).sum()} of {coef.size} negative · "
                      f"largest {np.abs(coef).max():.2f}")  # fmt: skip
    return figure


def _draw_groups(figure: Figure, ax: Axes, run: Run, frame: DataFrame) -> Figure:
    """A line for each layer group, told apart by colour and dashes, and its name at the right."""
    ax.set_position((0.08, 0.13, 0.685, 0.68))
    ax.axhline(0, color=INK, linewidth=0.9)
    for index, name in enumerate(run.groups):
        part = frame[frame["group"] == name]
        color, dash = GROUP_COLORS[index % len(GROUP_COLORS)], "-" if index < len(GROUP_COLORS) else "--"
        ax.plot(part["step"], part["coef"], dash, color=color, marker="o", markersize=3.2, linewidth=1.6,
                label=short(name, 24))  # fmt: skip
    ema = run.tuned("ema")
    if ema is not None:  # the same in all groups: baselines know no groups
        ax.plot(run.steps, frame["ema_coef"].to_numpy()[: len(run.steps)], ":", color=INK, linewidth=1.8,
                label=short(ema["label"], 24))  # fmt: skip
    ax.set_xlabel("training step of the checkpoint")
    ax.set_ylabel("coefficient")
    ax.margins(x=0.02, y=0.1)
    where = {"loc": "upper left", "bbox_to_anchor": (0.775, 0.825), "borderaxespad": 0.0}
    size = min(9.0, 9.0 * LEGEND_ROWS / (len(run.groups) + 1))
    figure.legend(**where, frameon=False, fontsize=size, handlelength=1.8)
    coef, label = frame["coef"].to_numpy(), _names(run)[0]
    subtitle(figure, f"{label} · {len(run.groups)} layer groups, each with sum 1 · {(coef < 0).sum()} of {coef.size} "
                      f"negative · largest {np.abs(coef).max():.2f}")  # fmt: skip
    return figure


@styled
def convergence(run: Run) -> Figure:
    """Every trial and the best so far; at the right, what became of it on the report seeds.

    Trials of a black-box search share the search seeds; those of a descent have fresh seeds each, and it says so.
    """
    trials, baselines, report = run.trials(), run.baselines(), run.report_table()
    metric = printable(str(run.info["metric"]))
    figure = new_figure(5.2, f"{metric} against number of trials")
    done = not report.empty
    common = run.noise == "search seeds"
    seeds = "dots and lines: search seeds" if common else f"trials: {run.noise} · lines: search seeds"
    seeds += " · band: report seeds ± 1 SE" if done else ""
    subtitle(figure, f"lower is better · {circumstances(run)} · {seeds}")
    ax = figure.add_axes((0.09, 0.115, 0.475 if done else 0.54, 0.745))
    strip = figure.add_axes((0.578, 0.115, 0.058, 0.745), sharey=ax) if done else None
    tuned = baselines[baselines["tuned"]]
    if trials["value"].isna().all() and tuned.empty:
        return empty(figure, ax, "nothing is scored yet")
    total = (run.info["config"].get("search") or {}).get("num_trials") or len(trials)
    right = max(total, len(trials), 1) + 0.5
    ax.set_xlim(0.5 - 0.015 * right, right)
    low, high = _limits(trials, tuned, report, run.floor)
    _score_axis(ax, low, high)
    _draw_trials(ax, trials, high)
    rival = run._best_baseline_family()
    ends = []
    for row in tuned.to_dict("records"):
        color, heavy = FAMILY_COLORS.get(row["family"], FAINT), row["family"] == rival
        ax.axhline(row["value"], color=color, linewidth=2.0 if heavy else 1.1, zorder=2)
        ends.append((row["value"], display_label(row["family"], row["label"]), number(row["value"]), color, heavy))
    if run.floor is not None:
        ax.axhline(run.floor, color=INK, linewidth=1.4, linestyle=":", zorder=2)
    if strip is not None:
        ends = _draw_strip(strip, run, tuned, report)
    elif trials["best_so_far"].notna().any():
        best = trials["best_so_far"].min()
        place = {
            "xytext": (7, -3),
            "textcoords": "offset points",
            "fontsize": 9,
            "color": darker(BLUE),
            "weight": "bold",
        }
        ax.annotate(f"{number(best)} so far", (len(trials), min(best, high)), **place)
    if run.floor is not None:
        ends.append((run.floor, "floor: real vs real", number(run.floor), INK, False))
    _name_ends(figure, strip or ax, ends)
    ax.set_xlabel("trial")
    ax.set_ylabel(f"{metric}{' (log scale)' if high / low > LOG_FROM else ''}")
    return figure


def _draw_trials(ax: Axes, trials: DataFrame, high: float) -> None:
    """Dots, the running minimum, and marks on the upper edge for what does not fit or failed."""
    x, value = np.arange(1, len(trials) + 1), trials["value"].to_numpy()
    inside, above, failed = value <= high, value > high, np.isnan(value)
    beyond = inside & ~trials["may_win"].to_numpy()
    for mask, look in ((inside & ~beyond, {"markeredgewidth": 0}), (beyond, {"markerfacecolor": "none"})):
        if mask.any():
            ax.plot(x[mask], value[mask], "o", color=BLUE, markersize=3.6, alpha=0.38, zorder=3, **look)
    if trials["best_so_far"].notna().any():
        line = trials["best_so_far"].clip(upper=high).to_numpy()
        ax.plot([*x, x[-1] + 0.5], [*line, line[-1]], drawstyle="steps-post", color=BLUE, linewidth=2.4, zorder=4)
    edge = {"transform": ax.get_xaxis_transform(), "clip_on": False, "linestyle": "none", "zorder": 5}
    notes = [f"○ {beyond.sum()} beyond the budget"] if beyond.any() else []
    for mask, marker, color, text in ((above, "^", BLUE, "off scale"), (failed, "x", ORANGE, "failed")):
        if mask.any():
            ax.plot(x[mask], np.full(mask.sum(), 0.992), marker=marker, color=color, markersize=4.5, alpha=0.8, **edge)
            notes.append(f"{'▲' if marker == '^' else '×'} {mask.sum()} {text}")
    if notes:
        ax.text(1, 1.012, "   ".join(notes), transform=ax.transAxes, ha="right", va="bottom", fontsize=8.5, color=FAINT)


def _draw_strip(strip: Axes, run: Run, tuned: DataFrame, report: DataFrame) -> list[End]:
    """From the score each finalist had on the search seeds to the one it has on the report seeds."""
    strip.set_xlim(0, 1.25)
    strip.spines[["left", "bottom"]].set_visible(False)
    strip.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False, which="both")
    strip.set_facecolor("#f6f7f9")
    strip.text(0.5, -0.035, "report\nseeds", transform=strip.transAxes, ha="center", va="top", fontsize=9.5, color=INK)
    before = dict(zip(tuned["family"], tuned["value"], strict=True))
    before["best"] = next(
        (r["value"] for r in run._records("trial") if f"trial {r['uid']}" == report["label"].iloc[0]), None
    )
    rival = run._best_baseline_family()
    ends = []
    for row in report.dropna(subset="value").to_dict("records"):
        best = row["who"] == "best"
        color, heavy = BLUE if best else FAMILY_COLORS.get(row["who"], FAINT), best or row["who"] == rival
        start = before.get(row["who"])
        if start is not None:
            strip.plot([0, 1], [start, row["value"]], color=color, linewidth=2.0 if heavy else 1.0, zorder=3 + heavy)
        look = {"fmt": "D" if best else "o", "markersize": 7 if best else 5, "capsize": 4, "linewidth": 1.6}
        error = None if np.isnan(row["se"]) else row["se"]
        strip.errorbar(1, row["value"], yerr=error, color=color, zorder=5 + best, **look)
        name = display_label(row["who"], row["label"])
        ends.append((row["value"], name, number(row["value"], row["se"]), color, heavy))
    if run.floor is not None:
        strip.axhline(run.floor, color=INK, linewidth=1.4, linestyle=":")
    return ends


def _name_ends(figure: Figure, ax: Axes, ends: Sequence[End]) -> None:
    """Write name and score beside the height where each curve ends, moved apart so that none covers another."""
    box = ax.get_position()
    to_figure = ax.transData + figure.transFigure.inverted()
    heights = [float(np.clip(to_figure.transform((1.0, value))[1], box.y0, box.y1)) for value, *_ in ends]
    for (_, name, score, color, heavy), y, at in zip(ends, heights, spread(heights, 0.038, 0.05, 0.865), strict=True):
        style = {"va": "center", "fontsize": 8.2, "color": darker(color), "weight": "bold" if heavy else "normal"}
        figure.add_artist(Line2D([box.x1 + 0.003, box.x1 + 0.02], [y, at], color=color, linewidth=0.9))
        figure.text(box.x1 + 0.024, at, short(name, max(41 - len(score), 12)), **style)
        figure.text(0.985, at, score, ha="right", **style)


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The nearest heights at least `gap` apart, in the same order, inside [low, high] where they fit."""
    order = np.argsort(heights, kind="stable")
    offset = gap * np.arange(len(heights))
    wanted = np.asarray(heights, dtype=float)[order] - offset
    blocks: list[list[float]] = []  # pool adjacent violators: isotonic regression of what is left after the gaps
    for value in wanted:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = np.array([np.mean(block) for block in blocks for _ in block])
    room = max(high - (offset[-1] if len(heights) else 0.0), low)
    placed = np.empty(len(heights))
    placed[order] = np.clip(level, low, room) + offset
    return placed.tolist()


@styled
def scores(run: Run) -> Figure:
    """Final scores with standard errors. Bars start at zero: the length is the score, so the axis stays linear."""
    report = run.report_table().dropna(subset="value")
    metric = printable(str(run.info["metric"]))
    figure = new_figure(1.5 + 0.42 * max(len(report), 2), f"{metric} on the report seeds")
    subtitle(figure, f"lower is better · bars ± 1 standard error · {circumstances(run)}")
    tall = figure.get_figheight()
    ax = figure.add_axes((0.31, 0.55 / tall, 0.535, 1 - 1.3 / tall))
    if report.empty:
        return empty(figure, ax, "the report seeds are not used yet")
    names = [display_label(row["who"], row["label"]) for row in report.to_dict("records")]
    y = np.arange(len(report))[::-1]
    colors = [BLUE if who == "best" else "#b9c0c8" for who in report["who"]]
    ax.barh(y, report["value"], height=0.66, color=colors)
    ax.errorbar(report["value"], y, xerr=report["se"].fillna(0), fmt="none", ecolor=INK, elinewidth=1.3, capsize=3.5)
    ax.set_yticks(y, [short(name, 36) for name in names], fontsize=9.5, color=INK)
    ax.tick_params(axis="y", length=0)
    top = (report["value"] + report["se"].fillna(0)).max()
    for at, row in zip(y, report.to_dict("records"), strict=True):
        end = row["value"] + (0 if np.isnan(row["se"]) else row["se"])
        weight = "bold" if row["who"] == "best" else "normal"
        ax.text(end + 0.012 * top, at, number(row["value"], row["se"]), va="center", fontsize=9.5, weight=weight)
    if run.floor is not None:
        ax.axvline(run.floor, color=INK, linewidth=1.4, linestyle=":")
        label = f" floor {number(run.floor)} (real vs real)"
        ax.text(run.floor, len(report) - 0.45, label, fontsize=8.5, color=FAINT, va="bottom")
    ax.set_ylim(-0.6, len(report) - 0.05)
    ax.set_xlim(0, top * 1.02)
    ax.set_xlabel(metric)
    return figure


def _names(run: Run) -> tuple[str, str]:
    """What the winner and the best baseline are called in a legend."""
    best, rival = run.best or {}, run._best_baseline() or {}
    label = f"LCSC ({best['label']})" if "label" in best else f"best so far (trial {best.get('uid')})"
    who = str(rival.get("family", rival.get("who", "")))
    return short(label, 28), short(display_label(who, rival.get("label", "")), 34)


def _limits(trials: DataFrame, tuned: DataFrame, report: DataFrame, floor: float | None) -> tuple[float, float]:
    """Of the score axis. Baselines and final scores always fit; the worst trials may not."""
    trial_values = trials["value"].dropna()
    fixed = [*tuned["value"].dropna(), *report["value"].dropna(), *([] if floor is None else [floor])]
    worst = trial_values.quantile(0.95)  # NaN when there is no trial
    highs = [*fixed, *([] if trial_values.empty else [min(worst, 3 * max(fixed)) if fixed else worst])]
    lows = [*fixed, *([] if trial_values.empty else [trial_values.min()])]
    low, high = min(lows), max(highs)
    if low > 0 and high / low > LOG_FROM:
        return low / 1.25, high * 1.2
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _score_axis(ax: Axes, low: float, high: float) -> None:
    if low > 0 and high / low > LOG_FROM:
        ax.set_yscale("log")
        wide = high / low > 300
        ax.yaxis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(low, high)
    ax.grid(axis="y")

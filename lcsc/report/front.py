"""Quality against number of network calls (NFE): the winners of one or several runs against the baselines'."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lcsc.report.compare import EVALUATOR, evaluator
from lcsc.report.plots import spread
from lcsc.report.style import BLUE, FAINT, FAMILY_COLORS, INK, darker, empty, new_figure, png, short, styled, subtitle
from lcsc.report.tables import number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from lcsc.report.run import Run

#: `fid_digits@4` is the score at 4 network calls (`lcsc.objectives.quality_nfe`).
AT_NFE = re.compile(r"(.+)@(\d+)")
#: What a line is called; baselines go by their family, without the setting, which differs from NFE to NFE.
NAMES = {
    "last": "last checkpoint",
    "best_single": "best single",
    "ema": "EMA",
    "power_ema": "power EMA",
    "uniform": "uniform mean",
    "wsm": "minus-sqrt mean",
}
THIN = {"fmt": "o-", "linewidth": 1.2, "markersize": 4, "zorder": 4}
JOINT, OWN = "one set for all NFEs", "a set for each NFE"
#: A difference of scores counts from this many of its standard errors on: a twentieth of equal ones differ more.
CLEAR = 2.0
#: Fields of samplers that set the NFE, in which the runs of one front may differ.
NFE_FIELDS = ("num_steps", "sigmas")


@dataclass(frozen=True, eq=False)
class Front:
    """Scores on the report seeds at several NFEs, all by one evaluator, of one bank, searched in one way.

    Args:
        metric: its name, without NFE.
        subject: model, operator, searcher and bank, in words.
        points: one row for each run, candidate and NFE; columns run, coefficients (`JOINT` or `OWN`), who, label, nfe,
            value, se.
        floor: real images against real ones, None where there is none.
    """

    metric: str
    subject: str
    points: DataFrame
    floor: float | None

    def lines(self) -> DataFrame:
        """What is drawn, one row for each line and NFE: coefficients, who, nfe, value, se, num_runs.

        Several runs of one kind at one NFE (seeds, say) are averaged; the standard error is then that among runs. Of a
        baseline family tuned at this NFE and one tuned for all, the better counts.
        """
        import pandas as pd

        rows = []
        for (kind, who, nfe), part in self.points.groupby(["coefficients", "who", "nfe"], sort=False):
            count = len(part)
            se = float(part["value"].std(ddof=1) / math.sqrt(count)) if count > 1 else float(part["se"].iloc[0])
            rows.append((kind, who, int(nfe), float(part["value"].mean()), se, count))
        frame = pd.DataFrame(rows, columns=["coefficients", "who", "nfe", "value", "se", "num_runs"])
        best = frame.sort_values("value", kind="stable").drop_duplicates(["who", "nfe"])
        frame = pd.concat([frame[frame["who"] == "best"], best[best["who"] != "best"]])
        return frame.sort_values(["who", "coefficients", "nfe"], kind="stable", ignore_index=True)

    def sentence(self) -> str:
        """At how many calls the winner is as good as the best baseline at its most; empty when it never is.

        As good is a difference of at least `CLEAR` standard errors; fewer calls, where it is less, are said to be
        within the error. Scores without a standard error are compared as they are.
        """
        lines = self.lines()
        ours, theirs = lines[lines["who"] == "best"], lines[lines["who"] != "best"]
        if ours.empty or theirs.empty:
            return ""
        most = int(theirs["nfe"].max())
        rival = theirs[theirs["nfe"] == most].sort_values("value", kind="stable").iloc[0]
        gain = rival["value"] - ours["value"]
        error = CLEAR * np.hypot(ours["se"].fillna(0.0), np.nan_to_num(rival["se"]))
        good, close = ours.loc[gain >= error, "nfe"], ours.loc[gain.abs() < error, "nfe"]
        whom = f"the best baseline at {most}"
        if good.empty:
            return "" if close.empty else f"LCSC at {close.min()} NFE is within the error of {whom}"
        text = f"LCSC at {good.min()} NFE is at least as good as {whom}"
        return text if close.empty or close.min() > good.min() else f"{text}, at {close.min()} within the error"


def fronts(runs: Iterable[Run]) -> list[Front]:
    """Finished runs as fronts, one for each way of searching and scoring at two NFEs or more, in the order of the runs.

    A run contributes the scores at each NFE where its objective has several (`objective=fid_nfe`), else its score at
    its own NFE. Runs that differ in metric, detector, data set, split or number of report images, or in bank, model,
    operator, searcher or sampler, share no front; number of steps and seed may differ.
    """
    import pandas as pd

    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.finished:
            facts = dict(zip(EVALUATOR, evaluator(run), strict=True)) | {"metric": _metric(run), "nfe": ""}
            groups.setdefault((*facts.values(), *_searched(run)), []).append(run)
    found = []
    for members in groups.values():
        points = pd.DataFrame([row for run in members for row in _points(run)])
        if not points.empty and points["nfe"].nunique() > 1:
            found.append(Front(_metric(members[0]), _subject(members[0]), points, members[0].floor))
    return found


def front_files(runs: Iterable[Run]) -> dict[str, bytes]:
    """front.png and front.csv; front_2.png and so on where there are several evaluators; none where no NFEs differ."""
    files: dict[str, bytes] = {}
    for place, found in enumerate(fronts(runs), start=1):
        name = "front" if place == 1 else f"front_{place}"
        files[f"{name}.png"] = png(draw(found))
        files[f"{name}.csv"] = found.points.to_csv(index=False, lineterminator="\n").encode()
    return files


@styled
def draw(front: Front) -> Figure:
    """Both axes logarithmic; LCSC blue and heavy, a line for each family of baselines, the floor dotted."""
    lines, metric = front.lines(), printable(front.metric)
    figure = new_figure(5.0, f"{metric} against network calls an image")
    bars = f"{'means of runs' if lines['num_runs'].max() > 1 else 'report seeds'} ± 1 standard error"
    above = [front.sentence(), bars] if front.sentence() else [bars]
    subtitle(figure, f"{' · '.join(above)}\n{short(front.subject, 110)}")
    ax = figure.add_axes((0.09, 0.125, 0.54, 0.715))
    values = lines["value"].to_numpy()
    if not (values > 0).all():
        return empty(figure, ax, "a score is not above 0; there is no logarithm to draw")
    ends = []
    for who, kind, part in _series(lines):
        best, hollow = who == "best", kind == JOINT and OWN in set(lines.loc[lines["who"] == "best", "coefficients"])
        color = BLUE if best else FAMILY_COLORS.get(who, FAINT)
        look: dict[str, Any] = {"fmt": "D-", "linewidth": 2.4, "markersize": 6.5, "zorder": 5} if best else THIN
        if best and hollow:
            look = {**look, "fmt": "D--", "markerfacecolor": "white"}
        ax.errorbar(part["nfe"], part["value"], yerr=_errors(part), color=color, capsize=3, **look)
        last = part.iloc[-1]
        name = f"LCSC, {kind}" if best else NAMES.get(who, who)
        ends.append((last["nfe"], last["value"], name, number(last["value"], last["se"]), color, best))
    nfes, floor = sorted(set(lines["nfe"])), front.floor
    if floor is not None and floor > 0:
        ax.axhline(floor, color=INK, linewidth=1.4, linestyle=":")
        ends.append((nfes[-1], floor, "floor: real vs real", number(floor), INK, False))
        values = np.append(values, floor)
    _axes(ax, nfes, values)
    ax.set_xlabel("network calls an image (NFE, log scale)")
    ax.set_ylabel(f"{metric} (log scale, lower is better)")
    _name_ends(figure, ax, ends)
    return figure


def _metric(run: Run) -> str:
    """The metric's name without NFEs."""
    return str(run.info["metric"]).split("@")[0]


def _searched(run: Run) -> tuple[str, ...]:
    """What was searched and how, as text: bank, model, settings of operator, searcher, sampler and budget."""
    prints, config = run.info.get("fingerprints") or {}, run.info["config"]
    parts = [dict(config.get(kind) or {}) for kind in ("operator", "searcher", "sampler")]
    parts[2] = {name: value for name, value in parts[2].items() if name not in NFE_FIELDS}
    texts = [json.dumps(part, sort_keys=True) for part in (*parts, dict(config.get("search") or {}))]
    return (str(prints.get("bank")), str((prints.get("evaluator") or {}).get("model")), *texts)


def _subject(run: Run) -> str:
    """The same for a reader, by names."""
    bank, model, *_ = _searched(run)
    names = [f"{kind} {(run.info['config'].get(kind) or {}).get('name')}" for kind in ("operator", "searcher")]
    return " · ".join([model, *names, f"bank {bank[:12]}"])


def _points(run: Run) -> list[dict[str, Any]]:
    """The final scores of a run, one row for each candidate and NFE."""
    metric, rows = _metric(run), []
    for record in run._records("report"):
        head = {"run": run.path.name, "who": record["who"], "label": record["label"]}
        scores = {AT_NFE.fullmatch(name): score for name, score in (record.get("others") or {}).items()}
        found = [(int(at[2]), score) for at, score in scores.items() if at and at[1] == metric]
        kind = JOINT if found else OWN
        if not found and isinstance(run.info.get("nfe"), int) and record["value"] is not None:
            found = [(run.info["nfe"], record)]
        for nfe, score in found:
            se = math.nan if score.get("se") is None else score["se"]
            rows.append({**head, "coefficients": kind, "nfe": nfe, "value": score["value"], "se": se})
    columns = ("run", "coefficients", "who", "label", "nfe", "value", "se")
    return [{column: row[column] for column in columns} for row in rows]


def _series(lines: DataFrame) -> list[tuple[str, str, DataFrame]]:
    """(who, coefficients, points by rising NFE) of each line; the winner's come first, one for each kind."""
    ours, theirs = lines[lines["who"] == "best"], lines[lines["who"] != "best"]
    found = [("best", str(kind), part) for kind, part in ours.groupby("coefficients", sort=True)]
    found += [(str(who), "", part) for who, part in theirs.groupby("who", sort=False)]
    return [(who, kind, part.sort_values("nfe")) for who, kind, part in found]


def _errors(part: DataFrame) -> np.ndarray:
    """Error bars that a logarithmic axis can show: the lower end stays above 0, shape (2, points)."""
    se = part["se"].fillna(0).to_numpy()
    return np.stack([np.minimum(se, 0.99 * part["value"].to_numpy()), se])


def _axes(ax: Axes, nfes: Sequence[int], values: np.ndarray) -> None:
    """Logarithmic, with a tick at every NFE that was scored and the few numbers that fit at the left."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    room = (nfes[-1] / nfes[0]) ** 0.04
    ax.set_xlim(nfes[0] / room, nfes[-1] * room)
    low, high = float(values.min()), float(values.max())
    margin = max(1.15, (high / low) ** 0.05)
    ax.set_ylim(low / margin, high * margin)
    ax.xaxis.set_major_locator(FixedLocator([float(nfe) for nfe in nfes]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    wide = values.max() / values.min() > 300
    ax.yaxis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="both")


def _name_ends(figure: Figure, ax: Axes, ends: Sequence[tuple[float, float, str, str, str, bool]]) -> None:
    """Write name and score at the right, moved apart, with a thread to the point where each line ends."""
    box = ax.get_position()
    to_figure = ax.transData + figure.transFigure.inverted()
    places = [to_figure.transform((nfe, value)) for nfe, value, *_ in ends]
    heights = spread([float(y) for _, y in places], 0.042, box.y0, 0.9)
    for (_, _, name, score, color, heavy), (x, y), at in zip(ends, places, heights, strict=True):
        style: dict[str, Any] = {
            "va": "center",
            "fontsize": 8.4,
            "color": darker(color),
            "weight": "bold" if heavy else "normal",
        }
        thread = [x, box.x1 + 0.004, box.x1 + 0.022], [y, y, at]
        figure.add_artist(Line2D(*thread, color=color, linewidth=0.8, alpha=0.6))
        figure.text(box.x1 + 0.026, at, short(name, max(42 - len(score), 12)), **style)
        figure.text(0.99, at, score, ha="right", **style)

"""Loss against bytes, of cache or of a coded file: what one run scored, or several found, and what nothing beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lcsc.core.pareto import pareto
from lcsc.report.compare import evaluator
from lcsc.report.style import BLUE, FAINT, GROUP_COLORS, darker, new_figure, png, short, styled, subtitle
from lcsc.report.tables import number, printable

if TYPE_CHECKING:
    from pandas import DataFrame

    from lcsc.report.run import Run


@dataclass(frozen=True)
class Size:
    """Bytes that candidates differ in.

    Args:
        key: of a record, and the column.
        other: of a record's further scores, where it does not have the key.
        choice: what a candidate chose, as a column and as the key of a record.
        name: of the files.
        title, axis: of the picture.
    """

    key: str
    other: str
    choice: tuple[str, str]
    name: str
    title: str
    axis: str


CACHE = Size(
    *("cache_bytes_per_token", "kv_cache_bytes", ("heads", "num_kv_heads"), "cache"),
    *("bytes of cache a token", "bytes of keys and values a token"),
)
FILE = Size(
    *("file_bytes", "file_bytes", ("bits", "bits"), "size"),
    *("bytes of a coded checkpoint", "bytes of a coded checkpoint, anchors included"),
)


def cache_points(runs: Iterable[Run], size: Size = CACHE) -> list[DataFrame]:
    """Candidates whose size is known, one table for each way of scoring; none where all sizes are alike.

    Of one run they are the baselines and the trials on the search seeds, of several the final scores. Columns: run,
    kind, who (the family of a baseline), label, what was chosen (heads of each layer, bits of each group), the size,
    value, se, and pareto: whether nothing is better in one number and as good in the other.
    """
    import pandas as pd

    runs = list(runs)
    kinds = ("baseline", "trial") if len(runs) == 1 else ("report",)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        rows = [row for kind in kinds for record in run._records(kind) if (row := _row(run, kind, record, size))]
        groups.setdefault((*evaluator(run), str((run.info.get("fingerprints") or {}).get("bank"))), []).extend(rows)
    tables = []
    for rows in groups.values():
        frame = pd.DataFrame(rows, columns=_columns(size))
        if frame[size.key].nunique() > 1:
            frame["pareto"] = pareto(frame[size.key].to_numpy(), frame["value"].to_numpy())
            tables.append(frame)
    return tables


def cache_files(runs: Iterable[Run]) -> dict[str, bytes]:
    """cache.png and cache.csv, size.png and size.csv; cache_2.png and so on where several ways of scoring differ.

    None without caches, none without coded files.
    """
    runs, files = list(runs), {}
    for size in (CACHE, FILE):
        for place, frame in enumerate(cache_points(runs, size), start=1):
            name = size.name if place == 1 else f"{size.name}_{place}"
            files[f"{name}.png"] = png(draw(frame, runs, size))
            files[f"{name}.csv"] = frame.to_csv(index=False, lineterminator="\n").encode()
    return files


def _columns(size: Size) -> list[str]:
    return ["run", "kind", "who", "label", size.choice[0], size.key, "value", "se", "pareto"]


@styled
def draw(frame: DataFrame, runs: list[Run], size: Size = CACHE) -> Figure:
    """Dots for what was scored, a step line through what nothing beats, baselines in the colours of their families."""
    metric = printable(str(runs[0].info["metric"]))
    figure = new_figure(4.6, f"{metric} against {size.title}")
    seeds = "search seeds, not final" if len(runs) == 1 else "report seeds ± 1 standard error"
    name = short(runs[0].name, 30) if len(runs) == 1 else f"{len(runs)} runs"
    subtitle(figure, f"lower left is better · {name} · {seeds} · line: what nothing beats in both")
    ax = figure.add_axes((0.09, 0.13, 0.66, 0.715))
    ax.grid(axis="both")
    ours = frame[frame["who"].isin(["", "best"])]
    ax.errorbar(
        ours[size.key],
        ours["value"],
        _errors(ours),
        fmt="o",
        color=BLUE,
        markersize=5,
        alpha=0.7,
        zorder=4,
    )
    families = [who for who in dict.fromkeys(frame["who"]) if who not in ("", "best")]
    handles = [("searched", BLUE)]
    for place, who in enumerate(families):
        part, color = frame[frame["who"] == who], GROUP_COLORS[1 + place % (len(GROUP_COLORS) - 1)]
        ax.errorbar(part[size.key], part["value"], _errors(part), fmt="s", color=color, markersize=5, zorder=3)
        handles.append((printable(who), color))
    best = frame[frame["pareto"]].sort_values(size.key)
    ax.step(best[size.key], best["value"], where="post", color=BLUE, linewidth=1.8, zorder=2)
    for i, (text, color) in enumerate(handles):
        figure.text(0.77, 0.82 - 0.05 * i, f"■ {short(text, 24)}", fontsize=9, color=darker(color))
    _list(figure, best, size, 0.82 - 0.05 * len(handles) - 0.03)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(f"{size.axis} (log scale)")
    ax.set_ylabel(f"{metric} (lower is better)")
    return figure


def _list(figure: Figure, best: DataFrame, size: Size, top: float) -> None:
    """What nothing beats, from a height down: as many rows as there is room for, spread evenly from end to end."""
    room = int((top - 0.08) / 0.042)
    shown = np.unique(np.linspace(0, len(best) - 1, min(room, len(best))).round().astype(int))
    for i, row in enumerate(best.iloc[shown].to_dict("records")):
        text = f"{row[size.key]:,.0f} B  {number(row['value'], row['se'])}  {short(row[size.choice[0]], 14)}"
        figure.text(0.77, top - 0.042 * i, text, fontsize=8, color=FAINT)
    if len(shown) < len(best):
        text = f"{len(shown)} of {len(best)} points of the line"
        figure.text(0.77, top - 0.042 * len(shown), text, fontsize=8, color=FAINT, style="italic")


def _errors(part: DataFrame) -> np.ndarray:
    return np.asarray(part["se"].fillna(0.0), dtype=float)


def _row(run: Run, kind: str, record: Mapping[str, Any], size: Size) -> dict[str, Any] | None:
    """A record as a row; None where it has no score, or nobody knows its size."""
    nbytes = record.get(size.key)
    if nbytes is None:
        nbytes = ((record.get("others") or {}).get(size.other) or {}).get("value")
    if nbytes is None or record["value"] is None:
        return None
    who = {"trial": "", "report": record.get("who"), "baseline": record.get("family")}[kind]
    se = np.nan if record.get("se") is None else record["se"]
    label = record.get("label", f"trial {record.get('uid')}")
    chosen = " ".join(map(str, record.get(size.choice[1]) or ()))
    values = (run.path.name, kind, who, label, chosen, nbytes, record["value"], se, False)
    return dict(zip(_columns(size), values, strict=True))

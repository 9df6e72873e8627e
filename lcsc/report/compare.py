"""Several runs in one table. Runs are ranked only against runs that were scored in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcsc.core.errors import RunError
from lcsc.core.files import write_bytes
from lcsc.report.page import data_uri, render
from lcsc.report.run import Run
from lcsc.report.tables import NOTHING, display_label, html_table, number, text_table

HEAD = (
    "rank",
    "run",
    "searcher",
    "seed",
    "operator",
    "nfe",
    "metric",
    "value",
    "best baseline",
    "ratio",
    "trials",
    "s",
)
NUM_LEFT = 2  # columns of HEAD that hold no number

#: What two runs must share to be ranked, and how a reader is told.
EVALUATOR = (
    *("metric", "detector", "detector_digest", "nfe", "dataset", "data_digest", "split_seed", "num_images_report"),
)


@dataclass(frozen=True)
class Group:
    """Runs that one evaluator scored, best first; or the unfinished ones, in the order given."""

    title: str
    sentence: str
    rows: list[dict[str, Any]]


def compare_runs(paths: Iterable[Path | str], to: Path | str) -> Path:
    """Write comparison.html and comparison.csv into the folder `to`; older ones are replaced.

    Runs at several NFEs also give front.png and front.csv, quality against NFE; runs with caches of several sizes
    cache.png and cache.csv, with coded files size.png and size.csv. The page shows the pictures.

    Returns:
        The path of comparison.html.

    Raises:
        RunError: no path is given, one is no run directory, or one is damaged; nothing is written then.
    """
    import pandas as pd

    from lcsc.report.cache import cache_files
    from lcsc.report.front import front_files, fronts

    paths = list(paths)
    groups = grouped(paths)
    rows = [{"group": index, **row} for index, group in enumerate(groups, start=1) for row in group.rows]
    shown = [{"title": g.title, "sentence": g.sentence, "table": html_table(HEAD, _cells(g), NUM_LEFT)} for g in groups]
    runs = [Run.open(path) for path in paths]
    files = front_files(runs)
    sources = [data_uri(data) for name, data in files.items() if name.endswith(".png")]
    pictures = [
        {"subject": front.subject, "sentence": front.sentence(), "picture": source}
        for front, source in zip(fronts(runs), sources, strict=True)
    ]
    title = "lcsc · comparison of runs"
    caches = cache_files(runs)
    drawn = {
        kind: [data_uri(data) for name, data in caches.items() if name.startswith(kind) and name.endswith(".png")]
        for kind in ("cache", "size")
    }
    page = render(
        "comparison",
        title=title,
        under=_headline(groups),
        groups=shown,
        fronts=pictures,
        caches=drawn["cache"],
        sizes=drawn["size"],
    )
    table = pd.DataFrame(rows).astype({"rank": "Int64"}).to_csv(index=False, lineterminator="\n").encode()
    folder = Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "comparison.csv", table)
    for name, data in {**files, **caches}.items():
        write_bytes(folder / name, data)
    write_bytes(folder / "comparison.html", page)
    return folder / "comparison.html"


def comparison_text(paths: Iterable[Path | str]) -> str:
    """The same for a terminal: one table for each evaluator."""
    groups = grouped(paths)
    blocks = [f"{group.title}\n{group.sentence}\n\n{text_table(HEAD, _cells(group), NUM_LEFT)}" for group in groups]
    return "\n\n".join([_headline(groups), *blocks])


def grouped(paths: Iterable[Path | str]) -> list[Group]:
    """Runs by evaluator, each group ranked by the winner's score on the report seeds; unfinished runs come last.

    Raises:
        RunError: no path is given, one is no run directory, or one is damaged.
    """
    runs = [Run.open(path) for path in paths]
    if not runs:
        raise RunError("there is no run to compare. Give at least one run directory.")
    finished: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.finished:
            finished.setdefault(evaluator(run), []).append(run)
    groups = []
    for key, members in finished.items():
        rows = sorted((_row(run) for run in members), key=lambda row: (row["value"], row["run"]))
        ranked = [{**row, "rank": rank} for rank, row in enumerate(rows, start=1)]
        groups.append(Group(_title(key), "Scored in the same way: ranked by value, lower is better.", ranked))
    waiting = [_row(run) for run in runs if not run.finished]
    if waiting:
        text = "Not ranked: the values are the best so far, not on the report seeds: they flatter."
        groups.append(Group("unfinished", text, waiting))
    return groups


def evaluator(run: Run) -> tuple[str, ...]:
    """The values of `EVALUATOR` for a run, as text; runs with equal ones may be ranked."""
    prints = run.info.get("fingerprints") or {}
    facts = {"detector_digest": prints.get("detector"), **(prints.get("evaluator") or {})}
    facts["metric"], facts["nfe"] = run.info["metric"], run.info.get("nfe")
    images = run.report_table()["num_images"].dropna()
    facts["num_images_report"] = int(images.iloc[0]) if len(images) else None
    return tuple(str(facts.get(name, "")) for name in EVALUATOR)


def _title(key: Sequence[str]) -> str:
    facts = dict(zip(EVALUATOR, key, strict=True))
    detector = f"{facts['detector']} {facts['detector_digest'][:12]}".strip()
    images = facts["num_images_report"]
    parts = [facts["metric"], f"detector {detector}", facts["dataset"], f"{facts['nfe']} NFE"]
    parts.append(f"{int(images):,} report images" if images.isdigit() else "")
    return " · ".join(part for part in parts if part)


def _headline(groups: Sequence[Group]) -> str:
    total = sum(len(group.rows) for group in groups)
    ranked = [group for group in groups if group.title != "unfinished"]
    text = f"{total} run{'s' if total != 1 else ''}"
    if len(ranked) > 1:
        text += (
            f" in {len(ranked)} groups: their metric, detector, reference, NFE or number of report "
            "images differ, so values are ranked inside a group and not across."
        )
    return text


def _row(run: Run) -> dict[str, Any]:
    """One run as plain values; NaN where there is none."""
    config, summary, nan = run.info["config"], run.summary or {}, math.nan
    trials, best = run.trials(), run.best or {}
    report = summary.get("report") or {}
    family = report.get("best_baseline")
    rival = (report.get("baselines") or {}).get(family) or {}
    value = best.get("value")
    return {
        "rank": None,
        "run": run.path.name,
        "name": run.name,
        "searcher": (config.get("searcher") or {}).get("name"),
        "seed": config.get("seed"),
        "operator": (config.get("operator") or {}).get("name"),
        "nfe": run.info.get("nfe"),
        "metric": run.info["metric"],
        "value": nan if value is None else value,
        "se": best.get("se", nan),
        "best_baseline": display_label(family, rival["label"]) if rival else None,
        "best_baseline_value": rival.get("value", nan),
        "best_baseline_se": rival.get("se", nan),
        "ratio": report.get("ratio", nan),
        "trials": len(trials),
        "seconds": summary.get("wall_seconds", trials["seconds"].sum()),
    }


def _cells(group: Group) -> list[list[str]]:
    """A group's rows as text, in the columns of HEAD."""
    cells = []
    for row in group.rows:
        rival = f"{row['best_baseline']}  {number(row['best_baseline_value'], row['best_baseline_se'])}"
        texts = [row["rank"], row["run"], row["searcher"], row["seed"], row["operator"], row["nfe"], row["metric"]]
        texts += [number(row["value"], row["se"]), rival if row["best_baseline"] else None]
        texts += [None if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}", row["trials"], f"{row['seconds']:,.0f}"]
        cells.append([NOTHING if text is None else str(text) for text in texts])
    return cells

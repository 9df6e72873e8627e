"""A read-only view of a run directory; works while the search is still writing it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcsc.core.errors import RunError
from lcsc.report.races import dropped_note
from lcsc.search.frames import Record, may_win, read_records
from lcsc.search.rundir import SCHEMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


#: What a journal line must have, by kind; lines of other kinds are carried along unread.
FIELDS = {
    "floor": ("value",),
    "baseline": ("family", "label", "value", "status"),
    "trial": ("uid", "value", "status"),
    "select": ("label", "value"),
    "report": ("who", "label", "value"),
    "account": ("lines",),
}


@dataclass(frozen=True)
class Run:
    """One search, as its directory tells it. Lower scores are better.

    Every property and method reads the files anew, so a view of a running search is never stale.

    Args:
        path: the run directory.
        info: its run.json: name, config, fingerprints, bank, nfe, metric.
    """

    path: Path
    info: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open a run directory, finished or not.

        Raises:
            RunError: `path` is no run directory, or its run.json cannot be read.
        """
        path = Path(path)
        file = path / "run.json"
        if not file.is_file():
            raise RunError(
                f"`{path}` is no run directory: it has no run.json. Give the folder that `lcsc search` printed."
            )
        info = _read_object(file)
        if info.get("schema") != SCHEMA:
            raise RunError(
                f"`{path}` has schema {info.get('schema')!r}; this lcsc reads {SCHEMA}. Use the lcsc that made it."
            )
        wanted = {"name": str, "metric": str, "config": dict, "bank": dict}
        wrong = [key for key, kind in wanted.items() if not isinstance(info.get(key), kind)]
        if wrong or not isinstance(info["bank"].get("steps"), list):
            names = ", ".join(f"`{key}`" for key in wrong or ["bank.steps"])
            raise RunError(
                f"`{file}` lacks {names}, or its type is wrong. Restore the file from a copy, or start a new run."
            )
        return cls(path, info)

    @property
    def name(self) -> str:
        """Experiment name."""
        return str(self.info["name"])

    @property
    def steps(self) -> tuple[int, ...]:
        """Training step of each of the K checkpoints."""
        return tuple(self.info["bank"]["steps"])

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json; None until the search is finished."""
        file = self.path / "summary.json"
        if not file.is_file():
            return None
        summary = _read_object(file)
        try:
            float(summary["report"]["best"]["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"`{file}` lacks `report.best.value`. Restore the file from a copy.") from error
        return summary

    @property
    def finished(self) -> bool:
        """Whether the search wrote its summary."""
        return (self.path / "summary.json").is_file()

    @property
    def floor(self) -> float | None:
        """Score of real images against real images; None where the metric has none or it is not yet known."""
        return next((record["value"] for record in self._records("floor")), None)

    @property
    def noise(self) -> str:
        """What the trials were scored on: "search seeds", which all share, "fresh seeds" (a descent's), or both."""
        fresh = {record.get("block") is not None for record in self._records("trial")}
        return {(True,): "fresh seeds", (False, True): "search and fresh seeds"}.get(
            tuple(sorted(fresh)), "search seeds"
        )

    @property
    def geometry(self) -> dict[str, Any]:
        """Where the winner lies (`lcsc.search.geometry`); empty until the search is finished, and in old runs."""
        return (self.summary or {}).get("geometry") or {}

    @property
    def account(self) -> tuple[str, ...]:
        """What the searcher says about its way, and which trials a race dropped, in sentences; may be empty."""
        said = tuple(str(line) for record in self._records("account") for line in record["lines"])
        return said + dropped_note(self._records("trial"))

    @property
    def reports(self) -> tuple[Record, ...]:
        """Records of the final scores, the winner's and the tuned baselines'."""
        return tuple(self._records("report"))

    @property
    def vetoed(self) -> tuple[Record, ...]:
        """The finalists that a guard kept from winning, with the reason under `vetoed`."""
        return tuple(record for record in self._records("select") if record.get("vetoed"))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the layer groups where each has coefficients of its own, else empty."""
        best = self.best
        if best is None or not _is_nested(best.get("coef")):
            return ()
        rows = (self.summary or {}).get("coefficients") or []
        named = tuple(dict.fromkeys(str(row["group"]) for row in rows if "group" in row))
        count = len(best["coef"])
        return named if len(named) == count else tuple(f"group {g + 1}" for g in range(count))

    @property
    def best(self) -> Record | None:
        """The winner's report record; of an unfinished run the best trial on the search seeds, None before one."""
        if self.finished:
            winner = [record for record in self._records("report") if record["who"] == "best"]
            return winner[0] if winner else None
        return lowest(self._records("trial"))

    def trials(self) -> DataFrame:
        """Trials in order: uid, value (NaN when failed), best_so_far, status, seconds, images (NaN when not timed).

        A last column, may_win, is False for those beyond a budget; they do not count in best_so_far.

        Raises:
            RunError: the journal is damaged.
        """
        import pandas as pd

        timing = read_timing(self.path / "timing.jsonl")
        rows = [
            (
                *(r["uid"], r["value"], r["status"]),
                *(timing.get(r["seq"], {}).get(key) for key in ("seconds", "images")),
                may_win(r),
            )
            for r in self._records("trial")
        ]
        frame = pd.DataFrame(rows, columns=["uid", "value", "status", "seconds", "images", "may_win"])
        frame = frame.astype({"value": "float64", "seconds": "float64", "images": "float64", "may_win": "bool"})
        frame.insert(2, "best_so_far", frame["value"].where(frame["may_win"]).cummin().ffill())
        return frame

    def baselines(self) -> DataFrame:
        """Everything the search is measured against, on the search seeds: family, label, value, status, tuned.

        `tuned` marks the one that stands for its family (`tuned`).
        """
        import pandas as pd

        records = self._records("baseline")
        tuned = {family: record["label"] for family, record in self._tuned().items()}
        rows = [
            (r["family"], r["label"], r["value"], r["status"], tuned.get(r["family"]) == r["label"]) for r in records
        ]
        frame = pd.DataFrame(rows, columns=["family", "label", "value", "status", "tuned"])
        return frame.astype({"value": "float64", "tuned": "bool"})

    def report_table(self) -> DataFrame:
        """Final scores on the report seeds, the winner first, then the baselines from best to worst.

        Columns: who, label, value, se, ratio (to the best baseline; NaN until the run is finished), num_images, then
        `<metric>` and `<metric>_se` of each further metric.
        """
        import pandas as pd

        records = self._records("report")
        records.sort(key=lambda r: (r["who"] != "best", float("inf") if r["value"] is None else r["value"]))
        rival = (
            next((r["value"] for r in records if r["who"] == self._best_baseline_family()), None)
            if self.finished
            else None
        )
        others = sorted({name for record in records for name in record.get("others") or {}})
        rows = []
        for record in records:
            row = {key: record.get(key) for key in ("who", "label", "value", "se")}
            row["ratio"] = record["value"] / rival if rival and rival > 0 and record["value"] is not None else None
            row["num_images"] = record.get("num_images")
            for name in others:
                other = (record.get("others") or {}).get(name, {})
                row |= {name: other.get("value"), f"{name}_se": other.get("se")}
            rows.append(row)
        extra = [column for name in others for column in (name, f"{name}_se")]
        columns = ["who", "label", "value", "se", "ratio", "num_images", *extra]
        return pd.DataFrame(rows, columns=columns).astype(
            {**dict.fromkeys(columns[2:], "float64"), "num_images": "Int64"}
        )

    def coefficients(self) -> DataFrame:
        """The best candidate's coefficients, the best baseline's and the best EMA's, one row a checkpoint.

        Columns step, coef, baseline_coef, ema_coef. Where each layer group has coefficients of its own there is a row
        for each group and checkpoint, and a first column `group`.

        Empty while there is no trial, and for operators whose candidates are no combination of checkpoints. The best
        baseline is the best on the report seeds; of an unfinished run, on the search seeds. NaN where there is none.

        Raises:
            RunError: a record does not have one coefficient for each checkpoint.
        """
        import pandas as pd

        columns = ["step", "coef", "baseline_coef", "ema_coef"]
        best, rival, ema = self.best, self._best_baseline(), self.tuned("ema")
        if best is None or best.get("coef") is None:
            return pd.DataFrame(columns=columns)
        groups = self.groups
        rows = [self._flat(record, max(len(groups), 1)) for record in (best, rival, ema)]
        steps = [step for _ in groups or (None,) for step in self.steps]
        frame = pd.DataFrame(dict(zip(columns, [steps, *rows], strict=True)))
        if groups:
            frame.insert(0, "group", [name for name in groups for _ in self.steps])
        return frame

    def _flat(self, record: Record | None, num_groups: int) -> list[float]:
        """A record's coefficients group after group, NaN where it has none; one row stands for all groups."""
        coef = (record or {}).get("coef")
        rows = [[float("nan")] * len(self.steps)] if coef is None else coef if _is_nested(coef) else [coef]
        rows = rows * num_groups if len(rows) == 1 else rows
        if wrong := [len(row) for row in rows if len(row) != len(self.steps)]:
            raise RunError(f"a record of `{self.path}` has {wrong[0]} coefficients for {len(self.steps)} checkpoints.")
        if len(rows) != num_groups:
            raise RunError(f"a record of `{self.path}` has {len(rows)} layer groups, the winner has {num_groups}.")
        return [value for row in rows for value in row]

    def directions(self) -> DataFrame:
        """Directions of the search, one a row: direction (from 1), slope or spread, way, flat.

        Where trials have gradients `slope` is a direction's share of the squared slope of the score, steepest first;
        else `spread` is its share of the checkpoints' squared distances from their mean, longest first. `way` is the
        share of the winner's squared distance from the best baseline, NaN where it is that baseline. `flat` marks
        directions along which the score, or the weights, hardly change. Empty until the search is finished.
        """
        import pandas as pd

        slope, bank, way = (self.geometry.get(key) or {} for key in ("slope", "bank", "way"))
        name, share, along = "spread", bank.get("spread") or [], way.get("along")
        if "energy" in slope:
            name, share, along = "slope", slope["energy"], slope.get("along")
        num_flat = slope["num_flat"] if name == "slope" else bank.get("num_short", 0)
        frame = pd.DataFrame({"direction": range(1, len(share) + 1), name: share})
        frame["way"] = float("nan") if along is None else along
        frame["flat"] = frame["direction"] > len(share) - num_flat
        return frame.astype({name: "float64", "way": "float64"})

    def tuned(self, family: str) -> Record | None:
        """The baseline that stands for a family, None when there is none yet.

        The one with a final score; before there is one, the best on the search seeds.
        """
        return self._tuned().get(family)

    def plot_convergence(self) -> Figure:
        """Scores against trials, with the baselines and the final scores."""
        from lcsc.report import plots

        return plots.convergence(self)

    def plot_coefficients(self) -> Figure:
        """Coefficients against training step, with the best baseline's."""
        from lcsc.report import plots

        return plots.coefficients(self)

    def _records(self, kind: str) -> list[Record]:
        return [record for record in read_journal(self.path / "journal.jsonl") if record["kind"] == kind]

    def _tuned(self) -> dict[str, Record]:
        """What stands for each family, in the order in which the families were first scored."""
        records, final = self._records("baseline"), {record["who"]: record for record in self._records("report")}
        families = dict.fromkeys(record["family"] for record in records)
        best = {family: lowest([r for r in records if r["family"] == family]) for family in families}
        return {family: final.get(family, record) for family, record in best.items() if record is not None}

    def _best_baseline_family(self) -> str | None:
        """The family that counts as the best baseline: by the summary, else by search seeds."""
        summary = self.summary
        if summary is not None:
            return (summary.get("report") or {}).get("best_baseline")
        tuned = lowest(self._records("baseline"))
        return tuned["family"] if tuned else None

    def _best_baseline(self) -> Record | None:
        """Its record: the report's in a finished run, else the tuned one on the search seeds."""
        family = self._best_baseline_family()
        if self.finished:
            return next((r for r in self._records("report") if r["who"] == family), None)
        return self.tuned(family or "")


def open_run(path: Path | str) -> Run:
    """A read-only view of a run directory, also while the search writes it.

    Raises:
        RunError: `path` is no run directory, or its run.json cannot be read.
    """
    return Run.open(path)


def read_journal(path: Path) -> list[Record]:
    """All complete records of a journal; an unfinished last line (no newline yet) is left out, no file means none.

    Raises:
        RunError: a complete line is no record; names its number, counted from 0, and its place.
    """
    return read_records(path, _check)[0] if path.is_file() else []


def _check(record: Record) -> None:
    missing = [name for name in FIELDS.get(record["kind"], ()) if name not in record]
    if missing:
        raise ValueError(f"a {record['kind']} record without {', '.join(f'`{name}`' for name in missing)}")
    if not isinstance(record.get("value"), int | float | None):
        raise ValueError(f"`value` is {str(record['value'])[:40]!r}, not a number")
    if "coef" in record and not _is_numbers(record["coef"]):
        raise ValueError("`coef` is not a list of numbers")


def _is_numbers(value: Any) -> bool:
    rows = value if _is_nested(value) else [value]
    return value is None or all(
        isinstance(row, list) and all(isinstance(item, int | float) for item in row) for row in rows
    )


def _is_nested(coef: Any) -> bool:
    """Whether coefficients come in layer groups, (G, K)."""
    return isinstance(coef, list) and bool(coef) and isinstance(coef[0], list)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(
            f"`{file}` cannot be read: {error}. Restore the file from a copy, or start a new run."
        ) from error
    if not isinstance(value, dict):
        raise RunError(
            f"`{file}` holds a {type(value).__name__}; a JSON object is wanted. Restore the file from a copy."
        )
    return value


def read_timing(file: Path) -> dict[int, dict[str, Any]]:
    """Timing by journal sequence number. It only decorates: lines that cannot be read are left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            row = json.loads(line)
            rows[row["seq"]] = row
        except (ValueError, TypeError, KeyError):
            continue
    return rows


def lowest(records: Iterable[Record]) -> Record | None:
    """The lowest of the records that have a value and may win; None where there is none."""
    found = (record for record in records if record["value"] is not None and may_win(record))
    return min(found, key=lambda record: record["value"], default=None)

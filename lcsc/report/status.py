"""How far a run has come, from its directory alone: read while the search writes it, wherever that runs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lcsc.core.errors import RunError
from lcsc.report.run import Run, lowest, read_journal, read_timing
from lcsc.report.tables import display_label, number, printable, result_line
from lcsc.search.frames import Record
from lcsc.search.lock import LEASE, Owner, beat_of
from lcsc.search.plan import num_looks, num_steps

#: Steps that rate, time left and idle share are taken from.
RECENT = 20
#: What the kind of the newest record says of the search.
PHASES = {"floor": "baselines", "baseline": "baselines", "look": "baselines", "trial": "trials", "account": "selection",
          "select": "selection", "report": "final scores"}  # fmt: skip


class Status:
    """Looks at one run; a later look knows which counters have moved since.

    Args:
        run: read-only.
        clock: this process's own, in seconds; no clock of another machine is asked.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self._clock = run, clock
        self._seen: dict[str, tuple[Any, float, bool]] = {}

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say now, each with its name.

        Raises:
            RunError: the journal is damaged.
        """
        run, summary = self.run, self.run.summary
        if summary is not None:
            return [("phase", "finished"), ("result", result_line(summary))]
        records = read_journal(run.path / "journal.jsonl")
        timing = read_timing(run.path / "timing.jsonl")
        recent = [timing[record["seq"]] for record in records if record["seq"] in timing][-RECENT:]
        done, planned = _steps(records, run.info["config"].get("search") or {})
        workers, driver, pace = self._workers(), self._driver(), _pace(recent)
        left = (planned - done) * pace if planned and pace and driver.startswith("process") else None
        rows: list[tuple[str, str | None]] = [
            ("phase", PHASES.get(records[-1]["kind"], "trials") if records else "beginning"),
            ("steps", f"{done} of {planned}" if planned else f"{done}"),
            ("trials", _trials(records, run.info["config"].get("search") or {})),
            ("best so far", _lowest(records, "trial")),
            ("best baseline", _lowest(records, "baseline")),
            ("rate", _rate(pace, recent)),
            ("time left", None if left is None else str(timedelta(seconds=round(left)))),
            ("idle", _idle(recent, pace, len(workers))),
            ("workers", self._crew(workers)),
            ("failures", _failures(records)),
            ("forked from", (run.info.get("parent") or {}).get("run_id")),
            ("driver", driver),
        ]
        return [(name, printable(text)) for name, text in rows if text]

    @property
    def unsure(self) -> bool:
        """Whether the driver is elsewhere and has not been seen to move yet."""
        owner = Owner.read(self.run.path / "lock")
        return owner is not None and owner.alive is None and not self._seen.get("driver", (None, 0.0, False))[2]

    def _driver(self) -> str:
        """Who writes the run, and whether that one lives."""
        lock = self.run.path / "lock"
        owner = Owner.read(lock)
        if owner is None:
            return "none at work; the line that began the search continues it"
        if owner.alive is not None:
            return f"{owner}" if owner.alive else f"gone ({owner}); the line that began the search continues it"
        moved, silent = self._moved("driver", (owner.token, beat_of(lock)))
        if silent >= LEASE:
            return f"silent for {silent:.0f} s ({owner}); the line that began the search continues it"
        return f"{owner}" if moved else f"{owner}, not seen to move yet"

    def _workers(self) -> list[Mapping[str, Any]]:
        return [beat for path in sorted((self.run.path / "work" / "beats").glob("*.json")) if (beat := _read(path))]

    def _crew(self, workers: Sequence[Mapping[str, Any]]) -> str | None:
        """How many workers there are, where, and which of them are silent."""
        if not workers:
            return None
        hosts = Counter(str(worker.get("host")) for worker in workers)
        busy = sum(bool(worker.get("uid")) for worker in workers)
        parts = [f"{len(workers)} ({', '.join(f'{num} on {host}' for host, num in hosts.items())})", f"{busy} busy"]
        for worker in workers:
            who = f"{worker.get('host')}:{worker.get('pid')}"
            if (silent := self._moved(who, worker.get("counter"))[1]) >= LEASE:
                parts.append(f"{who} silent for {silent:.0f} s")
        return ", ".join(parts)

    def _moved(self, who: str, counter: Any) -> tuple[bool, float]:
        """Whether a counter has moved since the first look at it, and for how many seconds it has not."""
        now = self._clock()
        last, at, moved = self._seen.get(who, (counter, now, False))
        if last != counter:
            at, moved = now, True
        self._seen[who] = (counter, at, moved)
        return moved, now - at


def status_text(run: Run, rows: Sequence[tuple[str, str]]) -> str:
    """A run's path and what there is to say of it, a line each."""
    return "\n".join([printable(str(run.path)), *(f"  {name:<14} {text}" for name, text in rows)])


def _steps(records: Sequence[Record], search: Mapping[str, Any]) -> tuple[int, int | None]:
    """Steps done, and planned where the baselines are through."""
    counts = Counter(record["kind"] for record in records)
    done = sum(num for kind, num in counts.items() if kind not in ("floor", "account"))
    trials, finalists = search.get("num_trials"), search.get("num_finalists")
    if not counts["trial"] or not isinstance(trials, int) or not isinstance(finalists, int):
        return done, None
    baselines = [record for record in records if record["kind"] == "baseline"]
    families = {record["family"] for record in baselines if record["value"] is not None}
    looks = num_looks([record for record in baselines if "vector" in record], finalists)
    return done, max(done, num_steps(len(baselines) + counts["look"], trials, finalists, looks, len(families)))


def _trials(records: Sequence[Record], search: Mapping[str, Any]) -> str | None:
    num, inherited = sum(r["kind"] == "trial" for r in records), sum("inherited" in r for r in records)
    if not num:
        return None
    of = f" of {search['num_trials']}" if isinstance(search.get("num_trials"), int) else ""
    return f"{num}{of}{f', {inherited} scores inherited' if inherited else ''}"


def _lowest(records: Sequence[Record], kind: str) -> str | None:
    best = lowest(record for record in records if record["kind"] == kind)
    if best is None:
        return None
    label = f"trial {best['uid']}" if kind == "trial" else display_label(best["family"], best["label"])
    return f"{number(best['value'])} ({label}, on the search seeds)"


def _failures(records: Sequence[Record]) -> str | None:
    causes = Counter(str(record.get("cause") or "invalid") for record in records if record.get("status") == "failed")
    ranked = sorted(causes.items(), key=lambda row: (-row[1], row[0]))
    return ", ".join(f"{num} {cause}" for cause, num in ranked) or None


def _span(recent: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds from the end of the first of these steps to the end of the last, on the driver's clock."""
    try:
        first, last = (datetime.fromisoformat(recent[at]["at"]) for at in (0, -1))
        return max((last - first).total_seconds(), 0.0)
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _pace(recent: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds a step; of steps that ended within a second, which the clock does not divide, what each of them took."""
    span = _span(recent)
    if span is None or len(recent) < 2:
        return None
    return span / (len(recent) - 1) if span >= 2 else sum(row["seconds"] for row in recent) / len(recent)


def _rate(pace: float | None, recent: Sequence[Mapping[str, Any]]) -> str | None:
    if not pace:
        return None
    images = sum(row["images"] for row in recent) / (pace * len(recent))
    return f"{60 / pace:.3g} steps a minute, {images:.3g} images a second"


def _idle(recent: Sequence[Mapping[str, Any]], pace: float | None, num_workers: int) -> str | None:
    """The share of the workers' time that no step accounts for."""
    if not pace or not num_workers or len(recent) < RECENT:
        return None
    busy = sum(row["seconds"] for row in recent) / (pace * len(recent) * num_workers)
    return f"{max(0.0, 1 - busy):.0%} of the workers' time"


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):  # it is being replaced, or is nobody's beat
        return None


def open_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these directories; raises RunError for one that is none."""
    if not paths:
        raise RunError("no run is named. Give the folder that `lcsc search` printed.")
    return [Run.open(path) for path in paths]

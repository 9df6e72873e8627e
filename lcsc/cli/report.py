"""`lcsc report`: draw a run, or compare several."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError, RunError
from lcsc.report.compare import compare_runs, comparison_text
from lcsc.report.html import write_report
from lcsc.report.run import Run
from lcsc.report.tables import report_text, result_line


def main(words: Sequence[str]) -> None:
    """`run=DIR` draws one run; `runs=GLOB [to=DIR]` compares several."""
    settings = parse_words(words, {"run": None, "runs": None, "to": "comparison"})
    if (settings["run"] is None) == (settings["runs"] is None):
        raise ConfigError("give either `run=DIR` to draw one run or `runs=GLOB` to compare several.")
    if settings["run"] is not None:
        run = Run.open(settings["run"])
        page = write_report(run.path)
        print(report_text(run))
        print(result_line(run.summary) if run.summary else "the search is not finished yet")
    else:
        pattern = need(settings, "runs")
        paths = sorted(path.parent for path in map(Path, glob.glob(f"{pattern}/run.json")))
        if not paths:
            raise RunError(f"no run directory matches `{pattern}`. A run directory holds run.json; quote the pattern.")
        page = compare_runs(paths, Path(need(settings, "to")))
        print(comparison_text(paths))
    print(f"report: {page}", flush=True)

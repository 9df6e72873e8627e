"""`lcsc search`: from a bank to a finished, reported and exported run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcsc.cli.train import train
from lcsc.config.hydra_app import run_job
from lcsc.config.schema import SEARCH_SECTIONS
from lcsc.report.html import write_report
from lcsc.report.run import Run
from lcsc.report.tables import report_text, result_line
from lcsc.search.loop import Problem
from lcsc.search.run import run_search
from lcsc.search.setup import build_parts, open_bank
from lcsc.training.folder import needs_training


def main(words: Sequence[str]) -> None:
    """Search, or continue; see `lcsc --help`."""
    command = shlex.join(["lcsc", "search", *words])
    run_job("search", words, lambda config: search(config, command))


def search(config: dict[str, Any], command: str) -> Path:
    """Run one search to its end, draw its report and print the result; returns the run directory."""
    sections = {key: config[key] for key in SEARCH_SECTIONS}
    parts = build_parts(sections)  # every setting is checked before anything is made
    if config["train_if_missing"] and needs_training(Path(config["bank"]["path"])):
        train(config)
    path = run_search(
        Problem(bank=open_bank(sections), **parts),
        name=config["name"],
        runs_dir=Path(config["runs_dir"]),
        run_dir=None if config["run_dir"] is None else Path(config["run_dir"]),
        command=command,
        quiet=config["quiet"],
    )
    report = path / "report" / "report.html"
    if not report.exists() or report.stat().st_mtime < (path / "summary.json").stat().st_mtime:
        write_report(path)
    run = Run.open(path)
    print(report_text(run))
    print(result_line(run.summary))
    print(f"report: {report}\nmodel:  {path / 'best'}", flush=True)
    return path

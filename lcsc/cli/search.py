"""`lcsc search`: from a bank to a finished, reported and exported run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc.cli.train import train
from lcsc.config.hydra_app import overridden, run_job
from lcsc.config.schema import SEARCH_SECTIONS
from lcsc.core import registry
from lcsc.objectives.base import Tunable
from lcsc.report.html import write_report
from lcsc.report.run import Run
from lcsc.report.tables import report_text, result_line
from lcsc.search.packed_bank import keeping
from lcsc.search.problem import Problem
from lcsc.search.progress import say
from lcsc.search.run import run_search
from lcsc.search.setup import PARTS, build_parts, check_before_training, open_bank, parts_of
from lcsc.searchers.base import learns
from lcsc.training.folder import needs_training


def main(words: Sequence[str]) -> None:
    """Search, or continue; see `lcsc --help`."""
    command = shlex.join(["lcsc", "search", *words])
    with keeping():  # a sweep's searches share one packed bank
        run_job("search", words, lambda config: search(config, command, overridden(words)))


def search(config: dict[str, Any], command: str, given: Sequence[str] = ()) -> Path:
    """Run one search to its end, draw its report and print the result; returns the run directory.

    Args:
        config: plain configuration.
        command: the line that started it, for the record.
        given: settings that the user gave; those that count for nothing are named.
    """
    sections = {key: config[key] for key in SEARCH_SECTIONS}
    parts = build_parts(sections)  # every setting is checked before anything is made
    if not config["quiet"]:
        for line in idle_settings(config, given, parts):
            say(line)
    if config["train_if_missing"] and needs_training(Path(config["bank"]["path"])):
        check_before_training(parts)
        train(config)
    path = run_search(
        Problem(bank=open_bank(sections), **parts),
        name=config["name"],
        runs_dir=Path(config["runs_dir"]),
        run_dir=None if config["run_dir"] is None else Path(config["run_dir"]),
        command=command,
        quiet=config["quiet"],
        engine=registry.build("engine", config["engine"]),
        fork=config["fork"],
    )
    report = path / "report" / "report.html"
    if not report.exists() or report.stat().st_mtime < (path / "summary.json").stat().st_mtime:
        write_report(path)
    run = Run.open(path)
    print(report_text(run))
    print(result_line(run.summary))
    print(f"report: {report}\nmodel:  {path / 'best'}", flush=True)
    return path


#: What may leave a first look at the baselines without effect.
_LOOKS = {f"search.{name}" for name in ("num_images_baselines", "num_images", "prefixes", "race_steps")}


def idle_settings(config: Mapping[str, Any], given: Sequence[str], parts: Mapping[str, Any]) -> list[str]:
    """One note for each kind of settings that the user gave and that count for nothing.

    Args:
        config: plain configuration.
        given: settings that the user gave.
        parts: what `build_parts` made of it.
    """
    objective, notes = config["objective"]["name"], []
    used = parts_of(objective) | ({"model", "dataset"} if config["train_if_missing"] else set())
    sections = dict.fromkeys(key.partition(".")[0] for key in given)
    idle = [f"`{key}`" for key in sections if key in (*PARTS, "other_metrics") and key not in used]
    if idle:
        notes.append(
            f"note: objective `{objective}` takes no {', no '.join(idle)}; what you set there counts for nothing"
        )
    if "search.drop_level" in given and not (config["search"]["prefixes"] or config["search"]["race_steps"]):
        notes.append("note: `search.drop_level` counts for nothing without `search.prefixes` or `search.race_steps`")
    budget, own = parts["budget"], parts["objective"]
    learner = learns(parts["searcher"])
    if budget.num_images_baselines is not None and (budget.first_look is None or learner) and _LOOKS & set(given):
        why = f"with {budget.race}" if budget.race else f"unless it is below `search.num_images` {budget.num_images}"
        if budget.first_look is not None:
            why = f"with searcher `{config['searcher']['name']}`, which learns from the baselines' scores"
        notes.append(f"note: `search.num_images_baselines` {budget.num_images_baselines} counts for nothing {why}")
    asked = "sampler.search_times" in given and "sampler" in used and config["sampler"]["search_times"]
    if asked and isinstance(own, Tunable) and not own.space().boxes:
        notes.append("note: `sampler.search_times` counts for nothing: only levels below the first are varied")
    return notes

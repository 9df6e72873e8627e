"""`lcsc export`: write a run's winner where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError, RunError
from lcsc.export.model import export_model
from lcsc.objectives.base import tuned
from lcsc.report.run import Run
from lcsc.search.frames import read_records
from lcsc.search.setup import build_problem


def main(words: Sequence[str]) -> None:
    """`run=DIR to=DIR [format=diffusers|safetensors] [max_shard_size=5GB] [trust=true]`."""
    known = {"run": None, "to": None, "format": "diffusers", "max_shard_size": "5GB", "trust": "false"}
    settings = parse_words(words, known)
    to, trust = Path(need(settings, "to")), need(settings, "trust")
    if trust not in ("true", "false"):
        raise ConfigError(f"`trust` is `{trust}`; it must be true or false.")
    value = export_run(
        Path(need(settings, "run")),
        to,
        need(settings, "format"),
        need(settings, "max_shard_size"),
        trust=trust == "true",
    )
    print(f"model: {to} (loaded back, it scores {value:.6g}, as the run reported)", flush=True)


def export_run(
    path: Path, to: Path, format: str = "diffusers", max_shard_size: str = "5GB", *, trust: bool = False
) -> float:
    """Write the winner of the finished run `path` to the new folder `to`; returns its score when loaded back.

    Args:
        trust: whether a command, a function or a foreign part that run.json names may be run for that score.

    Raises:
        ConfigError: run.json names such code and is not trusted.
        RunError: the run is not finished, or its bank changed.
        OutputExistsError: `to` exists.
    """
    run = Run.open(path)
    if run.summary is None:
        raise RunError(f"`{path}` is not finished. Continue it with: {run.info['command'] or 'lcsc search ...'}")
    problem = build_problem(run.info["config"], trust=trust)
    if problem.bank.digest != run.info["fingerprints"]["bank"]:
        raise RunError(
            f"the checkpoints in `{problem.bank.path}` are not the ones `{path}` was searched on. "
            "Restore them, or search again."
        )
    records, _ = read_records(path / "journal.jsonl")
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    point = problem.space().to_point(np.array(best["vector"]))
    return export_model(
        bank=problem.bank,
        operator=problem.operator,
        objective=tuned(problem.objective, point),
        seed=problem.seed,
        point=point,
        expected=best,
        info=run.info,
        report={**run.summary["report"], "geometry": run.geometry},
        to=to,
        format=format,
        max_shard_size=max_shard_size,
    )

"""`lcsc export`: write a run's winner where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError, RunError
from lcsc.export.model import FORMAT, MAX_SHARD_SIZE, export_in_dtypes, export_model
from lcsc.objectives.base import tuned
from lcsc.report.run import Run
from lcsc.search.frames import read_records
from lcsc.search.setup import build_problem


def main(words: Sequence[str]) -> None:
    """`run=DIR to=DIR [format=diffusers|safetensors] [max_shard_size=5GB] [dtype=same] [trust=true]`."""
    known = {"run": None, "to": None, "format": FORMAT, "max_shard_size": MAX_SHARD_SIZE, "dtype": "float32"}
    settings = parse_words(words, known | {"trust": "false"})
    to, trust, dtype = Path(need(settings, "to")), need(settings, "trust"), need(settings, "dtype")
    if trust not in ("true", "false"):
        raise ConfigError(f"`trust` is `{trust}`; it must be true or false.")
    if dtype not in ("float32", "same"):
        raise ConfigError(f"`dtype` is `{dtype}`; it must be float32, as was scored, or same, as in the checkpoints.")
    value, reported = export_run(
        Path(need(settings, "run")),
        to,
        need(settings, "format"),
        need(settings, "max_shard_size"),
        same_dtypes=dtype == "same",
        trust=trust == "true",
    )
    apart = f"{value - reported:+.2g} from the run's, which had float32 weights"
    said = apart if dtype == "same" else "as the run reported"
    print(f"model: {to} (loaded back, it scores {value:.6g}, {said})", flush=True)


def export_run(
    path: Path,
    to: Path,
    format: str = FORMAT,
    max_shard_size: str = MAX_SHARD_SIZE,
    *,
    same_dtypes: bool = False,
    trust: bool = False,
) -> tuple[float, float]:
    """Write the winner of the finished run `path` to the new folder `to`.

    Args:
        same_dtypes: write tensors in the checkpoint's dtypes; for operators that make a model of one checkpoint.
        trust: whether a command, a function or a foreign part that run.json names may be run for that score.

    Returns:
        The score of the folder loaded back, and the run's.

    Raises:
        ConfigError: run.json names such code and is not trusted, or the winner has no such form.
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
    common = {
        "bank": problem.bank,
        "operator": problem.operator,
        "objective": tuned(problem.objective, point),
        "seed": problem.seed,
        "point": point,
        "expected": best,
        "info": run.info,
        "to": to,
        "max_shard_size": max_shard_size,
    }
    if same_dtypes:
        if format != FORMAT:
            raise ConfigError(f"`dtype` is `same` and `format` is `{format}`; leave `format` out.")
        return export_in_dtypes(**common), best["value"]
    report = {**run.summary["report"], "geometry": run.geometry}
    return export_model(**common, report=report, format=format), best["value"]

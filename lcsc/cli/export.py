"""`lcsc export`: write a run's winner where it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.cli.finished import finished_run
from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError, EvaluationError, RunError
from lcsc.core.seeds import Purpose
from lcsc.export.model import FORMAT, MAX_SHARD_SIZE, export_in_dtypes, export_model
from lcsc.objectives.base import tuned
from lcsc.search.evaluate import Evaluator
from lcsc.search.frames import read_records
from lcsc.search.problem import Problem
from lcsc.search.setup import build_problem


def main(words: Sequence[str]) -> None:
    """`run=DIR to=DIR [format=diffusers|safetensors] [max_shard_size=5GB] [dtype=same] [bank=DIR] [trust=true]`."""
    known = {"run": None, "to": None, "format": FORMAT, "max_shard_size": MAX_SHARD_SIZE, "dtype": "float32"}
    settings = parse_words(words, known | {"bank": None, "trust": "false"})
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
        bank=None if settings["bank"] is None else Path(settings["bank"]),
        trust=trust == "true",
    )
    said = "as the run reported"
    if settings["bank"] is not None:
        said = f"{value - reported:+.2g} from the run's on the bank that it searched"
    elif dtype == "same":
        said = f"{value - reported:+.2g} from the run's, which had float32 weights"
    print(f"model: {to} (loaded back, it scores {value:.6g}, {said})", flush=True)


def export_run(
    path: Path,
    to: Path,
    format: str = FORMAT,
    max_shard_size: str = MAX_SHARD_SIZE,
    *,
    same_dtypes: bool = False,
    bank: Path | None = None,
    trust: bool = False,
) -> tuple[float, float]:
    """Write the winner of the finished run `path` to the new folder `to`.

    Args:
        same_dtypes: write tensors in the checkpoint's dtypes; for operators that make a model of one checkpoint.
        bank: another bank of the same steps to make the winner of, such as the exact one where a lossy copy was
            searched; it is scored on the report seeds.
        trust: whether a command, a function or a foreign part that run.json names may be run for that score.

    Returns:
        The score of the folder loaded back, and the run's.

    Raises:
        ConfigError: run.json names such code and is not trusted, the winner has no such form, or `bank` is none that
            it can be made of.
        RunError: the run is not finished, or its bank changed.
        OutputExistsError: `to` exists.
    """
    run = finished_run(path)
    problem = build_problem(run.info["config"], trust=trust)
    if problem.bank.digest != run.info["fingerprints"]["bank"]:
        raise RunError(
            f"the checkpoints in `{problem.bank.path}` are not the ones `{path}` was searched on. "
            "Restore them, or search again."
        )
    records, _ = read_records(path / "journal.jsonl")
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    report, reported = {**run.summary["report"], "geometry": run.geometry}, best["value"]
    if bank is not None:
        problem, best = _elsewhere(problem, best, run.info["config"], bank, trust)
        report = {"best": best, "baselines": {}}
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
        return export_in_dtypes(**common), reported
    return export_model(**common, report=report, format=format), reported


def _elsewhere(
    searched: Problem, best: Mapping[str, Any], config: Mapping[str, Any], path: Path, trust: bool
) -> tuple[Problem, Mapping[str, Any]]:
    """The same problem on another bank, and the report record of the same natural numbers there."""
    problem = build_problem({**config, "bank": {**config["bank"], "path": str(path)}}, trust=trust)
    old, new = searched.bank, problem.bank
    if (new.steps, new.layout.shapes) != (old.steps, old.layout.shapes):
        raise ConfigError(
            f"`bank` is `{path}`, which does not hold steps {old.steps[0]} to {old.steps[-1]} of the tensors that the "
            f"run searched in `{old.path}`. Name the bank that this one was made of."
        )
    natural = searched.space().to_natural(np.array(best["vector"]))
    space = problem.space()
    vector = space.from_natural(natural)
    if not all(np.allclose(a, b, atol=1e-6) for a, b in zip(space.to_natural(vector), natural, strict=True)):
        raise ConfigError(
            f"the winner's numbers cannot be said in the coordinates of `{path}`. Write them with "
            "`lcsc combine schedule=coefficients`."
        )
    evaluator = Evaluator(new, problem.operator, problem.objective, space, problem.seed)
    row = evaluator.score(vector, Purpose.REPORT, range(best["num_images"]), full=True)
    if row["value"] is None:
        raise EvaluationError(f"the winner cannot be scored on `{path}`: {row['reason']}.")
    return problem, {**best, **row, "vector": vector.tolist(), "label": f"{best['label']}, searched in {old.path.name}"}

"""A search from start to finished run directory."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.content import duplicates_note
from lcsc.core.files import write_bytes, write_json
from lcsc.core.seeds import Purpose
from lcsc.core.words import words_of
from lcsc.export.model import export_model, searched_levels
from lcsc.metrics.frechet import FrechetDistance
from lcsc.objectives.base import Timed, tuned
from lcsc.operators.base import notes_of
from lcsc.search.disk import NUM_SAMPLES, run_bytes
from lcsc.search.engines.base import Crew, Engine, Site
from lcsc.search.engines.inline import Inline
from lcsc.search.frames import read_records
from lcsc.search.geometry import geometry
from lcsc.search.journal import Journal
from lcsc.search.lineage import inherited_rows, num_inherited
from lcsc.search.loop import Outcome, Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress, say
from lcsc.search.rundir import RunDir, open_run_dir
from lcsc.search.setup import describe_problem, fingerprints


def run_search(
    problem: Problem,
    *,
    name: str,
    runs_dir: Path = Path("runs"),
    run_dir: Path | None = None,
    command: str = "",
    quiet: bool = False,
    engine: Engine | None = None,
    fork: bool = False,
) -> Path:
    """Search, or continue the same search begun earlier, and leave a finished run directory.

    Args:
        problem: what to search.
        name: experiment name, first part of the directory's name.
        runs_dir: where run directories live.
        run_dir: the run directory itself; None finds the unfinished one or makes a new one.
        command: the line that started the search, for the record.
        quiet: print nothing.
        engine: who evaluates; None does it in this process. It is no part of what the search is: another one may
            continue it.
        fork: where `run_dir`, or the newest run of that name, was made with another configuration, start a new run in
            `runs_dir` that takes over the scores that hold for it too (`lcsc.search.lineage`).

    Returns:
        The run directory: run.json, journal.jsonl, timing.jsonl, samples.npz, best/, summary.json.

    Raises:
        LcscError: a mistake in the configuration or the bank; nothing is written before all are checked.
    """
    problem.bank.load()  # damaged numbers show up here, before anything is written
    first = problem.searcher.start(problem.task()).ask()  # refuses a task it cannot work on
    info, need = _info(problem, name, command), run_bytes(problem, slopes=first.gradient)
    run, state = open_run_dir(runs_dir, run_dir, info, (lambda _: None) if quiet else say, fork, need)
    if state == "finished":
        if not quiet:
            say(f"{run.path} is finished already; nothing to do")
        return run.path
    if not quiet:
        for line in (*_opening(problem), f"{'continuing' if state == 'resumed' else 'searching in'} {run.path}"):
            say(line)
    with _progress(name, info, quiet) as progress, Journal(run.path, progress.note) as journal:
        site = Site(problem, info["config"], info["fingerprints"], run.path, progress.note)
        with _crew(engine or Inline(), site, run if state == "new" else None) as crew:
            search = Search(problem, journal, progress, crew, inherited_rows(run, progress.note))
            progress.expect(search.num_steps())
            search.say_fitting(first)  # before anything is spent
            outcome = search.run()
            share = _waited(search, crew.slots)
        num, of = num_inherited(journal.records), len(journal.records)
        if num:
            progress.note(f"{num} of the {of} steps are inherited from {run.parent}")
        _save_samples(problem, search, outcome, run.path)
        where = _geometry(problem, outcome, run.path)
        _export_best(problem, search, outcome, run, where)
        summary = {**_summary(problem, search, outcome, run), "geometry": where, "idle_share": share}
        summary |= _speed(problem, search, outcome)
        write_json(run.path / "summary.json", summary)
    return run.path


def _progress(name: str, info: dict[str, Any], quiet: bool) -> Progress:
    """The display of a search, whose rate is in the items of its score."""
    return Progress(name, 0, quiet, words_of(info["fingerprints"]["evaluator"]).many)


def _crew(engine: Engine, site: Site, made: RunDir | None) -> Crew:
    """The engine's workers; where it cannot start, a run directory `made` for them alone is no trace of a search."""
    try:
        return engine.start(site)
    except BaseException:
        if made is not None:
            made.discard()
        raise


def _waited(search: Search, slots: int) -> float | None:
    """The share of their time that workers waited, said where there are several."""
    share = search.dispatcher.idle_share
    if slots > 1 and share is not None:
        search.progress.note(f"{slots} workers waited {share:.1%} of their time")
    return share


def _opening(problem: Problem) -> list[str]:
    """What is said of a bank and its candidates before a search."""
    bank = problem.bank
    rates = bank.rates or (None,) * bank.num_checkpoints
    parents = [{**parent, "rate": rate} for parent, rate in zip(bank.parents, rates, strict=True)]
    twins = [f"note: {note}" for note in duplicates_note(parents)]
    return [*bank.lines, *twins, *notes_of(problem.operator, bank), *few_images(problem)]


def _info(problem: Problem, name: str, command: str) -> dict[str, Any]:
    """What run.json says of a search."""
    bank, prints = problem.bank, fingerprints(problem)
    return {
        "name": name,
        "lcsc_version": prints["versions"]["lcsc"],
        "command": command,
        "config": describe_problem(problem),
        "fingerprints": prints,
        "bank": {
            "steps": list(bank.steps),
            "num_checkpoints": bank.num_checkpoints,
            "num_parameters": bank.layout.num_parameters,
        },
        "nfe": prints["evaluator"].get("nfe"),
        "metric": problem.objective.name,
    }


def few_images(problem: Problem) -> list[str]:
    """A note where the images of a score are too few for the covariance of their features."""
    metric = getattr(problem.objective, "metric", None)
    if not isinstance(metric, FrechetDistance):
        return []
    names, budget = ("num_images", "num_images_select", "num_images_report"), problem.budget
    looks = [("prefixes", num) for num in budget.prefixes]
    looks += [("num_images_baselines", problem.first_look)] if problem.first_look else []
    sizes = [*looks, *((name, getattr(budget, name)) for name in names)]
    few = " and ".join(f"`search.{name}` ({num})" for name, num in sizes if metric.rank_deficient(num))
    if not few:
        return []
    detector = metric.load_detector()
    return [
        f"note: {few}: not above the {detector.num_features} features of detector `{detector.name}`, so their "
        f"covariance is singular and `{metric.name}` strongly biased; such scores compare only with those of equally "
        "many images."
    ]


def _save_samples(problem: Problem, search: Search, outcome: Outcome, folder: Path) -> None:
    """Images of the winner, the last checkpoint, best EMA and best baseline (same noise), and the data."""
    objective = problem.objective
    if not hasattr(objective, "images"):
        return
    records = {record["who"]: record for record in outcome.reports}
    wanted = {"best", "last", "ema", str(_report_section(outcome).get("best_baseline"))}
    images = {
        who: tuned(objective, search.point(records[who]))
        .images(  # type: ignore[attr-defined]
            problem.operator.apply(problem.bank, search.point(records[who])),
            seed=problem.seed,
            purpose=Purpose.REPORT,
            num_images=NUM_SAMPLES,
        )
        .numpy()
        for who in sorted(wanted & set(records))
    }
    images["real"] = objective.dataset.images()[:NUM_SAMPLES].numpy()  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **images)  # type: ignore[arg-type]
    write_bytes(folder / "samples.npz", buffer.getvalue())


def _speed(problem: Problem, search: Search, outcome: Outcome) -> dict[str, Any]:
    """How fast the winner and the best baseline are, where the objective measures it."""
    objective = problem.objective
    if not isinstance(objective, Timed):
        return {}
    records = {record["who"]: record for record in outcome.reports}
    wanted = dict.fromkeys(who for who in ("best", _report_section(outcome).get("best_baseline")) if who in records)
    rows = {who: objective.speed(problem.operator.apply(problem.bank, search.point(records[who]))) for who in wanted}
    return {"speed": rows} if all(rows.values()) else {}


def _geometry(problem: Problem, outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Where the winner and the reported baselines lie; see `lcsc.search.geometry`."""
    records, _ = read_records(folder / "journal.jsonl")
    trials = [record for record in records if record["kind"] == "trial"]
    rival = _report_section(outcome).get("best_baseline")
    return geometry(problem.bank, problem.operator, outcome.reports, trials, rival, problem.space())


def _export_best(problem: Problem, search: Search, outcome: Outcome, run: RunDir, where: dict[str, Any]) -> None:
    """best/: the winner as a diffusers folder, its score proven by loading it back."""
    target = run.path / "best"
    if target.exists():  # written before an interruption; it appeared complete or not at all
        return
    export_model(
        bank=problem.bank,
        operator=problem.operator,
        objective=tuned(problem.objective, search.point(outcome.winner)),
        seed=problem.seed,
        point=search.point(outcome.winner),
        expected=outcome.reports[0],
        to=target,
        info=run.info,
        report={**_report_section(outcome), "geometry": where},
    )


def _report_section(outcome: Outcome) -> dict[str, Any]:
    """The `report` section of summary.json."""
    best, *others = ({"value": r["value"], "se": r["se"], "label": r["label"]} for r in outcome.reports)
    baselines = {record["who"]: row for record, row in zip(outcome.reports[1:], others, strict=True)}
    section: dict[str, Any] = {"best": best, "baselines": baselines}
    if baselines:
        # the strongest baseline on the report seeds: hardest on us, and never chosen by luck of the search seeds
        name = min(baselines, key=lambda who: baselines[who]["value"])
        section["best_baseline"], rival = name, baselines[name]["value"]
        if rival > 0:  # a ratio of signed scores says nothing
            section["ratio"] = best["value"] / rival
    return section


def _coefficients(problem: Problem, search: Search, outcome: Outcome) -> list[dict[str, Any]]:
    """The winner's coefficients, one row a checkpoint, or one a layer group and checkpoint; empty where it has none."""
    best, steps = outcome.reports[0], problem.bank.steps
    coef = best.get("coef")
    if coef is None:
        return []
    if not isinstance(coef[0], list):
        return [{"step": step, "coef": value} for step, value in zip(steps, coef, strict=True)]
    names = problem.operator.apply(problem.bank, search.point(best)).recipe["groups"]["names"]
    return [
        {"group": name, "step": step, "coef": value}
        for name, coef_K in zip(names, coef, strict=True)
        for step, value in zip(steps, coef_K, strict=True)
    ]


def _summary(problem: Problem, search: Search, outcome: Outcome, run: RunDir) -> dict[str, Any]:
    records, _ = read_records(run.path / "journal.jsonl")
    config = run.info["config"]
    return {
        "experiment": run.info["name"],
        "operator": config["operator"]["name"],
        "searcher": config["searcher"]["name"],
        "searcher_ran": outcome.searcher_ran or config["searcher"]["name"],
        "num_trials": sum(record["kind"] == "trial" for record in records),
        "num_failed": outcome.num_failed,
        "parent": run.parent,
        "num_inherited": num_inherited(records),
        "num_checkpoints": problem.bank.num_checkpoints,
        "num_coefficients": search.space.size,
        "nfe": run.info["nfe"],
        "metric": run.info["metric"],
        "detector": run.info["fingerprints"]["evaluator"].get("detector"),
        "images_sampled": outcome.images_sampled,
        "images_saved": outcome.images_saved,
        "image_forwards": outcome.image_forwards,
        "wall_seconds": round(_wall_seconds(run.path), 1),
        "floor": outcome.floor,
        "report": _report_section(outcome),
        "vetoed": [
            {"label": record["label"], "value": record["value"], "reason": record["vetoed"]}
            for record in records
            if record["kind"] == "select" and "vetoed" in record
        ],
        "coefficients": _coefficients(problem, search, outcome),
        "levels": searched_levels(tuned(problem.objective, search.point(outcome.winner))),
        "export": "best",
    }


def _wall_seconds(folder: Path) -> float:
    """Seconds spent in steps, over all sittings."""
    lines = (folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["seconds"] for line in lines if line.endswith("}"))

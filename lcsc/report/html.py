"""The report of a run: one self-contained page, with every picture and the numbers behind it beside it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcsc.core.errors import RunError
from lcsc.core.files import write_bytes
from lcsc.core.words import words_of
from lcsc.report.compare import compare_runs, comparison_text
from lcsc.report.generated import generated_notes
from lcsc.report.page import data_uri, render
from lcsc.report.run import Run
from lcsc.report.tables import html_table, level_rows, place_notes, place_rows, score_rows, status_line, veto_notes

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

__all__ = ["compare_runs", "comparison_text", "write_report"]


def write_report(run_dir: Path | str) -> Path:
    """Draw a run, finished or not, into `<run_dir>/report/`; an older report is replaced file by file.

    Writes report.html, and beside it convergence, coefficients, scores, geometry and, for several network calls, front,
    for several sizes of a cache, cache, of a coded file, size, as PNG and CSV, and samples.png; what the run does not
    have (yet) is left out.
    The same run gives the same bytes.

    Returns:
        The path of report.html.

    Raises:
        RunError: no run directory, or a damaged one; nothing is written then.
    """
    run = Run.open(run_dir)
    from lcsc.report.cache import cache_files
    from lcsc.report.front import front_files

    files = _tables(run)
    pictures = _pictures(run, files)
    for name, data in {**front_files([run]), **cache_files([run])}.items():
        (pictures if name.endswith(".png") else files)[name.removesuffix(".png")] = data
    page = _page(run, pictures)
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    for name, data in {**files, **{f"{name}.png": data for name, data in pictures.items()}}.items():
        write_bytes(folder / name, data)
    write_bytes(folder / "report.html", page)
    return folder / "report.html"


def _tables(run: Run) -> dict[str, bytes]:
    """The numbers behind the pictures: file name -> CSV."""
    import pandas as pd

    trials, baselines = run.trials(), run.baselines()
    rows = [trials.assign(kind="trial", label=""), baselines.assign(kind=baselines["family"])]
    columns = ["kind", "uid", "label", "value", "best_so_far", "status"]
    convergence = pd.concat([part.reindex(columns=columns).astype(object) for part in rows])
    frames = {"convergence.csv": convergence, "coefficients.csv": run.coefficients(), "scores.csv": run.report_table()}
    frames["geometry.csv"] = run.directions()
    return {name: _csv(frame) for name, frame in frames.items() if not frame.empty}


def _csv(frame: DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


def _pictures(run: Run, tables: Mapping[str, bytes]) -> dict[str, bytes]:
    """PNG files by name."""
    from lcsc.report import directions, grids, plots, style

    draw = {"convergence": plots.convergence, "coefficients": plots.coefficients, "scores": plots.scores}
    draw["geometry"] = directions.geometry
    wanted = [name for name in draw if name == "convergence" or f"{name}.csv" in tables]
    pictures = {name: style.png(draw[name](run)) for name in wanted}
    images = read_samples(run)
    if images:
        pictures["samples"] = style.png(grids.samples(run, images))
    return pictures


def read_samples(run: Run) -> dict[str, np.ndarray]:
    """The arrays of samples.npz, (N, C, H, W) in [-1, 1]; empty when there is no such file.

    Raises:
        RunError: the file is damaged or holds something else.
    """
    import numpy as np

    file = run.path / "samples.npz"
    if not file.is_file():
        return {}
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
            images = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"`{file}` cannot be read: {error}. Remove it to have the report without samples.") from error
    for key, array in images.items():
        if array.ndim != 4 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
            raise RunError(
                f"`{key}` in `{file}` has shape {array.shape} and type {array.dtype}; images are floats of shape "
                "(N, C, H, W). Remove the file to have the report without samples."
            )
    return images


def _page(run: Run, pictures: Mapping[str, bytes]) -> bytes:
    head, rows = score_rows(run)
    place_head, places = place_rows(run)
    prints = run.info.get("fingerprints") or {}
    embedded = dict.fromkeys(
        ("scores", "front", "cache", "size", "convergence", "coefficients", "geometry", "samples"), ""
    )
    embedded |= {name: data_uri(data) for name, data in pictures.items()}
    config = io.StringIO()
    json.dump(run.info["config"], config, indent=2, ensure_ascii=False, sort_keys=True)
    return render(
        "report",
        title=f"lcsc · {run.name}",
        under=f"{run.path.name} · {run.info.get('created_utc', '')} · {'finished' if run.finished else 'unfinished'}",
        result=status_line(run),
        finished=run.finished,
        scores=html_table(head, rows, strong=0) if rows else "",
        vetoes=veto_notes(run),
        places=html_table(place_head, places, strong=0) if places else "",
        notes=place_notes(run),
        account=(*generated_notes(run), *run.account),
        words=words_of(prints.get("evaluator") or {}),
        pictures=embedded,
        facts=_facts(run),
        config=config.getvalue(),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the scores depend on, in words; what the run does not say is left out."""
    info, config = run.info, run.info["config"]
    prints = info.get("fingerprints") or {}
    evaluator = prints.get("evaluator") or {"detector_digest": prints.get("detector")}
    search, bank, summary = config.get("search") or {}, info["bank"], run.summary or {}
    trials, words = run.trials(), words_of(evaluator)
    steps, own = run.steps, evaluator.get("detector") != info["metric"]
    images = [
        f"{search[key]:,} {text}"
        for key, text in (
            ("num_images", "a trial (search seeds)"),
            ("num_images_baselines", "a baseline's first look (search seeds)"),
            ("num_images_select", "a finalist (select seeds)"),
            ("num_images_report", "a final score (report seeds)"),
        )
        if isinstance(search.get(key), int)
    ]
    failed = int((trials["status"] != "ok").sum())
    seconds = summary.get("wall_seconds", trials["seconds"].sum())
    sampled = summary.get("images_sampled", trials["images"].sum())
    facts: list[tuple[str, Any]] = [
        ("metric", info["metric"]),
        ("detector", evaluator.get("detector") if own else None),
        ("detector digest" if own else "metric digest", evaluator.get("detector_digest")),
        (words.many, " · ".join(images)),
        ("seed", config.get("seed")),
        (words.calls, info.get("nfe")),
        ("sampler", evaluator.get("sampler")),
        *level_rows(summary.get("levels") or {}),
        ("model", evaluator.get("model")),
        ("data set", evaluator.get("dataset")),
        ("searcher", _searcher(config, summary)),
        ("price on distance", search.get("penalty") or None),
        ("operator", (config.get("operator") or {}).get("name")),
        ("trials", f"{len(trials)}{f', of them {failed} failed' if failed else ''}"),
        (f"{words.many} {words.sampled}", f"{sampled:,.0f}"),
        (f"{words.one}-forwards", f"{summary['image_forwards']:,}" if summary.get("image_forwards") else None),
        (f"{words.many} saved by racing", f"{summary['images_saved']:,}" if summary.get("images_saved") else None),
        ("time", f"{seconds:,.0f} s in scoring"),
        *_speeds(summary.get("speed") or {}),
        ("checkpoints", f"{len(steps)}, steps {steps[0]} to {steps[-1]}" if steps else None),
        ("parameters", f"{bank['num_parameters']:,}" if isinstance(bank.get("num_parameters"), int) else None),
        ("bank digest", prints.get("bank")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (prints.get("versions") or {}).items())),
        ("forked from", _lineage(info, summary)),
        ("command", info.get("command")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _speeds(speed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How fast the winner and the best baseline were, and where."""
    rows = []
    for who, row in speed.items():
        rate = row["tokens_per_second"]
        text = (
            f"{rate['median']:,.0f} tokens a second ({rate['min']:,.0f} to {rate['max']:,.0f}), {row['batch']} texts "
        )
        text += f"after {row['context']} tokens each, {row['dtype']}, {row['device']}, {row['threads']} threads"
        rows.append((f"decoding, {'LCSC' if who == 'best' else who}", text))
    return rows


def _lineage(info: Mapping[str, Any], summary: Mapping[str, Any]) -> str | None:
    """The run that this one was forked from, and how many scores it gave."""
    parent = (info.get("parent") or {}).get("run_id")
    return f"{parent} ({summary.get('num_inherited', 0)} scores inherited)" if parent else None


def _searcher(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str | None:
    """The searcher's name, and what ran where it chose another."""
    name, ran = (config.get("searcher") or {}).get("name"), summary.get("searcher_ran")
    return f"{name} ({ran})" if ran and ran != name else name

"""Numbers with their uncertainty, as plain text and as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lcsc.core.words import words_of
from lcsc.report.generated import generated_notes

if TYPE_CHECKING:
    from markupsafe import Markup

    from lcsc.report.run import Run

#: What a table prints where there is no number.
NOTHING = "–"
#: A winner whose squared way has less than this share outside of the checkpoints' plane lies in it, but for rounding.
OUTSIDE = 1e-3


def decimals_of(value: float, se: float | None) -> int:
    """Decimals worth printing: two digits of the standard error, or four of the value where there is none."""
    scale, digits = (se, 2) if se else (value, 4)
    if not scale or not math.isfinite(scale):
        return 1
    return min(max(digits - 1 - math.floor(math.log10(abs(scale))), 0), 8)


def number(value: float | None, se: float | None = None, *, plus_minus: bool = True) -> str:
    """`81.8 ± 1.9`, rounded to two digits of the standard error; `1,536` for a count; `–` for None and NaN.

    A whole number with a standard error of exactly 0, as of bytes and operations, is a count.
    """
    if value is None or math.isnan(value):
        return NOTHING
    if se == 0 and float(value).is_integer():
        return f"{value:,.0f}"
    se = None if se is None or math.isnan(se) else se
    decimals = decimals_of(value, se)
    return f"{value:.{decimals}f}" + (f" ± {se:.{decimals}f}" if se and plus_minus else "")


def result_line(summary: Mapping[str, Any]) -> str:
    """The outcome of a finished run in one line.

    `lcsc 81.8 ± 1.9 · best baseline 205.3 ± 2.0 (EMA half-life 320 steps) · ratio 0.40 · floor 9.8 (real vs real)`;
    parts that the run does not have are left out.
    """
    report = summary["report"]
    best = report["best"]
    parts = [f"lcsc {number(best['value'], best.get('se'))}"]
    rival = report.get("baselines", {}).get(report.get("best_baseline"))
    if rival:
        label = display_label(report["best_baseline"], rival["label"])
        parts.append(f"best baseline {number(rival['value'], rival.get('se'))} ({label})")
        parts += [f"ratio {report['ratio']:.2f}"] if "ratio" in report else []
    if summary.get("floor") is not None:
        decimals = decimals_of(best["value"], best.get("se"))
        parts.append(f"floor {summary['floor']:.{decimals}f} (real vs real)")
    saved = summary.get("images_saved")
    if saved:
        parts.append(f"racing saved {saved:,} of {saved + summary['images_sampled']:,} images")
    return printable(" · ".join(parts))


def progress_line(run: Run) -> str:
    """The state of an unfinished run in one line; its scores are not those of the report seeds and say so."""
    trials, baselines = run.trials(), run.baselines()
    total = (run.info["config"].get("search") or {}).get("num_trials")
    parts = [f"unfinished: {len(trials)}{f' of {total}' if total else ''} trials"]
    if trials["value"].notna().any():
        parts.append(f"best so far {number(trials['value'].min())}")
    if baselines["value"].notna().any():
        rival = baselines.loc[baselines["value"].idxmin()]
        parts.append(f"best baseline {number(rival['value'])} ({display_label(rival['family'], rival['label'])})")
    if len(parts) > 1:
        parts.append("search seeds, not final" if run.noise == "search seeds" else f"trials on {run.noise}, not final")
    return printable(" · ".join(parts))


def status_line(run: Run) -> str:
    """`result_line` of a finished run, `progress_line` of another."""
    summary = run.summary
    return progress_line(run) if summary is None else result_line(summary)


def display_label(who: str, label: str) -> str:
    """What a reader is shown for the winner or a baseline: `LCSC (trial 17)`, `last checkpoint (step 1000)`."""
    heads = {"best": "LCSC", "last": "last checkpoint", "best_single": "best single"}
    return f"{heads[who]} ({label})" if who in heads else str(label)


def score_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of final scores, as text; no rows until the report seeds were used."""
    frame = run.report_table()
    others = [name for name in frame.columns[6:] if not name.endswith("_se")]
    words = words_of((run.info.get("fingerprints") or {}).get("evaluator") or {})
    head = ["", str(run.info["metric"]), "ratio", *others, words.many]
    rows = []
    for row in frame.to_dict("records"):
        extra = [number(row[name], row[f"{name}_se"]) for name in others]
        ratio = NOTHING if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}"
        images = f"{row['num_images']:,}" if isinstance(row["num_images"], int) else NOTHING  # else pandas' NA
        rows.append([display_label(row["who"], row["label"]), number(row["value"], row["se"]), ratio, *extra, images])
    return head, rows


def place_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table "where the winner lies", as text, in the order of the final scores.

    No rows for a run that does not say; columns without a number, as of a bank of one checkpoint, are left out.
    """
    points = run.geometry.get("points") or {}
    farthest = max((point.get("from_last") or 0.0 for point in points.values()), default=0.0)
    columns = {
        "from_last": ("from last", decimals_of(farthest, None)),
        "from_last_relative": ("/ last to mean", 2),
        "sum_abs": ("sum |coef|", 2),
        "max_abs": ("max |coef|", 3),
    }
    shown = {k: look for k, look in columns.items() if any(point.get(k) is not None for point in points.values())}

    def text(value: float | None, decimals: int) -> str:
        return NOTHING if value is None else f"{value:,.{decimals}f}"

    rows = [
        [
            display_label(row["who"], row["label"]),
            *(text(points[row["who"]].get(key), digits) for key, (_, digits) in shown.items()),
        ]
        for row in run.report_table().to_dict("records")
        if row["who"] in points
    ]
    return ["", *(head for head, _ in shown.values())], rows if shown else []


def place_notes(run: Run) -> list[str]:
    """What the table "where the winner lies" leaves to say, in sentences: the bank's shape, and what is not pinned."""
    bank, way, slope = (run.geometry.get(key) or {} for key in ("bank", "way", "slope"))
    notes = []
    if bank:
        text = f"From the last checkpoint to the mean of all it is {number(bank['last_to_mean'])}, to the first "
        text += f"{number(bank['last_to_first'])}. The checkpoints' effective rank is "
        notes.append(f"{text}{bank['effective_rank']:.1f} of {bank['num_directions']}.")
    if way:
        text = f"The winner is {number(way['length'])} away from the best baseline; its way has an effective rank of "
        text += f"{way['effective_rank']:.1f}."
        if way["outside"] > OUTSIDE:
            text += f" {100 * way['outside']:.2g} % of its square is no combination of whole checkpoints."
        notes.append(text)
    if slope:
        notes.append(_slope_note(slope))
    if bank.get("num_short"):
        text = f"{bank['num_short']} of {bank['num_directions']} directions of the checkpoints are shorter than "
        notes.append(f"{text}1/1000 of the longest: coefficients along them hardly change the weights.")
    return notes


def _slope_note(slope: Mapping[str, Any]) -> str:
    total = slope["num_directions"]
    if "energy" not in slope:
        text = f"{slope['num_gradients']} gradients are too few to tell which of {total} directions"
        return f"{text} the score depends on; that takes {2 * total}."
    text = f"{slope['num_carrying']} of {total} directions carry 99 % of the score's squared slope"
    share = slope.get("way_flat")
    if not slope["num_flat"] or share is None:
        return f"{text}; {slope['num_flat'] or 'none'} of them {'are' if slope['num_flat'] > 1 else 'is'} flat."
    flat = f"{slope['num_flat']} are flat" if slope["num_flat"] > 1 else "1 is flat"
    text = f"{text}, {flat} (under 1 % of the mean). {100 * share:.2g} % of the winner's squared way lies along flat"
    return f"{text} ones, where the score hardly changed: other coefficients are as good."


def veto_notes(run: Run) -> list[str]:
    """One sentence for each finalist that a guard vetoed; its value is on the select seeds."""
    return [
        f"{record['label']}, {number(record['value'])} on the select seeds, is vetoed by a guard: {record['vetoed']}."
        for record in run.vetoed
    ]


def level_rows(levels: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """Searched noise levels in full, for a table of facts: what the winner's score holds at, by network calls."""
    return [
        (f"searched noise levels at {nfe} NFE", ", ".join(repr(float(level)) for level in found))
        for nfe, found in levels.items()
    ]


def report_text(run: Run) -> str:
    """The tables of final scores and of where the winner lies, for a terminal; of an unfinished run, its progress."""
    head, rows = score_rows(run)
    if not rows:
        return progress_line(run)
    blocks, (place_head, places) = [text_table(head, rows)], place_rows(run)
    for lines in (veto_notes(run), generated_notes(run), run.account):
        if lines:
            blocks.append("\n".join(printable(line) for line in lines))
    if places:
        blocks.append(text_table(place_head, places) + "".join(f"\n{note}" for note in place_notes(run)))
    return "\n\n".join(blocks)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Aligned columns, the first `num_left` to the left and the rest to the right; control characters are replaced."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i < num_left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1, strong: int | None = None
) -> Markup:
    """The same as an HTML table, every cell escaped; row `strong` is set bold."""
    from markupsafe import Markup

    def line(cells: Sequence[str], tag: str) -> Markup:
        left = Markup("<{0} class=left>{1}</{0}>")
        right = Markup("<{0}>{1}</{0}>")
        return Markup("").join(
            (left if i < num_left else right).format(Markup(tag), cell) for i, cell in enumerate(cells)
        )

    body = Markup("\n").join(
        Markup("<tr{}>{}</tr>").format(Markup(" class=strong") if i == strong else "", line(row, "td"))
        for i, row in enumerate(rows)
    )
    shell = Markup("<div class=scroll><table><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>")
    return shell.format(line(head, "th"), body)


def printable(text: str) -> str:
    """`text` without control characters: a name in a run directory must not steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))

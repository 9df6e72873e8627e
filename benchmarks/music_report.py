"""What the pieces of `music_text_to_music.py` say: means over seeds, targets, and the figure.

python benchmarks/music_report.py benchmarks/results/music_text_to_music.json docs/images/music_text_to_music.png
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, mean_se

from lcsc.music.check import whole_bars

ARMS, PIECES = ("pretrained", "random"), ("tuned", "curve", "lcsc", "tunes")
MEASURES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "eds", "validity", "diversity", "copying")


def report(work: Path, seeds: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything of the results file; seeds that are not finished are left out."""
    runs = {}
    for seed in seeds:
        names = ("decoder", "lcsc-tunes", *(f"{arm}-{piece}" for arm in ARMS for piece in PIECES))
        paths = {name: work / f"seed-{seed}" / f"{name}.json" for name in names}
        if all(path.is_file() for path in paths.values()):
            runs[str(seed)] = {name: json.loads(path.read_text()) for name, path in paths.items()}
            for arm in (*ARMS, "lcsc"):
                told = runs[str(seed)][f"{arm}-tunes"]
                told["whole_bars"] = statistics.fmean(map(whole_bars, told.pop("tunes")))
    found = {**circumstances(), "settings": settings, "seeds": [int(seed) for seed in runs]}
    found["arms"] = {arm: arm_table([run[f"{arm}-tunes"] for run in runs.values()]) for arm in (*ARMS, "lcsc")}
    found["lcsc"] = {arm: lcsc_table([run[f"{arm}-lcsc"] for run in runs.values()]) for arm in ARMS}
    return {**found, "targets": targets(runs), "runs": runs}


def arm_table(runs: list[dict]) -> dict[str, Any]:
    """Means over seeds of one arm."""
    table: dict[str, Any] = {"loss": mean_se([run["loss"] for run in runs])}
    table["conditioning_gap"] = mean_se([run["gap"]["value"] for run in runs])
    for name in MEASURES:
        rows = [run["measures"][name] for run in runs]
        table[name] = {key: mean_se([row[key] for row in rows]) for key in ("value", "floor", "ceiling", "above")}
    for judge in runs[0]["valid"]:
        table[f"valid_{judge}"] = mean_se([run["valid"][judge] for run in runs])
        table[f"real_valid_{judge}"] = mean_se([run["real_valid"][judge] for run in runs])
    table["whole_bars"] = mean_se([run["whole_bars"] for run in runs])
    return {**table, "ended": mean_se([run["ended"] for run in runs])}


def lcsc_table(runs: list[dict]) -> dict[str, Any]:
    """Losses, and what each is above the searched combination's, over seeds."""
    losses = {name: mean_se([run["losses"][name] for run in runs]) for name in runs[0]["losses"]}
    gains = {name: mean_se([run["gains"][name]["value"] for run in runs]) for name in runs[0]["gains"]}
    gains["best_ema"] = mean_se([run["gains"][run["best_ema"]]["value"] for run in runs])
    return {"loss": losses, "gain_over": gains}


def targets(runs: dict[str, dict]) -> dict[str, Any]:
    """What was wanted, with the numbers of each seed; an interval is that of a paired bootstrap, of 95 %."""
    out: dict[str, Any] = {}
    curves = {seed: [run[f"{arm}-curve"]["losses"] for arm in ARMS] for seed, run in runs.items()}
    below = {seed: min(other[step] - own[step] for step in own) for seed, (own, other) in curves.items()}
    out["loss_below_random_at_every_checkpoint"] = _target(below, all(gap > 0 for gap in below.values()))
    own, other = ({seed: run[f"{arm}-tunes"] for seed, run in runs.items()} for arm in ARMS)
    for judge in next(iter(own.values()))["valid"]:
        more = {seed: own[seed]["valid"][judge] - other[seed]["valid"][judge] for seed in runs}
        out[f"validity_{judge}_at_least_random"] = _target(more, all(gap >= 0 for gap in more.values()))
    for name in ("bleu_4", "eds"):
        rows = {seed: told["measures"][name] for seed, told in own.items()}
        above = {seed: [row["above"], row["low"], row["high"]] for seed, row in rows.items()}
        out[f"{name}_above_floor"] = _target(above, all(row[1] > 0 for row in above.values()))
    gaps = {seed: [told["gap"][key] for key in ("value", "low", "high")] for seed, told in own.items()}
    out["conditioning_gap_above_zero"] = _target(gaps, all(row[1] > 0 for row in gaps.values()))
    for arm, rival in itertools.product(ARMS, ("last", "best_ema")):
        told = {seed: run[f"{arm}-lcsc"] for seed, run in runs.items()}
        found = {seed: some["gains"][some.get(rival, rival)] for seed, some in told.items()}
        gains = {seed: [row[key] for key in ("value", "low", "high")] for seed, row in found.items()}
        out[f"lcsc_better_than_{rival}_{arm}"] = _target(gains, all(row[1] > 0 for row in gains.values()))
    return out


def draw(results: Path, to: Path) -> None:
    """Losses along the fine-tuning, and of the combinations of its checkpoints."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    told = json.loads(results.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2))
    for arm, color in zip(ARMS, ("tab:blue", "tab:gray"), strict=True):
        for number, run in enumerate(told["runs"].values()):
            steps, losses = zip(
                *((int(step), loss) for step, loss in run[f"{arm}-curve"]["losses"].items()), strict=True
            )
            left.plot(steps[1:], losses[1:], color=color, linewidth=1, label=None if number else f"{arm} decoder")
    left.set(xlabel="step of the fine-tuning", ylabel="loss of held-out tunes, nats a token")
    left.legend(frameon=False)
    names = {"last": "last", "uniform": "mean", "ema": "EMA", "power_ema": "power EMA", "lcsc": "LCSC"}
    for arm, color in zip(ARMS, ("tab:blue", "tab:gray"), strict=True):
        for run in told["runs"].values():
            losses = run[f"{arm}-lcsc"]["losses"]
            gains = [losses["last"] - losses[name] for name in names]
            right.plot(list(names.values()), gains, "o-", color=color, linewidth=1, markersize=3)
    right.set(ylabel="loss below the last checkpoint's", xlabel="combination of the checkpoints")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def table(told: dict[str, Any]) -> str:
    """The table of docs/music.md."""
    heads = {"pretrained": "pretrained decoder", "random": "random decoder", "lcsc": "LCSC of the first"}
    lines = [f"| | {' | '.join(heads.values())} | floor | real tunes |", "|---|" + "---|" * (len(heads) + 2)]
    rows = {"loss, nats a token": ("loss", 3), "conditioning gap": ("conditioning_gap", 3)}
    rows |= {"BLEU-4": ("bleu_4", 1), "EDS": ("eds", 3), "valid for abc2midi": ("valid_abc2midi", 2)}
    rows |= {
        "bars of the right length": ("whole_bars", 3),
        "valid for lcsc": ("valid_lcsc", 2),
        "diversity": ("diversity", 2),
        "copying": ("copying", 2),
    }
    for text, (name, digits) in rows.items():
        cells = [told["arms"][arm][name] for arm in heads]
        ends = [cells[0].get(end, {}).get("mean") for end in ("floor", "ceiling")]
        if name == "copying":
            ends = [None, ends[0]]
        if name.startswith("valid_"):
            ends = [None, told["arms"]["random"][f"real_{name}"]["mean"]]
        shown = [_text(cell.get("value", cell), digits) for cell in cells]
        shown += ["" if not end else f"{end:.{digits}f}" for end in ends]
        lines.append(f"| {text} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _text(cell: dict[str, float | None], digits: int) -> str:
    se = "" if cell["se"] is None else f" ± {cell['se']:.{digits}f}"
    return f"{cell['mean']:.{digits}f}{se}"


def _target(by_seed: dict[str, Any], reached: bool) -> dict[str, Any]:
    return {"reached": reached, "by_seed": by_seed}


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
    print(table(json.loads(Path(sys.argv[1]).read_text())))

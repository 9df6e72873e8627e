"""The ten combinations of arXiv:1907.12461 on two tasks, from sources that are pretrained here.

    python benchmarks/seq2seq_combinations.py --seeds 0 1 2 --text FILE

Sources are a BERT, a RoBERTa and a GPT-2 of bytes, pretrained on the training part of a text: its search and report
parts were taken out before. Each start is fine-tuned on windows of the same training part, on the same data in the same
order, and measured on the report part on the way. Losses are nats a byte of the targets; measures are of what each
model writes for the first sources of the report part, byte after byte, at the end. Beside the ten there is the random
twin of `rnd2gpt`, a random encoder with a random GPT-2. What lies in `--folder` is gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, circumstances, mean_se
from seq2seq_sources import BATCH, BLOCK, TUNED, Clock, Notes, pretrained, text_of

#: start -> source of the bank, and settings of the operator beside its name
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("bert", {"combination": name}) for name in ("rnd2rnd", "bert2rnd", "rnd2bert", "bert2bert", "bertshare")},
    "robertashare": ("roberta", {"combination": "robertashare"}),
    "gpt": ("gpt2", {"combination": "gpt"}),
    "rnd2gpt": ("gpt2", {"combination": "rnd2gpt"}),
    "bert2gpt": ("bert", {"combination": "bert2gpt", "decoder": "gpt2"}),
    "roberta2gpt": ("roberta", {"combination": "roberta2gpt", "decoder": "gpt2"}),
    "random twin of rnd2gpt": ("gpt2", {"encoder": "random", "decoder": "random"}),
}
TWIN = "random twin of rnd2gpt"
TASKS: dict[str, dict[str, Any]] = {
    "continue": {"task": "continue", "block_length": 64, "source_length": 32},
    "restore": {"task": "restore", "block_length": 32},
}
MEASURES = ("exact_match", "bleu", "sari", "rouge_1", "rouge_2", "rouge_l")


def measure(args: argparse.Namespace, seed: int, folder: Path, notes: Notes, clock: Clock) -> None:
    """All starts on all tasks with one seed's sources; one training after the other is kept."""
    if all(f"{task}: {start}" in notes.values for task in args.tasks for start in STARTS):
        return
    text = text_of(args.text)
    for kind in ("bert", "gpt2", "roberta"):
        clock.check()
        steps = args.causal_steps if kind == "gpt2" else args.steps
        pretrained(kind, 2, steps, steps // 4, text, seed, folder / kind)
    for task in args.tasks:
        for start in STARTS:
            name = f"{task}: {start}"
            if name not in notes.values:
                clock.check()
                notes.keep(name, fine_tuned(args, text, seed, folder, task, start))
                print(seed, name, notes.values[name]["loss_nats"], flush=True)


def fine_tuned(args: argparse.Namespace, text: Any, seed: int, folder: Path, task: str, start: str) -> dict[str, Any]:
    """Losses of one start on the way through its fine-tuning, and measures of what it writes at the end."""
    from lcsc.core.registry import build
    from lcsc.core.seeds import Purpose

    objective = build(
        "objective",
        "seq2seq",
        dataset=text,
        **TASKS[task],
        num_steps=args.marks[-1],
        train_batch_size=TUNED,
        learning_rate=args.learning_rate,
        schedule="constant_with_warmup",
        warmup_steps=10,
        train_seed=seed,
        samples=args.samples,
        keep=1,
    )
    candidate = made(folder, start, seed)
    asked = {"seed": 0, "purpose": Purpose.REPORT, "images": range(args.num_blocks)}
    losses, before = {}, 0
    for mark in args.marks:
        blocks = objective.leg_states(candidate, **asked, num_blocks=20, steps=range(before, mark))
        losses[str(mark)], before = objective.value_of(blocks.states, Purpose.REPORT), mark
    score = objective(candidate, **asked, full=True)
    others = {name: dict(score.others[name]) for name in (*MEASURES, *(f"{name}_floor" for name in MEASURES))}
    counts = candidate.recipe["counts"]
    return {"loss_nats": losses, "se_over_blocks": score.se, "measures": others, "parameters": counts}


def made(folder: Path, start: str, seed: int) -> Any:
    """The candidate of a start: the operator's own, from the last checkpoints."""
    from lcsc.bank import CheckpointBank
    from lcsc.core.registry import build

    source, settings = STARTS[start]
    if settings.get("decoder") == "gpt2":
        settings = {**settings, "decoder": str(folder / "gpt2")}
    if settings.get("encoder") != "none" and settings.get("combination") != "gpt":
        settings = {**settings, "start_token": 0, "end_token": 2}
    operator = build("operator", "warm_start", seed=seed, **settings)
    return operator.apply(CheckpointBank.open(folder / source), {})


def summary(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that have all of a task, differences on the same seed, and whether the targets are met."""
    out: dict[str, Any] = {}
    for task in args.tasks:
        whole = [row for row in rows if all(f"{task}: {start}" in row["measured"] for start in STARTS)]
        if not whole:
            continue
        each = {start: [row["measured"][f"{task}: {start}"] for row in whole] for start in STARTS}
        table = {
            start: {
                "parameters": found[0]["parameters"]["parameters"],
                "random": found[0]["parameters"]["random"],
                "loss_nats": {mark: mean_se([f["loss_nats"][mark] for f in found]) for mark in map(str, args.marks)},
                **{name: mean_se([f["measures"][name]["value"] for f in found]) for name in MEASURES},
            }
            for start, found in each.items()
        }
        floors = {name: each["rnd2rnd"][0]["measures"][f"{name}_floor"]["value"] for name in MEASURES}
        seeds = [row["seed"] for row in whole]
        out[task] = {
            "seeds": seeds,
            "starts": table,
            "source given back": floors,
            "differences_nats": differences(args, each),
        }
    return {"tasks": out, "targets": targets(args, out)}


def differences(args: argparse.Namespace, each: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Pairs of starts on the same seeds, by mark; below 0 the first is better."""
    pairs = [(start, "rnd2rnd") for start in STARTS if start != "rnd2rnd"]
    pairs += [("rnd2gpt", TWIN), ("bertshare", "bert2bert")]
    found = {}
    for one, other in pairs:
        at = {}
        for mark in map(str, args.marks):
            both = zip(each[one], each[other], strict=True)
            gaps = [a["loss_nats"][mark] - b["loss_nats"][mark] for a, b in both]
            at[mark] = {**mean_se(gaps), "each": gaps}
        found[f"{one} - {other}"] = at
    return found


def targets(args: argparse.Namespace, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What issue and paper let expect, with the numbers that say whether it came."""
    out: dict[str, Any] = {}
    warm = [start for start in STARTS if start not in ("rnd2rnd", TWIN)]
    for task, found in tasks.items():
        gaps = found["differences_nats"]
        below = {s: all(g < 0 for at in gaps[f"{s} - rnd2rnd"].values() for g in at["each"]) for s in warm}
        end = str(args.marks[-1])
        shared, both = (found["starts"][name]["parameters"] for name in ("bertshare", "bert2bert"))
        twin = gaps[f"rnd2gpt - {TWIN}"]
        out[task] = {
            "below rnd2rnd at every mark on every seed": below,
            "bertshare - bert2bert at the end": gaps["bertshare - bert2bert"][end],
            "within 0.02": abs(gaps["bertshare - bert2bert"][end]["mean"]) <= 0.02,
            "bertshare has fewer parameters by": 1 - shared / both,
            "rnd2gpt below its twin at every mark on every seed": all(
                g < 0 for at in twin.values() for g in at["each"]
            ),
        }
    return out


def draw(result: Mapping[str, Any], to: Path) -> None:
    """Losses over fine-tuning steps, one panel a task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lcsc"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(result["tasks"]), figsize=(11, 4), squeeze=False)
    for panel, (task, found) in zip(panels[0], result["tasks"].items(), strict=True):
        for number, (start, row) in enumerate(found["starts"].items()):
            marks, points = list(map(int, row["loss_nats"])), list(row["loss_nats"].values())
            style = ":" if start == TWIN else "--" if start == "rnd2rnd" else "-"
            colour = "0.3" if start in (TWIN, "rnd2rnd") else f"C{number}"
            errors = [p["se"] or 0 for p in points]
            values = [p["mean"] for p in points]
            panel.errorbar(marks, values, errors, ls=style, color=colour, marker="o", ms=3, label=start)
        panel.set(title=task, xlabel="steps of fine-tuning", xticks=marks, ylabel="held-out loss, nats a byte")
    panels[0][-1].legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results file and the figure, of what is measured by now."""
    names = ("steps", "causal_steps", "marks", "learning_rate", "num_blocks", "samples")
    result = {
        **circumstances(),
        "text": "dataset=text" if args.text is None else args.text.name,
        **{key: getattr(args, key) for key in names},
        "pretraining_windows": [BATCH, BLOCK],
        "fine_tuning_windows": TUNED,
        **summary(args, rows),
        "runs": rows,
    }
    args.to.write_text(json.dumps(result, indent=2) + "\n")
    if result["tasks"]:
        draw(result, args.figure)


def main() -> None:
    """Measure, then write the results file after every seed, and where the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", type=Path, help="a text file; without it the text of dataset=text")
    parser.add_argument("--steps", type=int, default=1500, help="of BERT's and RoBERTa's pretraining; a multiple of 4")
    parser.add_argument("--causal-steps", type=int, default=800, help="of GPT-2's, which learns from every byte")
    parser.add_argument("--marks", type=int, nargs="+", default=[50, 100, 150], help="steps of fine-tuning to look at")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the fine-tuning")
    parser.add_argument("--num-blocks", type=int, default=256, help="of the report part")
    parser.add_argument("--samples", type=int, default=64, help="sources of the report part that are written to")
    parser.add_argument("--folder", type=Path, help="keeps banks and values, and goes on with what is there")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long (exit code 75: call again)")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results" / "seq2seq_combinations.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "seq2seq_combinations.svg")
    args = parser.parse_args()
    clock, rows = Clock(args.minutes), []
    with tempfile.TemporaryDirectory() as spare:
        folder = (args.folder or Path(spare)).resolve()
        for seed in args.seeds:
            notes = Notes(folder / f"seed-{seed}" / "measured.json")
            try:
                measure(args, seed, folder / f"seed-{seed}", notes, clock)
            finally:
                rows.append({"seed": seed, "measured": notes.values})
                write(args, rows)
    print(json.dumps(summary(args, rows)["targets"], indent=2))


if __name__ == "__main__":
    main()

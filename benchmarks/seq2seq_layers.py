"""Which three of six layers, of which checkpoints, of a GPT-2 a decoder begins as: searched against rules.

    python benchmarks/seq2seq_layers.py --seeds 0 1 2 --text FILE

The source is a GPT-2 of bytes with six layers, pretrained on the training part of a text; the encoder is a random
BERT of three. `lcsc search` chooses the decoder's layers, their checkpoint and how far each of them lies towards the
last but one, by the loss of continuations of the search part after a short fine-tuning on the training part; trials
behind half-way are dropped (`search.race_steps`). The rules take the first three, the last three or every other layer
of the last checkpoint; beside them stands the mean of the last two with the first three. All are then fine-tuned anew,
longer, on other windows and from another random encoder, and measured on the report part, which nothing was decided on.
Losses are nats a byte of the targets. What lies in `--folder` is gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, circumstances, mean_se
from seq2seq_sources import TUNED, Clock, Notes, pretrained, text_of

L, DEPTH = 6, 3
RULES = {"first": (0, 1, 2), "last": (3, 4, 5), "every other": (0, 2, 4)}
#: beside the rules: what averaging alone does
AVERAGED = "first, mean of two checkpoints"
#: what the search chooses, beside how its layers are mixed
CHOSEN = ("decoder_layers", "decoder_step")
#: the same for every start: what is shared, and how attention to the encoder begins
FIXED = {"combination": "rnd2gpt", "share": "embeddings", "cross_attention": "random"}
FIXED |= {"num_encoder_layers": DEPTH, "start_token": 0, "end_token": 2}
TASK = {"task": "continue", "block_length": 64, "source_length": 32}


def search(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """The winner of `lcsc search`, what its report said, and how many trials the race dropped."""
    run = folder / "run"
    objective = {**TASK, "num_steps": args.search_steps, "train_batch_size": TUNED, "learning_rate": args.learning_rate}
    objective |= {"train_seed": seed, "warmup_steps": 10, "keep": 4, "samples": 0}
    budget = {"num_trials": args.trials, "num_images": args.search_blocks, "num_finalists": 3, "race_steps": args.race}
    budget |= {"num_images_select": 4 * args.search_blocks, "num_images_report": args.num_blocks}
    operator = {**FIXED, "num_decoder_layers": DEPTH, "decoder_other": other(args), "seed": seed}
    words = ["search", "operator=warm_start", "experiment=warm_start_small", "quiet=true", f"seed={seed}"]
    words += [f"bank.path={folder / 'gpt2'}", f"run_dir={run}", f"searcher={args.searcher}"]
    words += [f"{key}={str(value).replace(' ', '')}" for key, value in _dotted("objective", objective)]
    words += [f"{key}={str(value).replace(' ', '')}" for key, value in _dotted("search", budget)]
    words += [f"{key}={value}" for key, value in _dotted("operator", operator)]
    words += [] if args.text is None else [f"dataset.path={args.text}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "lcsc", *words], env=environment, stdout=subprocess.DEVNULL, check=True)
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    best = next(r for r in records if r["kind"] == "report" and r["who"] == "best")
    trials = [r for r in records if r["kind"] == "trial"]
    return {
        **{name: best[name] for name in CHOSEN},
        "decoder_mix": [min(max(x, 0.0), 1.0) for x in best["vector"][-DEPTH - 1 :]],  # the last box
        "label": best["label"],
        "report": {r["who"]: [r["label"], r["value"], r["se"]] for r in records if r["kind"] == "report"},
        "baselines_on_search_part": {r["label"]: r["value"] for r in records if r["kind"] == "baseline"},
        "trials": len(trials),
        "dropped": {str(n): sum(r.get("dropped_after") == n for r in trials) for n in args.race},
        "wall_seconds": json.loads((run / "summary.json").read_text())["wall_seconds"],
    }


def _dotted(section: str, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{section}.{key}", value) for key, value in settings.items()]


def other(args: argparse.Namespace) -> int:
    """Step of the last checkpoint but one."""
    return 3 * (args.steps // 4)


def starts_of(args: argparse.Namespace, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the operator: what the search chose, and the rules on the last checkpoint."""
    rules = {rule: {"decoder_layers": list(layers)} for rule, layers in RULES.items()}
    mixed = {"decoder_other": other(args)}
    searched = {name: found[name] for name in (*CHOSEN, "decoder_mix")} | mixed
    return {"searched": searched, **rules, AVERAGED: rules["first"] | mixed | {"decoder_mix": 0.5}}


def fine_tuned(
    args: argparse.Namespace, text: Any, seed: int, bank: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Losses on the report part on the way through a fine-tuning on windows that no search saw."""
    from lcsc.bank import CheckpointBank
    from lcsc.core.registry import build
    from lcsc.core.seeds import Purpose

    rate = {"learning_rate": args.learning_rate, "schedule": "constant_with_warmup", "warmup_steps": 10}
    objective = build(
        "objective",
        "seq2seq",
        dataset=text,
        **TASK,
        **rate,
        num_steps=args.marks[-1],
        train_batch_size=TUNED,
        train_seed=1000 + seed,
        keep=1,
    )
    # an encoder and attention to it of other draws than the search's
    operator = build("operator", "warm_start", **FIXED, **settings, seed=1000 + seed)
    candidate = operator.apply(CheckpointBank.open(bank), {})
    losses, before = {}, 0
    for mark in args.marks:
        blocks = objective.leg_states(
            candidate,
            seed=0,
            purpose=Purpose.REPORT,
            images=range(args.num_blocks),
            num_blocks=20,
            steps=range(before, mark),
        )
        losses[str(mark)], before = objective.value_of(blocks.states, Purpose.REPORT), mark
    return {**settings, "loss_nats": losses, "parameters": candidate.recipe["counts"]["parameters"]}


def measure(args: argparse.Namespace, seed: int, folder: Path, clock: Clock) -> dict[str, Any]:
    """One seed: its source, its search and the final fine-tunings."""
    text, notes = text_of(args.text), Notes(folder / "measured.json")
    bank = folder / "gpt2"
    clock.check()
    pretrained("gpt2", L, args.steps, args.steps // 4, text, seed, bank)
    if "search" not in notes.values:
        clock.check()
        notes.keep("search", search(args, seed, folder))
        print(seed, notes.values["search"], flush=True)
    for start, settings in starts_of(args, notes.values["search"]).items():
        if start not in notes.values:
            clock.check()
            notes.keep(start, fine_tuned(args, text, seed, bank, settings))
            print(seed, start, notes.values[start]["loss_nats"], flush=True)
    return {"seed": seed, **notes.values}


def summary(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the searched start less each rule on the same seed, by mark; below 0 it is better."""
    marks = [str(mark) for mark in args.marks]
    table = {
        start: {mark: mean_se([row[start]["loss_nats"][mark] for row in rows]) for mark in marks}
        for start in ("searched", *RULES, AVERAGED)
    }
    gaps: dict[str, Any] = {}
    for rule in (*RULES, AVERAGED):
        for mark in marks:
            each = [row["searched"]["loss_nats"][mark] - row[rule]["loss_nats"][mark] for row in rows]
            gaps[f"searched - {rule}, after {mark}"] = {**mean_se(each), "each": each}
    short = {}
    for rule in ("first", "last", "spread"):
        labels = [row["search"]["baselines_on_search_part"] for row in rows]
        short[rule] = mean_se([next(v for k, v in found.items() if k.startswith(rule)) for found in labels])
    better = {rule: all(g < 0 for g in gaps[f"searched - {rule}, after {marks[-1]}"]["each"]) for rule in RULES}
    return {
        "loss_nats": table,
        "differences_nats": gaps,
        "rules_on_search_part": short,
        "searched_better_on_every_seed_at_the_end": better,
    }


def draw(result: Mapping[str, Any], to: Path) -> None:
    """Losses over fine-tuning steps, and what each seed's search gained on each rule."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lcsc"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for start, points in result["loss_nats"].items():
        marks, rows = list(map(int, points)), list(points.values())
        style = {"lw": 2, "color": "k"} if start == "searched" else {"ls": "--"}
        left.errorbar(
            marks, [r["mean"] for r in rows], [r["se"] or 0 for r in rows], marker="o", ms=3, label=start, **style
        )
    left.set(xlabel="steps of fine-tuning", ylabel="loss on the report part, nats a byte", xticks=marks)
    left.legend(frameon=False, fontsize=8)
    for place, rule in enumerate(RULES):
        for shift, mark in zip((-0.2, 0, 0.2), marks, strict=False):
            each = result["differences_nats"][f"searched - {rule}, after {mark}"]["each"]
            right.plot([place + shift] * len(each), each, "o", ms=4, color=f"C{marks.index(mark)}")
    right.axhline(0, color="0.6", lw=0.8)
    right.set_yscale("symlog", linthresh=0.01)
    right.set(xticks=range(len(RULES)), xticklabels=list(RULES), ylabel="searched less rule, a dot a seed")
    names = [
        plt.Line2D([], [], ls="", marker="o", color=f"C{i}", label=f"{mark} steps") for i, mark in enumerate(marks)
    ]
    right.legend(handles=names, frameon=False, fontsize=8)
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    """Measure, then write the results file after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", type=Path, help="a text file; without it the text of dataset=text")
    parser.add_argument("--steps", type=int, default=600, help="of the pretraining; a multiple of 4")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--searcher", default="one_plus_one")
    parser.add_argument("--search-steps", type=int, default=30, help="of fine-tuning a trial")
    parser.add_argument("--race", type=int, nargs="+", default=[15], help="steps after which trials may be dropped")
    parser.add_argument("--search-blocks", type=int, default=64, help="of the search part, a trial")
    parser.add_argument("--marks", type=int, nargs="+", default=[50, 150], help="steps of the final fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of all fine-tuning")
    parser.add_argument("--num-blocks", type=int, default=256, help="of the report part")
    parser.add_argument("--folder", type=Path, help="keeps banks and values, and goes on with what is there")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long (exit code 75: call again)")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results" / "seq2seq_layers.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "seq2seq_layers.svg")
    args = parser.parse_args()
    args.text = None if args.text is None else args.text.resolve()
    clock, rows = Clock(args.minutes), []
    with tempfile.TemporaryDirectory() as spare:
        folder = (args.folder or Path(spare)).resolve()
        for seed in args.seeds:
            rows.append(measure(args, seed, folder / f"seed-{seed}", clock))
            names = ("steps", "trials", "searcher", "search_steps", "race", "search_blocks", "marks", "learning_rate")
            result = {
                **circumstances(),
                "seeds": [row["seed"] for row in rows],
                "text": "dataset=text" if args.text is None else args.text.name,
                **{key: getattr(args, key) for key in (*names, "num_blocks")},
                **summary(args, rows),
                "runs": rows,
            }
            args.to.write_text(json.dumps(result, indent=2) + "\n")
            draw(result, args.figure)
        print(json.dumps(result["differences_nats"], indent=2))


if __name__ == "__main__":
    main()

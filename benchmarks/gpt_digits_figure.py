"""Prompted against observed metric of every task in gpt_digits.json.

python benchmarks/gpt_digits_figure.py benchmarks/results/gpt_digits.json docs/images/gpt_digits.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TITLES = {
    "linear": "linear, own initial weights",
    "shared": "8 hidden units, one initial network",
    "error": "linear, prompted with the error",
    "error_long": "the same, 1,000 runs and 3,000 steps",
    "neurons": "8 hidden units, own initial weights,\na token a neuron",
    "neurons_prompts": "the same, pairs drawn as prompts",
    "neurons_long": "the same, 2,000 runs and 3,000 steps",
    "aligned": "units aligned to a reference instead",
    "plain": "units in random order",
    "uniform": "linear, saves evenly in the step",
}


def main() -> None:
    """Draw the pieces' curves, one panel a task and one line a seed."""
    source, target = map(Path, sys.argv[1:])
    pieces = json.loads(source.read_text())["pieces"]
    tasks = [task for task in TITLES if any(piece["task"] == task for piece in pieces)]
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.1 * rows), layout="constrained")
    for place, task in enumerate(tasks):
        ax = figure.add_subplot(rows, columns, place + 1)
        for piece in (piece for piece in pieces if piece["task"] == task):
            told = piece["held_out"]
            x, y, spread = (np.array(told[key]) for key in ("prompts", "observed", "observed_std"))
            (line,) = ax.plot(x, y, marker=".", linewidth=1, label=f"seed {piece['seed']}")
            ax.fill_between(x, y - spread, y + spread, alpha=0.15, color=line.get_color(), linewidth=0)
        ends = np.array(ax.get_xlim())
        ax.plot(ends, ends, color="0.6", linestyle="--", linewidth=1, zorder=0)
        ax.set_title(TITLES[task], fontsize=9)
        ax.set_xlabel("prompt", fontsize=8)
        ax.set_ylabel("measured after one update", fontsize=8)
        ax.tick_params(labelsize=8)
    figure.axes[0].legend(fontsize=8, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    main()

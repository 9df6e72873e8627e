"""Bits that a search gave to the parts of a small language model, beside the same bits everywhere.

    python benchmarks/codec_front.py --seed 0 --work codec_work --to codec_front.json

Trains the bank of experiment=codec_small and makes two searches on the search half of the text, one by the loss and one
by the divergence from the exact checkpoint (objective `distillation`). For each width the same bits everywhere stand
against each search's best trial that takes no more bytes, and everything is scored by its loss on the report half: as
it is read back, and after 10 and 50 steps of continued training from a new optimizer. A change is the difference from
the exact checkpoint, trained alike, block by block. Each piece is saved when it is done, and the same line goes on with
the next.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from codec_search import evaluator_of
from pieces import add_options, run_pieces
from search_honesty import problem
from search_honesty import searched as search_of
from searches import bank

from lcsc.core.pareto import pareto
from lcsc.core.seeds import Purpose
from lcsc.operators.base import Candidate
from lcsc.operators.compress import WIDTHS, Compress

#: what the trials of a search are scored by, and blocks of the search half that they are scored on
SEARCHES = {"searched": ("language_modeling", 352), "distilled": ("distillation", 128)}
KINDS = ("uniform", *SEARCHES)
#: widths that are held against a searched one, and those that are scored as they are read back
HELD, PLAIN = (3, 4, 5), WIDTHS
#: and with one anchor for the whole bank
LONG = "uniform 4, one anchor"


class Front:
    """One seed, piece by piece."""

    def __init__(self, row: dict, args: argparse.Namespace) -> None:
        self.row, self.trials, self.groups = row, args.trials, args.groups
        self.after, self.images = tuple(map(int, args.after.split(","))), range(args.images)
        words = ["experiment=codec_small", f"seed={args.seed}", f"trainer.num_steps={args.steps}"]
        self.place = args.work / f"codec-front-{args.seed}-{args.steps}"
        self.train_words, self.words = words, [*words, f"bank.path={self.place}"]

    def pieces(self) -> dict[str, Callable[[], None]]:
        """By name, in order."""
        found: dict[str, Callable[[], None]] = {"train": self.train}
        plain = ["exact", *(f"uniform {width}" for width in PLAIN), LONG]
        found |= {f"after/0/{name}": functools.partial(self.score, 0, name) for name in plain}
        found |= {f"search/{kind}": functools.partial(self.search, kind) for kind in SEARCHES}
        pairs = [f"{kind} {width}" for width in HELD for kind in KINDS]
        for steps in self.after:
            for name in ("exact", *pairs):
                found[f"after/{steps}/{name}"] = functools.partial(self.score, steps, name)
        found["divergence"] = self.divergence
        found["pairs"] = self.pair
        return found

    def train(self) -> None:
        """The bank."""
        bank(self.train_words, self.place)

    def search(self, kind: str) -> None:
        """All trials, and for each width the best of those that take no more bytes than it does everywhere."""
        objective, blocks = SEARCHES[kind]
        more = ["searcher=additive_front", f"operator.mean_bits={WIDTHS[-1]}", f"operator.num_groups={self.groups}"]
        more += [f"search.num_trials={self.trials}", f"search.num_images={min(blocks, len(self.images))}"]
        more += ["search.num_images_select=16", "search.num_images_report=16"]  # the trials are what is wanted
        more += self.teacher if objective == "distillation" else []
        _, records = search_of(problem([*self.words, *more]))
        trials = [record for record in records if record["kind"] == "trial" and record["value"] is not None]
        cost_N, loss_N = (np.array([trial[key] for trial in trials]) for key in ("file_bytes", "value"))
        kept = pareto(cost_N, loss_N)
        self.row.setdefault("fronts", {})[kind] = [
            {key: trial[key] for key in ("bits", "file_bytes", "value")}
            for trial, keep in zip(trials, kept, strict=True)
            if keep
        ]
        for width in HELD:
            most = self.row["scores"][f"uniform {width}"]["file_bytes"]
            fit = [trial for trial in trials if trial["file_bytes"] <= most]
            plain = self.row["scores"][f"uniform {width}"]  # where so few trials hold none that is small enough
            best = min(fit, key=lambda trial: trial["value"]) if fit else plain
            self.row.setdefault("found", {})[f"{kind} {width}"] = best["bits"]

    @property
    def teacher(self) -> list[str]:
        """Words for the divergence from the last checkpoint, whose copies are searched."""
        return ["objective=distillation", f"objective.teacher={max(self.place.glob('checkpoint-*'))}"]

    def divergence(self) -> None:
        """From the exact checkpoint, on the report half, of all that was scored as it is read back."""
        evaluator = evaluator_of([*self.words, *self.teacher])
        for name, own in self.row["scores"].items():
            made = self.candidate(evaluator.bank, name)
            score = evaluator.objective(made, seed=0, purpose=Purpose.REPORT, images=self.images, full=True)
            own["divergence"] = {"value": score.value, "se": score.se, "agreement": score.others["agreement"]["value"]}

    def score(self, steps: int, name: str) -> None:
        """Loss on the report half after so many steps, and what it is above the exact one's."""
        more = ["objective=uptrained_loss", f"objective.num_steps={steps}"] if steps else []
        evaluator = evaluator_of([*self.words, *more])
        objective, made = evaluator.objective, self.candidate(evaluator.bank, name)
        blocks = objective.block_states(
            made, seed=0, purpose=Purpose.REPORT, images=self.images, num_blocks=len(self.images)
        )
        losses_N = np.array([total for _, total in blocks.states])
        where_N = objective._groups(objective._rows(0, Purpose.REPORT, self.images))  # neighbours are alike
        losses_S = [float(losses_N[where_N == stretch].mean()) for stretch in np.unique(where_N)]
        own = self.row.setdefault("scores", {}).setdefault(name, {"after": {}})
        own |= {key: made.recipe[key] for key in ("bits", "file_bytes", "ratio") if key in made.recipe}
        own |= dict(made.measured)
        own["after"][str(steps)] = {"loss": float(losses_N.mean()), "stretches": losses_S}
        own["after"][str(steps)] |= self.difference(name, "exact", steps)

    def difference(self, one: str, other: str, steps: int) -> dict[str, float]:
        """Of two losses, with the standard error of the mean over stretches of text."""
        a_S, b_S = (np.array(self.row["scores"][name]["after"][str(steps)]["stretches"]) for name in (one, other))
        apart_S = a_S - b_S
        return {"change": float(apart_S.mean()), "change_se": float(apart_S.std(ddof=1) / np.sqrt(len(apart_S)))}

    def pair(self) -> None:
        """Searched bits against the same bits everywhere."""
        self.row["pairs"] = {}
        for kind, width in itertools.product(SEARCHES, HELD):
            one, other = f"{kind} {width}", f"uniform {width}"
            if one not in self.row["scores"]:
                continue
            nbytes = [self.row["scores"][name]["file_bytes"] for name in (one, other)]
            both = [self.row["scores"][name]["after"] for name in (one, other)]
            found = {steps: self.difference(one, other, int(steps)) for steps in both[0] if steps in both[1]}
            self.row["pairs"][one] = {"bytes": nbytes[0] - nbytes[1], "after": found}

    def candidate(self, bank_: object, name: str) -> Candidate:
        """By its name."""
        operator = Compress(num_groups=self.groups)
        if name == LONG:
            operator = replace(operator, anchor_every=bank_.num_checkpoints)
        if name == "exact":
            row_P = bank_.matrix()[-1]
            return Candidate(bank_.arch, bank_.layout, lambda out: out.copy_(row_P), {}, bank_.constants)
        G = len(operator.groups(bank_))
        bits = self.row["found"][name] if name in self.row.get("found", {}) else [int(name.split()[1].rstrip(","))] * G
        floats = np.array([(WIDTHS.index(width) + 0.5) / len(WIDTHS) for width in bits])
        return operator.apply(bank_, {"bits": floats})


def draw(results: dict, to: Path) -> None:
    """Change of the loss against bytes, searched bits beside uniform ones, a panel for each number of steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = sorted({int(steps) for row in results["seeds"] for steps in row["scores"]["exact"]["after"]})
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2 + 3.4 * len(shown), 3.8), constrained_layout=True, squeeze=False, sharey=True
    )
    for ax, steps in zip(axes[0], shown, strict=True):
        for kind, color, mark, label in (
            ("uniform", "#888888", "s", "uniform bits"),
            ("searched", "#1f77b4", "o", "searched by the loss"),
            ("distilled", "#d95f02", "^", "by the divergence"),
        ):
            for row in results["seeds"]:
                own = [one for name, one in row["scores"].items() if name.startswith(kind) and name != LONG]
                points = sorted(
                    ((one["file_bytes"], one["after"][str(steps)]) for one in own if str(steps) in one["after"]),
                    key=lambda point: point[0],
                )
                ax.errorbar(
                    [nbytes / 1e3 for nbytes, _ in points],
                    [1e3 * after["change"] for _, after in points],
                    [1e3 * after["change_se"] for _, after in points],
                    fmt=f"{mark}-",
                    color=color,
                    label=label if row is results["seeds"][0] else None,
                    linewidth=0.8,
                    markersize=4,
                )
        ax.axhline(0, color="#bbbbbb", linewidth=0.8)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_title(f"after {steps} steps" if steps else "as it is read back", fontsize=10)
        ax.set_xlabel("kB of a coded checkpoint, anchors included")
    axes[0][0].set_ylabel("change of the loss, 1/1000 nat")
    axes[0][0].legend(frameon=False)
    figure.savefig(to, dpi=110)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=180, help="one for each tensor and width, then their sums")
    parser.add_argument("--groups", type=int, default=1000, help="as many put each tensor into one of its own")
    parser.add_argument("--steps", type=int, default=200, help="of the training")
    parser.add_argument("--after", default="0,10,50", help="steps of continued training; the first is 0")
    parser.add_argument("--images", type=int, default=352, help="blocks of text; each half of the default text has 352")
    parser.add_argument("--draw", type=Path, help="draw the figure of the results file, and measure nothing")
    add_options(parser)
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.to.read_text()), args.draw)
        return
    run_pieces(args, lambda row: Front(row, args).pieces(), trials=args.trials, steps=args.steps)


if __name__ == "__main__":
    main()

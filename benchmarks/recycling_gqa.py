"""Grouped-query attention from a multi-head model: which pooling, and which heads in which layer.

    python benchmarks/recycling_gqa.py --seeds 0 1 2 --folder work --to benchmarks/results/recycling_gqa.json

Every seed trains a model of 8 key/value heads, makes models of 8, 4, 2 and 1 of it by each pooling, and trains each for
another 5 % of the steps. Layers may keep different numbers of heads: for two poolings and two sums of heads the numbers
are searched, one layer at a time (`additive`) and by an evolution strategy over the joint loss (`evolution`), and
compared with equal numbers, whose cache has the same bytes. Losses are on the text's report half, which neither
training nor search saw. The same call goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, mean_se

from lcsc.bank import CheckpointBank
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.datasets.base import TextPart
from lcsc.export.transform import transform_model
from lcsc.export.weights import read_recipe
from lcsc.models.causal_lm import token_losses
from lcsc.models.decoding import decode_speed
from lcsc.models.network import load_network
from lcsc.operators.gqa import METHODS, Gqa
from lcsc.recycling.budget import additive_choice
from lcsc.search.budget import Budget
from lcsc.search.problem import Problem
from lcsc.search.run import run_search
from lcsc.training.causal_lm import CausalLM

HEADS, BLOCK = 8, 128
GROUPS = (8, 4, 2, 1)
#: the settings of the comparison of searched with equal numbers, fixed beforehand: each with each, in every seed
POOLINGS, MEANS = ("aligned", "mean"), (4, 2)


def arch(args: argparse.Namespace) -> dict[str, Any]:
    """The multi-head model."""
    sizes = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    rest = {"max_position_embeddings": BLOCK, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    return {"class": "LlamaForCausalLM", "config": {"vocab_size": 256, **sizes, **heads, **rest}}


class Seed:
    """All models of one seed; what was made is not made again."""

    def __init__(self, args: argparse.Namespace, seed: int, folder: Path) -> None:
        self.args, self.seed, self.folder = args, seed, folder / f"seed-{seed}"
        self.text = build("dataset", "text", path=args.text)
        self.scorer = build("objective", "language_modeling", dataset=self.text, block_length=BLOCK, device="cpu")
        self.made = self.folder / "made.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(self.made.read_text()) if self.made.exists() else {}
        trainer = CausalLM(learning_rate=2e-3, warmup_steps=args.steps // 30, **self._steps(args.steps))
        out = trainer.train(arch=arch(args), model=None, dataset=self.text, out=self.folder / "base", seed=seed)
        self.base = out / f"checkpoint-{args.steps:06d}"

    def _steps(self, num: int) -> dict[str, Any]:
        batch = self.args.batch
        return {"num_steps": num, "save_every": num, "batch_size": batch, "block_length": BLOCK, "schedule": "linear"}

    def uptrained(self, counts: Sequence[int], pooling: str) -> dict[str, Any]:
        """Losses at once and after 5 % more steps of the model with so many heads in each layer."""
        key = f"{pooling}-{'.'.join(map(str, counts))}"
        if key not in self.rows:
            to, num = self.folder / key / "start", round(0.05 * self.args.steps)
            operator = Gqa(num_kv_heads=list(counts), pooling=pooling, repeat_heads=False, seed=self.seed)
            streamed = CheckpointBank.open(self.base, storage="streamed")
            if not to.exists():
                transform_model(streamed, operator, to)
            made = operator.plan(streamed)
            trainer = CausalLM(learning_rate=1e-3, warmup_steps=max(1, num // 15), start=str(to), **self._steps(num))
            out = trainer.train(
                arch=made.arch, model=None, dataset=self.text, out=self.folder / key / "trained", seed=self.seed
            )
            params = sum(p.numel() for p in load_network(to).parameters())
            tokens = num * self.args.batch * BLOCK
            self.rows[key] = {
                "num_kv_heads": list(counts),
                "pooling": pooling,
                "cache_bytes_per_token": made.recipe["stored_cache_bytes_per_token"],
                "loss_start": self.loss(to),
                "loss_uptrained": self.loss(out / f"checkpoint-{num:06d}"),
                "parameters": params,
                "tokens": tokens,
                "flops": 6 * params * tokens,
            }
            self.made.write_text(json.dumps(self.rows, indent=2))
        return self.rows[key]

    @torch.no_grad()
    def loss(self, model: Path) -> float:
        """Mean loss of a token on the report half, in nats, by the model that the folder holds."""
        net = load_network(model)
        blocks_BT = self.text.tokens(TextPart.REPORT).unflatten(1, (-1, BLOCK)).flatten(0, 1).long()
        return float(torch.cat([token_losses(net, part_NT) for part_NT in blocks_BT.split(64)]).double().mean())

    def additive(self, pooling: str, budgets: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Numbers of heads for each budget, from losses of one layer at a time on the search half."""
        bank, seen = CheckpointBank.open(self.base), {}

        def loss(counts: tuple[int, ...]) -> float:
            if counts not in seen:
                operator = Gqa(num_kv_heads=list(counts), pooling=pooling, grouping="order", repeat_heads=False)
                seen[counts] = self.scorer(
                    operator.apply(bank, {}), seed=self.seed, purpose=Purpose.SEARCH, images=range(self.args.blocks)
                ).value
            return seen[counts]

        found = {}
        for budget in budgets:
            counts, predicted = additive_choice(loss, self.args.layers, GROUPS, budget)
            found[budget] = {"num_kv_heads": list(counts), "predicted": predicted, "num_scores": len(seen)}
        for row in found.values():
            row["search_half"] = loss(tuple(row["num_kv_heads"]))
        return found

    def evolution(self, pooling: str, budget: int) -> list[int]:
        """Numbers of heads by a search of the joint loss, with twice the additive search's scores."""
        operator = Gqa(max_kv_heads=budget, pooling=pooling, grouping="order", repeat_heads=False)
        many = self.args.blocks
        spend = Budget(2 * (1 + 3 * self.args.layers), many, 2, many, many)
        problem = Problem(
            CheckpointBank.open(self.base), operator, build("searcher", "cma"), self.scorer, spend, self.seed
        )
        path = self.folder / f"search-{pooling}-{budget}"
        run_search(problem, name="gqa", run_dir=path, quiet=True)
        return list(read_recipe(path / "best")["num_kv_heads"])

    def row(self) -> dict[str, Any]:
        """All numbers of the seed."""
        began = time.perf_counter()
        layers = self.args.layers
        uniform = {}
        for groups in GROUPS:
            for pooling in METHODS if groups < HEADS else ("aligned",):
                uniform[f"{pooling}-{groups}"] = self.uptrained([groups] * layers, pooling)
        searched = []
        for pooling in POOLINGS:
            found = self.additive(pooling, [mean * layers for mean in MEANS])
            for mean in MEANS:
                additive = found[mean * layers]
                evolution = self.evolution(pooling, mean * layers)
                searched.append(
                    {
                        "pooling": pooling,
                        "mean_heads": mean,
                        "uniform": uniform[f"{pooling}-{mean}"],
                        "additive": {**additive, **self.uptrained(additive["num_kv_heads"], pooling)},
                        "evolution": self.uptrained(evolution, pooling),
                    }
                )
        return {"seed": self.seed, "uniform": uniform, "searched": searched, "seconds": time.perf_counter() - began}

    def decode(self, groups: int) -> dict[str, Any]:
        """Speed with a long cache, and the bytes that the cache really holds for each token."""
        net = load_network(self.folder / f"aligned-{'.'.join([str(groups)] * self.args.layers)}" / "start")
        text_L = self.text.tokens(TextPart.REPORT).flatten()[: self.args.texts * self.args.context].long()
        prompt_NT = text_L.view(self.args.texts, self.args.context)
        with torch.inference_mode():
            cache = net(input_ids=prompt_NT, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return {**decode_speed(net, prompt_NT, 16), "cache_bytes_per_token": held / prompt_NT.numel()}


def tables(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and which of the targets were reached."""
    uniform = {
        key: {when: mean_se([row["uniform"][key][when] for row in rows]) for when in ("loss_start", "loss_uptrained")}
        for key in rows[0]["uniform"]
    }
    few = [groups for groups in GROUPS if groups < HEADS]
    cells = [(row["uniform"], groups) for row in rows for groups in few]

    def ordered(*names: str, when: str = "loss_uptrained") -> list[int]:
        right = [all(u[f"{a}-{g}"][when] < u[f"{b}-{g}"][when] for a, b in itertools.pairwise(names)) for u, g in cells]
        return [sum(right), len(right)]

    wins: dict[str, Any] = {}
    for how in ("additive", "evolution"):
        for when in ("loss_start", "loss_uptrained"):
            gains = [part["uniform"][when] - part[how][when] for row in rows for part in row["searched"]]
            wins[f"{how}_{when}"] = {"better": sum(gain > 0 for gain in gains), "of": len(gains), **mean_se(gains)}
    targets = {
        "mean<first<random after": ordered("mean", "first", "random"),
        "aligned<mean at start": ordered("aligned", "mean", when="loss_start"),
        "aligned<mean after": ordered("aligned", "mean"),
        "searched": wins,
    }
    return {"uniform": uniform, "targets": targets}


def figure(result: dict[str, Any]) -> bytes:
    """Loss against cache at once and after uptraining, mean ± SE over the seeds."""
    from lcsc.report.style import FAINT, GROUP_COLORS, INK, new_figure, png, styled, subtitle

    panels = {"loss_start": "at once", "loss_uptrained": f"after 5 % more steps ({result['steps'] // 20})"}

    @styled
    def draw() -> Any:
        picture = new_figure(4.4, "Key/value heads of a multi-head model, pooled")
        seeds, runs = len(result["runs"]), result["runs"]
        subtitle(
            picture, f"nats a byte on held-out text · mean ± SE of {seeds} seeds · stars: numbers by layer, searched"
        )
        for place, (when, title) in enumerate(panels.items()):
            ax = picture.add_axes((0.075 + 0.49 * place, 0.135, 0.41, 0.665))
            whole = result["uniform"][f"aligned-{HEADS}"][when]["mean"]
            ax.axhline(whole, color=FAINT, linewidth=1, linestyle=":")
            ax.text(GROUPS[-1], whole, "all 8 heads", fontsize=8, color=FAINT, va="bottom")
            for pooling, color in zip(METHODS, GROUP_COLORS, strict=False):
                cells = [result["uniform"][f"{pooling}-{groups}"][when] for groups in GROUPS[1:]]
                means, errors = [cell["mean"] for cell in cells], [cell["se"] for cell in cells]
                ax.errorbar(GROUPS[1:], means, errors, fmt="o-", color=color, capsize=3, label=pooling)
                for mean in MEANS if pooling in POOLINGS else ():
                    parts = [
                        p for row in runs for p in row["searched"] if (p["pooling"], p["mean_heads"]) == (pooling, mean)
                    ]
                    star = mean_se([part["additive"][when] for part in parts])
                    ax.errorbar(
                        [mean], [star["mean"]], [star["se"]], fmt="*", color=color, markersize=13, mec=INK, mew=0.6
                    )
            ax.set_xscale("log", base=2)
            ax.set_xticks(GROUPS[1:], [str(groups) for groups in GROUPS[1:]])
            ax.set_xlabel("key/value heads a layer, of 8 (mean over the layers)")
            ax.set_title(title, fontsize=10)
            ax.grid(axis="y")
        picture.axes[0].set_ylabel("loss")
        picture.axes[0].legend(frameon=False, fontsize=9, loc=(0.04, 0.12))
        return picture

    return png(draw())


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", help="a text file, or a folder of them; the package's own text without it")
    parser.add_argument("--steps", type=int, default=2800, help="of the base; uptraining takes 5 %% of them")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=128, help="of the search half that score a trial")
    parser.add_argument("--texts", type=int, default=8, help="continued at once when the speed is measured")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache when the speed is measured")
    parser.add_argument("--folder", type=Path, help="keeps models and runs, and goes on with what is there")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/recycling_gqa.json"))
    parser.add_argument("--figure", type=Path, help="a PNG of the means")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as spare:
        folder = args.folder or Path(spare)
        for seed in args.seeds:
            done = folder / f"seed-{seed}.json"
            if not done.exists():
                row = Seed(args, seed, folder).row()
                done.write_text(json.dumps(row, indent=2))
            rows.append(json.loads(done.read_text()))
        first = Seed(args, args.seeds[0], folder)
        decode = {str(groups): first.decode(groups) for groups in GROUPS}
    settings = {key: value for key, value in vars(args).items() if key not in ("folder", "to", "figure")}
    result = {**circumstances(), "threads": torch.get_num_threads(), **settings, **tables(rows), "decode": decode}
    result["runs"] = rows
    args.to.write_text(json.dumps(result, indent=2) + "\n")
    if args.figure:
        args.figure.write_bytes(figure(result))
    print(json.dumps(result["targets"], indent=2))


if __name__ == "__main__":
    main()

"""Weights of small classifiers of digits, generated when a metric is asked for (G.pt), on runs that are held out.

    python benchmarks/gpt_digits.py --pieces linear:0 linear:1 --folder build/gpt    # some pieces, kept in the folder
    python benchmarks/gpt_digits.py --folder build/gpt --to benchmarks/results/gpt_digits.json    # what is missing, all

Every piece trains its own runs and its own generator from its seed. Prompts and their alignment are on the search part
of the images; `report` is on the report part, which nothing has seen. All baselines begin where the generator does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, mean_se

from lcsc.core.registry import describe
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.digits import Digits
from lcsc.models.many_classifiers import Many
from lcsc.models.parameter_dit import ParameterDiT
from lcsc.models.parameter_sampling import propose, updated
from lcsc.models.weight_runs import WeightRuns
from lcsc.recycling.neurons import aligning, hidden_layers, matched_distances
from lcsc.training.folder import BankFolder
from lcsc.training.parameter_dit import ParameterDiTTrainer
from lcsc.training.weight_fit import fit_generator, new_generator
from lcsc.training.weight_rivals import RATES, descend, diversity, equal_time
from lcsc.training.weight_runs import INIT, make_runs, parts_of

SMALL = {"num_runs": 300, "num_held_out": 20, "chunk": 34, "num_steps": 900, "batch_size": 64, "learning_rate": 2e-3}
MANY = {**SMALL, "num_runs": 1000, "run_steps": 300, "run_batch_size": 32, "num_steps": 700}
PROMPTS = {**MANY, "tokens": "neurons", "pairs": "prompts"}
LONG = {**PROMPTS, "num_runs": 2000, "run_batch_size": 64, "num_steps": 3000}
#: hidden units, and settings of the trainer
TASKS = {
    "linear": ([], SMALL),
    "shared": ([8], {**SMALL, "init": "shared"}),
    "error": ([], {**SMALL, "metric": "error"}),
    "error_long": ([], {**SMALL, "metric": "error", "pairs": "prompts", "num_runs": 1000, "num_steps": 3000}),
    "plain": ([8], {**MANY, "permute": True}),
    "aligned": ([8], {**MANY, "align": True}),
    "neurons": ([8], {**MANY, "tokens": "neurons"}),
    "neurons_prompts": ([8], PROMPTS),
    "neurons_long": ([8], LONG),
    "uniform": ([], {**SMALL, "saves": "uniform"}),
}
NUM_PROMPTS, NUM_UPDATES, MEAN_OF = 20, 5, 5
#: longest way of an optimizer that is looked at for the loss of one update
MOST_STEPS = 500


def fitted(
    net: ParameterDiT, learned: WeightRuns, trainer: ParameterDiTTrainer, seeds: SeedRange, place: Path
) -> tuple[ParameterDiT, float]:
    """The trained generator and its CPU seconds; one that was stopped goes on, and is told as if it had not been."""
    folder = BankFolder(place, {"trainer": describe("trainer", trainer), "seed": seeds.seed}, (0,), component="")
    place.mkdir(parents=True, exist_ok=True)
    folder.create()
    took = place / "seconds.json"
    before = 0
    if folder.state_path.exists():
        with safe_open(folder.state_path, "pt") as file:
            before = int(file.metadata()["step"])
    began = time.process_time()
    with folder.lock():
        net = fit_generator(net, learned, trainer.fit_settings, seeds, folder, progress=False)
    if not took.exists():
        seconds = time.process_time() - began
        took.write_text(json.dumps(seconds * trainer.num_steps / max(1, trainer.num_steps - before)))
    return net, json.loads(took.read_text())


class Piece:
    """One task and seed: its runs, its generator, and what is measured of them."""

    def __init__(self, task: str, seed: int, keep: Path) -> None:
        hidden, settings = TASKS[task]
        self.trainer = ParameterDiTTrainer(**settings)
        self.many = Many({"class": "SmallClassifier", "config": {"hidden": hidden}})
        self.parts, self.seeds = parts_of(Digits(), self.many), SeedRange(seed, Purpose.TRAIN)
        made = keep / f"{task}-{seed}-runs.pt"
        if not made.exists():
            began = time.process_time()
            runs = make_runs(self.trainer.run_settings, self.many, self.parts, seed)
            keep.mkdir(parents=True, exist_ok=True)
            torch.save({**vars(runs), "seconds": time.process_time() - began}, made)
        told = torch.load(made, weights_only=False)  # written here
        self.seconds_runs, runs = told.pop("seconds"), WeightRuns(**told)
        num = self.trainer.num_held_out
        self.learned, self.held = runs.part(slice(0, -num)), runs.part(slice(-num, None))
        net = new_generator(self.learned, self.trainer.sizes, self.trainer.metric, self.trainer.align, self.seeds)
        self.net, self.seconds_fit = fitted(net, self.learned, self.trainer, self.seeds, keep / f"{task}-{seed}")
        self.metric = self.trainer.metric
        self.layers = hidden_layers(runs.shapes)

    def measured(self, theta_NP: torch.Tensor, part: int = 1, metric: str | None = None) -> torch.Tensor:
        """The metric on the search part (1) or the report part (2)."""
        return self.many.metrics(theta_NP, self.parts.x[part], self.parts.labels[part])[metric or self.metric]

    def noise(self, theta_NP: torch.Tensor, stream: int = 21) -> np.ndarray:
        return self.seeds.normal(range(len(theta_NP)), tuple(theta_NP.shape[1:]), stream)

    def asked(self, runs, goals_RG: torch.Tensor) -> torch.Tensor:
        """Observed metric of one update from the first checkpoint of each run, shape (R, G)."""
        R, G = goals_RG.shape
        theta_NP = runs.theta_RKP[:R, :1].expand(-1, G, -1).flatten(0, 1)
        now_N = runs.metric(self.metric)[:R, :1].expand(-1, G).flatten()
        out_NP = propose(self.net, theta_NP, now_N, goals_RG.flatten(), torch.from_numpy(self.noise(theta_NP)))
        return self.measured(out_NP).reshape(R, G)

    def alignment(self, runs) -> dict:
        """How well one update heeds its prompt: R2 of prompts for the observed metric, averaged over networks."""
        now_R = runs.metric(self.metric)[: self.trainer.num_held_out, 0]
        share_G = torch.linspace(0, 1, NUM_PROMPTS)
        goals_RG = self.net.best + share_G * (now_R[:, None] - self.net.best)
        seen_RG = self.asked(runs, goals_RG)
        rng = self.seeds.generator(0, 22)
        mixed_RG = torch.stack([goal_G[torch.from_numpy(rng.permutation(NUM_PROMPTS))] for goal_G in goals_RG])
        from scipy.stats import spearmanr

        ranks = [spearmanr(a, b).statistic for a, b in zip(goals_RG.numpy(), seen_RG.numpy(), strict=True)]
        return {
            "r2": r2(seen_RG, goals_RG),
            "r2_shuffled": r2(seen_RG, mixed_RG),
            "spearman": float(np.nanmean(ranks)),
            "prompts": goals_RG.mean(0).tolist(),
            "observed": seen_RG.mean(0).tolist(),
            "observed_std": seen_RG.std(0).tolist(),
        }

    def update(self) -> dict:
        """One update at the best prompt, and some more, told the measured metric each time."""
        theta_NP, now_N = self.held.theta_RKP[:, 0], self.held.metric(self.metric)[:, 0]
        goals = [torch.full_like(now_N, self.net.best)] * NUM_UPDATES
        noises = np.stack([self.noise(theta_NP, 30 + s) for s in range(NUM_UPDATES)])
        self.ways = updated(self.net, theta_NP, now_N, goals, noises, measure=self.measured)
        first_N = self.measured(self.ways[0])
        beyond = self.net.best * torch.tensor([0.75, 0.5, 0.0])
        extra_RG = self.asked(self.held, beyond.expand(len(now_N), -1))
        return {
            "start": float(now_N.mean()),
            "prompt": self.net.best,
            "after": float(first_N.mean()),
            "after_std": float(first_N.std()),
            "ratio": float((first_N / now_N).mean()),
            "updates": [float(self.measured(theta_NP).mean()) for theta_NP in self.ways],
            "report": {m: float(self.measured(self.ways[0], 2, m).mean()) for m in ("loss", "error")},
            "beyond": dict(zip(map(str, beyond.tolist()), extra_RG.mean(0).tolist(), strict=True)),
        }

    def rivals(self) -> dict:
        """Baselines on the report part, and how long optimizers take to the loss of one update."""
        theta_NP, now_N = self.held.theta_RKP[:, 0], self.held.metric(self.metric)[:, 0]
        seen_MP, seen_M = self.learned.theta_RKP.flatten(0, 1), self.learned.metric(self.metric).flatten()
        run_M = torch.arange(len(self.learned.names)).repeat_interleave(self.learned.theta_RKP.shape[1])
        order, kept = torch.argsort(seen_M, stable=True).tolist(), {}
        for m in order:
            kept.setdefault(int(run_M[m]), m)
            if len(kept) == MEAN_OF:
                break
        few_MP = seen_MP[list(kept.values())].double().numpy()
        if self.layers:
            few_MP = np.take_along_axis(few_MP, aligning(self.layers, few_MP, few_MP[0]), 1)
        copied_P = seen_MP[order[0]]
        noise_NP = torch.from_numpy(self.noise(theta_NP, 40))
        found = {
            "nearest": copied_P[None],
            "mean_of_5": torch.from_numpy(few_MP).float().mean(0)[None],
            "noise_0.05": copied_P + 0.05 * copied_P.std() * noise_NP,
            "noise_0.1": copied_P + 0.1 * copied_P.std() * noise_NP,
        }
        ends, told = equal_time(self.net, self.many, self.parts, theta_NP[0], float(now_N[0]), 10, self.metric)
        found |= {f"{kind}_equal_time": theta_P[None] for kind, theta_P in ends.items()}
        reports = {
            name: {m: float(self.measured(some_NP, 2, m).mean()) for m in ("loss", "error")}
            for name, some_NP in found.items()
        }
        return {"report": reports, "time": told}

    def memory(self, share: float) -> dict:
        """Whether samples are copies: distances with hidden units matched, at a prompt between best (0) and start (1).

        `own` is the held-out run's own checkpoint of the sample's metric, `copy` the training checkpoint of it.
        """
        theta_NP, now_N = self.held.theta_RKP[:6, 0], self.held.metric(self.metric)[:6, 0]
        goal_N = self.net.best + share * (now_N - self.net.best)
        samples_NP = propose(self.net, theta_NP, now_N, goal_N, torch.from_numpy(self.noise(theta_NP, 50)))
        reached_N = self.measured(samples_NP)
        seen_MP = self.learned.theta_RKP.flatten(0, 1).double().numpy()
        seen_M = self.learned.metric(self.metric).flatten()
        made, true, own, copy = [], [], [], []
        for r in range(len(samples_NP)):
            sample_P = samples_NP[r].double().numpy()
            k = int((self.held.metric(self.metric)[r] - reached_N[r]).abs().argmin())
            truth_P = self.held.theta_RKP[r, k].double().numpy()
            near_P = seen_MP[int((seen_M - self.held.metric(self.metric)[r, k]).abs().argmin())]
            made.append(float(matched_distances(self.layers, sample_P, seen_MP).min()))
            true.append(float(matched_distances(self.layers, truth_P, seen_MP).min()))
            own.append(float(matched_distances(self.layers, truth_P, sample_P[None])[0]))
            copy.append(float(matched_distances(self.layers, truth_P, near_P[None])[0]))
        names = ("sample_to_nearest_training", "held_out_to_nearest_training", "sample_to_own_run", "copy_to_own_run")
        return dict(zip(names, (float(np.mean(d)) for d in (made, true, own, copy)), strict=True))


def r2(seen_RG: torch.Tensor, goals_RG: torch.Tensor) -> float:
    """1 - sum (seen - goal)^2 / sum (seen - mean seen)^2 of each network, averaged; may be far below 0."""
    off_R = (seen_RG - goals_RG).square().sum(1)
    return float((1 - off_R / (seen_RG - seen_RG.mean(1, keepdim=True)).square().sum(1)).mean())


def run(task: str, seed: int, keep: Path) -> dict:
    """All numbers of a piece; seconds are of this process's CPU. A generator that is not finished is kept in `keep`."""
    piece = Piece(task, seed, keep)
    return {
        "task": task,
        "seed": seed,
        "settings": {"hidden": TASKS[task][0], **TASKS[task][1]},
        "parameters": int(piece.held.theta_RKP.shape[-1]),
        "generator_parameters": sum(p.numel() for p in piece.net.parameters()),
        "cpu_seconds": {"runs": piece.seconds_runs, "generator": piece.seconds_fit},
        "held_out": piece.alignment(piece.held),
        "learned": piece.alignment(piece.learned),
        "one_update": piece.update(),
        "rivals": piece.rivals(),
        "memory": {"best": piece.memory(0.0), "middle": piece.memory(0.5)},
        "diversity": diversity(
            piece.net,
            piece.held.theta_RKP[:8, 0],
            piece.held.metric(piece.metric)[:8, 0],
            piece.held.theta_RKP[:8, -1],
            10,
            piece.seeds,
        ),
    }


def steps_to(task: str, seed: int, goal: float) -> dict:
    """Fewest full-batch steps from the first held-out start to a metric on the search part, over learning rates.

    With the learning rate of the runs too; None for more than `MOST_STEPS`.
    """
    hidden, settings = TASKS[task]
    trainer = ParameterDiTTrainer(**settings)
    many = Many({"class": "SmallClassifier", "config": {"hidden": hidden}})
    parts, place = parts_of(Digits(), many), 0 if trainer.init == "shared" else trainer.num_runs - trainer.num_held_out
    drawn = int(SeedRange(seed, Purpose.TRAIN).generator(place, INIT).integers(2**63))
    theta_P = many.drawn(1, [drawn])[0]

    def count(kind: str, rate: float) -> int | None:
        _, way_SP = descend(many, parts, theta_P, kind, rate, MOST_STEPS)
        there = (many.metrics(way_SP, parts.x[1], parts.labels[1])[trainer.metric] <= goal).nonzero()
        return int(there[0]) + 1 if len(there) else None

    found = {"sgd_of_the_runs": count("sgd", trainer.run_learning_rate)}
    for kind, rates in RATES.items():
        found[kind] = min(filter(None, (count(kind, rate) for rate in rates)), default=None)
    return found


def table(rows: list[dict]) -> dict:
    """Means over seeds and their standard errors, by task."""
    found = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        found[task] = {
            "seeds": [row["seed"] for row in own],
            "r2": mean_se([row["held_out"]["r2"] for row in own]),
            "r2_learned": mean_se([row["learned"]["r2"] for row in own]),
            "r2_shuffled": mean_se([row["held_out"]["r2_shuffled"] for row in own]),
            "spearman": mean_se([row["held_out"]["spearman"] for row in own]),
            "start": mean_se([row["one_update"]["start"] for row in own]),
            "one_update": mean_se([row["one_update"]["after"] for row in own]),
            "ratio": mean_se([row["one_update"]["ratio"] for row in own]),
            "report_loss": mean_se([row["one_update"]["report"]["loss"] for row in own]),
            "rivals_report_loss": {
                name: mean_se([row["rivals"]["report"][name]["loss"] for row in own])
                for name in own[0]["rivals"]["report"]
            },
            "steps_to_one_update": {
                name: [row["steps_to_one_update"][name] for row in own] for name in own[0]["steps_to_one_update"]
            },
            "cpu_seconds": mean_se([sum(row["cpu_seconds"].values()) for row in own]),
            "memory": {
                where: {name: mean_se([row["memory"][where][name] for row in own]) for name in numbers}
                for where, numbers in own[0]["memory"].items()
            },
            "diversity": {name: mean_se([row["diversity"][name] for row in own]) for name in ("noise", "starts")},
        }
    return found


def main() -> None:
    """Run the pieces that are missing, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", nargs="*", default=[f"{task}:{seed}" for seed in range(3) for task in TASKS])
    parser.add_argument("--folder", type=Path, required=True, help="keeps each piece, and goes on with what is there")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.pieces:
        task, seed = name.split(":")
        file = args.folder / f"{task}-{seed}.json"
        if not file.exists():
            row = run(task, int(seed), args.folder / "unfinished")
            file.write_text(json.dumps(row, indent=1) + "\n")
            print(name, json.dumps({k: row["held_out"][k] for k in ("r2", "r2_shuffled")}), flush=True)
    if args.to:
        rows = []
        for file in sorted(args.folder.glob("*.json")):
            row = json.loads(file.read_text())
            if "steps_to_one_update" not in row:
                row["steps_to_one_update"] = steps_to(row["task"], row["seed"], row["one_update"]["after"])
                file.write_text(json.dumps(row, indent=1) + "\n")
            rows.append(row)
        result = {**circumstances(), "table": table(rows), "pieces": rows}
        args.to.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["table"], indent=1))


if __name__ == "__main__":
    main()

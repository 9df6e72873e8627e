"""Policies of CartPole, generated when a return is asked for (G.pt), on runs that are held out.

    python benchmarks/gpt_cartpole.py --folder build/gpt --to benchmarks/results/gpt_cartpole.json \
        --figure docs/images/gpt_cartpole.svg

Needs gymnasium (extra `rl`). The runs are linear policies trained by evolution strategies (arXiv:1703.03864) with
antithetic pairs, all at once; checkpoints are saved at steps evenly spaced in their logarithm. Returns are means over
episodes from random states, at most 500; those that anything is judged by are of other episodes than those that the
generator was trained with and the best training checkpoints are chosen by. R = runs, P = flat weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpt_digits import MEAN_OF, NUM_PROMPTS, NUM_UPDATES, fitted, r2
from machine import circumstances, mean_se

from lcsc.core.seeds import Purpose, SeedRange
from lcsc.models.parameter_sampling import propose, updated
from lcsc.models.weight_runs import WeightRuns
from lcsc.training.parameter_dit import ParameterDiTTrainer
from lcsc.training.weight_fit import PAIRINGS, new_generator
from lcsc.training.weight_rivals import diversity, seconds_of

SHAPES = {"bias": (2,), "weight": (2, 4)}
SIZE, MOST = 10, 500
NUM_RUNS, NUM_HELD_OUT, NUM_SAVES = 300, 20, 20
#: episodes of a checkpoint that is learned from, and of what is judged
EPISODES, EPISODES_JUDGED = 32, 64
#: evolution strategies: pairs of a step, steps, noise, learning rate; steps of those that an update is compared with
PAIRS, STEPS, SIGMA, RATE = 8, 80, 0.1, 0.05
MOST_STEPS = 150
GENERATOR = {"num_steps": 2000, "batch_size": 64, "learning_rate": 2e-3, "chunk": 4}
#: environments side by side: more of them fall out of the processor's cache
SIDE_BY_SIDE = 4096


def returns(theta_NP: np.ndarray, episodes: int, seed: int) -> np.ndarray:
    """Mean return of each policy over `episodes` episodes, shape (N,)."""
    many_MP = np.repeat(theta_NP, episodes, 0)
    parts = [
        _returns(many_MP[start : start + SIDE_BY_SIDE], seed + start) for start in range(0, len(many_MP), SIDE_BY_SIDE)
    ]
    return np.concatenate(parts).reshape(-1, episodes).mean(1)


def _returns(theta_NP: np.ndarray, seed: int) -> np.ndarray:
    """Return of one episode of each policy."""
    import gymnasium

    num = len(theta_NP)
    env = gymnasium.make_vec("CartPole-v1", num_envs=num, vectorization_mode="vector_entry_point")
    weight_N24, bias_N2 = theta_NP[:, 2:].reshape(-1, 2, 4), theta_NP[:, :2]
    state_N4, _ = env.reset(seed=seed)
    alive_N, total_N = np.ones(num, dtype=bool), np.zeros(num)
    for _ in range(MOST):
        action_N = (np.einsum("nas,ns->na", weight_N24, state_N4) + bias_N2).argmax(1)
        state_N4, _, ended_N, cut_N, _ = env.step(action_N)
        total_N += alive_N
        alive_N &= ~(ended_N | cut_N)
        if not alive_N.any():
            break
    env.close()
    return total_N


def climbed(theta_RP: np.ndarray, rng: np.random.Generator, seed: int) -> np.ndarray:
    """The policies after one step of evolution strategies, `2 * PAIRS` episodes each."""
    noise_REP = rng.standard_normal((len(theta_RP), PAIRS, SIZE))
    both = np.concatenate([theta_RP[:, None] + SIGMA * noise_REP, theta_RP[:, None] - SIGMA * noise_REP], 1)
    scores_RE = returns(both.reshape(-1, SIZE), 1, seed).reshape(len(theta_RP), 2 * PAIRS)
    ahead_RE = (scores_RE[:, :PAIRS] - scores_RE[:, PAIRS:]) / (scores_RE.std(1, keepdims=True) + 1e-8)
    return theta_RP + RATE * (ahead_RE[..., None] * noise_REP).mean(1)


def steps_within(seconds: float, theta_1P: np.ndarray, seed: int) -> int:
    """Steps of evolution strategies that one policy takes in a time, at least 1; they get longer as it improves."""
    rng, took, steps = np.random.default_rng(seed), 0.0, 0
    while took < seconds:
        began, steps = time.perf_counter(), steps + 1
        theta_1P = climbed(theta_1P, rng, steps)
        took += time.perf_counter() - began
    return steps


def make_runs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All runs side by side: policies, shape (R, K, P), and their returns, shape (R, K)."""
    rng, steps = np.random.default_rng(seed), set(saved_steps().tolist())
    theta_RP = 0.1 * rng.standard_normal((NUM_RUNS, SIZE))
    kept = [theta_RP.copy()]
    for step in range(1, STEPS + 1):
        theta_RP = climbed(theta_RP, rng, 1_000_000 * (seed + 1) + 10_000 * step)
        if step in steps:
            kept.append(theta_RP.copy())
    theta_RKP = np.stack(kept, 1)
    gain_RK = returns(theta_RKP.reshape(-1, SIZE), EPISODES, 100_000_000 * (seed + 1)).reshape(NUM_RUNS, -1)
    return theta_RKP, gain_RK


def saved_steps() -> np.ndarray:
    """Steps of the checkpoints, shape (K,)."""
    late = np.geomspace(1, STEPS, NUM_SAVES - 1).round().astype(int)
    return np.concatenate([[0], np.maximum(late, np.arange(1, NUM_SAVES))])


def kept_runs(seed: int, file: Path) -> tuple[WeightRuns, float]:
    """The runs of a seed, made where they are missing, and the CPU seconds that took."""
    if not file.exists():
        began = time.process_time()
        theta_RKP, gain_RK = make_runs(seed)
        np.savez(file, theta=theta_RKP, gain=gain_RK, seconds=time.process_time() - began)
    with np.load(file) as told:
        theta_RKP, gain_RK, seconds = told["theta"], told["gain"], float(told["seconds"])
    names = tuple(f"run-{r:05d}" for r in range(NUM_RUNS))
    metrics = {"return": torch.from_numpy(gain_RK).float()}
    steps_RK = np.tile(saved_steps(), (NUM_RUNS, 1))
    return WeightRuns(SHAPES, names, steps_RK, torch.from_numpy(theta_RKP).float(), metrics), seconds


class Piece:
    """One seed and way to draw pairs: the runs, the generator, and what is measured of them."""

    def __init__(self, seed: int, pairs: str, keep: Path) -> None:
        self.seed, self.seeds = seed, SeedRange(seed, Purpose.TRAIN)
        runs, self.seconds_runs = kept_runs(seed, keep / f"runs-{seed}.npz")
        self.learned, self.held = runs.part(slice(0, -NUM_HELD_OUT)), runs.part(slice(-NUM_HELD_OUT, None))
        trainer = ParameterDiTTrainer(runs="made here", metric="return", rising=True, pairs=pairs, **GENERATOR)
        net = new_generator(self.learned, {**trainer.sizes, "rising": True}, "return", False, self.seeds)
        self.net, self.seconds_fit = fitted(net, self.learned, trainer, self.seeds, keep / f"{pairs}-{seed}")
        self.start_RP, self.now_R = self.held.theta_RKP[:, 0], self.held.metric("return")[:, 0]

    def judged(self, theta_NP: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Returns on episodes that nothing has seen, other ones for each `at`."""
        seed = 100_000_000 * (self.seed + 1) + 10_000_000 * (1 + at)
        return torch.from_numpy(returns(theta_NP.double().numpy(), EPISODES_JUDGED, seed)).float()

    def alignment(self) -> dict:
        """How well one update heeds its prompt; see gpt_digits.py."""
        from scipy.stats import spearmanr

        share_G = torch.linspace(0, 1, NUM_PROMPTS)
        goals_RG = self.net.best + share_G * (self.now_R[:, None] - self.net.best)
        many_NP, now_N = (x.repeat_interleave(NUM_PROMPTS, 0) for x in (self.start_RP, self.now_R))
        noise_NP = torch.from_numpy(self.seeds.normal(range(len(many_NP)), (SIZE,), 21))
        seen_RG = self.judged(propose(self.net, many_NP, now_N, goals_RG.flatten(), noise_NP)).reshape(goals_RG.shape)
        rng = np.random.default_rng(self.seed)
        mixed_RG = torch.stack([goal_G[torch.from_numpy(rng.permutation(NUM_PROMPTS))] for goal_G in goals_RG])
        ranks = [spearmanr(a, b).statistic for a, b in zip(goals_RG.numpy(), seen_RG.numpy(), strict=True)]
        each_R = [r2(seen_1G, goal_1G) for seen_1G, goal_1G in zip(seen_RG.split(1), goals_RG.split(1), strict=True)]
        return {
            "r2": r2(seen_RG, goals_RG),
            # a run whose policies all fall at once has hardly any spread, and its R2 rules the mean
            "r2_pooled": r2(seen_RG.reshape(1, -1), goals_RG.reshape(1, -1)),
            "r2_pooled_shuffled": r2(seen_RG.reshape(1, -1), mixed_RG.reshape(1, -1)),
            "r2_median": float(np.median(each_R)),
            "r2_each": each_R,
            "spearman": float(np.nanmean(ranks)),
            "prompts": goals_RG.mean(0).tolist(),
            "observed": seen_RG.mean(0).tolist(),
            "observed_std": seen_RG.std(0).tolist(),
        }

    def update(self) -> dict:
        """One update at the best prompt, and some more, told the measured return each time; and its own seconds."""
        goals = [torch.full_like(self.now_R, self.net.best)] * NUM_UPDATES
        noises = np.stack([self.seeds.normal(range(NUM_HELD_OUT), (SIZE,), 30 + s) for s in range(NUM_UPDATES)])
        ways = updated(self.net, self.start_RP, self.now_R, goals, noises, measure=lambda x: self.judged(x, 1))
        one = [x[:1] for x in (self.start_RP, self.now_R, goals[0], torch.from_numpy(noises[0]))]
        seen_MP = self.learned.theta_RKP.flatten(0, 1)
        return {
            "start": float(self.judged(self.start_RP, 2).mean()),
            "prompt": self.net.best,
            "after": float(self.judged(ways[0], 2).mean()),
            "updates": [float(self.judged(theta_NP, 2).mean()) for theta_NP in ways],
            "seconds": seconds_of(lambda: propose(self.net, *one)),
            "sample_to_nearest_training": float(torch.cdist(ways[0], seen_MP).min(1).values.mean()),
            "held_out_to_nearest_training": float(
                torch.cdist(self.held.theta_RKP[:, -1], seen_MP).min(1).values.mean()
            ),
        }

    def rivals(self, seconds: float) -> dict:
        """Copies of training checkpoints, and evolution strategies from the same starts, also for so many seconds."""
        gain_RK = self.learned.metric("return")
        top_R = torch.argsort(-gain_RK.max(1).values, stable=True)[:MEAN_OF]
        few_MP = self.learned.theta_RKP[top_R, gain_RK[top_R].argmax(1)]
        noise_NP = torch.from_numpy(self.seeds.normal(range(NUM_HELD_OUT), (SIZE,), 40))
        found = {
            "nearest": few_MP[:1],
            "mean_of_5": few_MP.mean(0, keepdim=True),
            "noise_0.05": few_MP[0] + 0.05 * few_MP[0].std() * noise_NP,
            "noise_0.1": few_MP[0] + 0.1 * few_MP[0].std() * noise_NP,
        }
        rng, theta_RP, means = np.random.default_rng(1000 + self.seed), self.start_RP.double().numpy(), []
        equal = steps_within(seconds, theta_RP[:1], self.seed)
        for step in range(1, MOST_STEPS + 1):
            theta_RP = climbed(theta_RP, rng, 100_000_000 * (self.seed + 1) + 90_000_000 + 1000 * step)
            means.append(float(self.judged(torch.from_numpy(theta_RP), 2).mean()))
        return {
            "returns": {name: float(self.judged(some_NP, 2).mean()) for name, some_NP in found.items()},
            "evolution": {
                "means": means,
                "episodes_a_step": 2 * PAIRS,
                "steps_of_equal_time": equal,
                "at_equal_time": means[min(equal, MOST_STEPS) - 1],
            },
        }


def run(seed: int, row: dict, pairings: list[str], keep: Path) -> Iterator[dict]:
    """The numbers of a seed, with each way to draw pairs that was missing; what is not finished is kept in `keep`."""
    keep.mkdir(exist_ok=True)
    for pairs in pairings:
        if pairs in row.get("arms", {}):
            continue
        piece = Piece(seed, pairs, keep)
        ends_NP = piece.held.theta_RKP[:8, -1]
        arm = {
            "cpu_seconds": piece.seconds_fit,
            "held_out": piece.alignment(),
            "one_update": piece.update(),
            "diversity": diversity(piece.net, piece.start_RP[:8], piece.now_R[:8], ends_NP, 10, piece.seeds),
        }
        told = {
            "seed": seed,
            "cpu_seconds_of_the_runs": piece.seconds_runs,
            "returns_of_the_runs": piece.learned.metric("return").mean(0).tolist(),
            "steps": piece.learned.steps_RK[0].tolist(),
            "rivals": row.get("rivals") or piece.rivals(arm["one_update"]["seconds"]),
        }
        row = {**told, "arms": {**row.get("arms", {}), pairs: arm}}
        yield row


def table(rows: list[dict]) -> dict:
    """Means over seeds and their standard errors."""
    evolution, found = [row["rivals"]["evolution"] for row in rows], {}
    for pairs in rows[0]["arms"]:
        arms = [row["arms"][pairs] for row in rows]
        steps = [
            next((step for step, mean in enumerate(told["means"], 1) if mean >= arm["one_update"]["after"]), None)
            for told, arm in zip(evolution, arms, strict=True)
        ]
        found[pairs] = {
            **{
                key: mean_se([arm["held_out"][key] for arm in arms])
                for key in ("r2", "r2_pooled", "r2_pooled_shuffled", "r2_median", "spearman")
            },
            "updates": [mean_se([arm["one_update"]["updates"][s] for arm in arms]) for s in range(NUM_UPDATES)],
            "evolution_steps_to_one_update": steps,
        }
    return {
        "start": mean_se([next(iter(row["arms"].values()))["one_update"]["start"] for row in rows]),
        "pairs": found,
        "rivals": {
            name: mean_se([row["rivals"]["returns"][name] for row in rows]) for name in rows[0]["rivals"]["returns"]
        },
        "evolution_of_equal_time": mean_se([told["at_equal_time"] for told in evolution]),
        "evolution_steps_of_equal_time": [told["steps_of_equal_time"] for told in evolution],
    }


def draw(rows: list[dict], target: Path) -> None:
    """Prompted against measured return, and one update beside the steps of evolution strategies."""
    from matplotlib.figure import Figure

    pairings = list(rows[0]["arms"])
    figure = Figure(figsize=(3.3 * (1 + len(pairings)), 3.3), layout="constrained")
    *prompted, right = figure.subplots(1, 1 + len(pairings))
    for row in rows:
        for pairs, ax in zip(pairings, prompted, strict=True):
            told = row["arms"][pairs]["held_out"]
            x, y, spread = (np.array(told[key]) for key in ("prompts", "observed", "observed_std"))
            (line,) = ax.plot(x, y, marker=".", linewidth=1, label=f"seed {row['seed']}")
            low, high = np.maximum(y - spread, 0), np.minimum(y + spread, MOST)
            ax.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        means = row["rivals"]["evolution"]["means"]
        right.plot([row["arms"][pairings[0]]["one_update"]["start"], *means], linewidth=1, color=line.get_color())
        for pairs, marker in zip(pairings, "so", strict=False):
            updates = row["arms"][pairs]["one_update"]["updates"]
            right.plot(range(1, 1 + NUM_UPDATES), updates, marker, color=line.get_color(), markersize=4)
    for pairs, ax in zip(pairings, prompted, strict=True):
        ax.plot([0, MOST], [0, MOST], color="0.6", linestyle="--", linewidth=1, zorder=0)
        ax.set(xlabel="return asked for", ylabel="return after one update", title=f"pairs drawn as {pairs}")
    prompted[0].legend(fontsize=8, frameon=False)
    marks = " and ".join(f"{mark} ({pairs})" for pairs, mark in zip(pairings, ("squares", "circles"), strict=False))
    title = f"evolution strategies (lines),\nupdates: {marks}"
    right.set(xlabel="steps or updates", ylabel="return, mean of 20 held-out runs", title=title)
    for ax in (*prompted, right):
        ax.xaxis.label.set_size(8), ax.yaxis.label.set_size(8), ax.title.set_size(9)
        ax.tick_params(labelsize=8)
        ax.set_ylim(0, 1.04 * MOST)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    """Run the seeds that are missing, and write the results file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="keeps each seed, and goes on with what is there")
    parser.add_argument("--pairs", nargs="*", default=["prompts", "spacing"], choices=PAIRINGS)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        file = args.folder / f"cartpole-{seed}.json"
        row = json.loads(file.read_text()) if file.exists() else {}
        for found in run(seed, row, args.pairs, args.folder / "unfinished"):
            row = found
            file.write_text(json.dumps(row, indent=1) + "\n")
        rows.append(row)
    found = table(rows)
    print(json.dumps(found, indent=1))
    if args.to:
        settings = {"runs": NUM_RUNS, "held_out": NUM_HELD_OUT, "saves": NUM_SAVES, "generator": GENERATOR}
        evolution = {"pairs": PAIRS, "steps": STEPS, "sigma": SIGMA, "rate": RATE, "episodes_judged": EPISODES_JUDGED}
        settings |= {"evolution": evolution}
        args.to.write_text(
            json.dumps({**circumstances(), "settings": settings, "table": found, "seeds": rows}, indent=1) + "\n"
        )
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()

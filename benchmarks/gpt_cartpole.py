"""Policies of CartPole, generated when a return is asked for (G.pt), on runs that are held out.

    python benchmarks/gpt_cartpole.py --folder build/gpt --to benchmarks/results/gpt_cartpole.json

Needs gymnasium (extra `rl`). The runs are linear policies trained by evolution strategies (arXiv:1703.03864) with
antithetic pairs, all at once; checkpoints are saved at steps evenly spaced in their logarithm. Returns are means over
episodes from random states, at most 500; those that the generator is judged by are of other episodes than those it was
trained with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpt_digits import NUM_PROMPTS, r2
from machine import circumstances, mean_se

from lcsc.core.seeds import Purpose, SeedRange
from lcsc.models.parameter_sampling import updated
from lcsc.models.weight_runs import WeightRuns
from lcsc.training.parameter_dit import ParameterDiTTrainer
from lcsc.training.weight_fit import fit_generator, new_generator
from lcsc.training.weight_rivals import diversity

SHAPES = {"bias": (2,), "weight": (2, 4)}
SIZE, MOST = 10, 500
NUM_RUNS, NUM_HELD_OUT, NUM_SAVES, EPISODES = 170, 20, 14, 16
#: evolution strategies: pairs of a step, steps, noise, learning rate
PAIRS, STEPS, SIGMA, RATE = 8, 50, 0.1, 0.1


def returns(theta_NP: np.ndarray, episodes: int, seed: int) -> np.ndarray:
    """Mean return of each policy over `episodes` episodes, shape (N,)."""
    import gymnasium

    num = len(theta_NP) * episodes
    env = gymnasium.make_vec("CartPole-v1", num_envs=num, vectorization_mode="vector_entry_point")
    theta_NP = np.repeat(theta_NP, episodes, 0)
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
    return total_N.reshape(-1, episodes).mean(1)


def make_runs(seed: int) -> WeightRuns:
    """All runs side by side."""
    rng = np.random.default_rng(seed)
    late = np.maximum(np.geomspace(1, STEPS, NUM_SAVES - 1).round().astype(int), np.arange(1, NUM_SAVES))
    steps_K = np.concatenate([[0], late])
    theta_RP = 0.1 * rng.standard_normal((NUM_RUNS, SIZE))
    kept = [theta_RP.copy()]
    for step in range(1, STEPS + 1):
        noise_REP = rng.standard_normal((NUM_RUNS, PAIRS, SIZE))
        both = np.concatenate([theta_RP[:, None] + SIGMA * noise_REP, theta_RP[:, None] - SIGMA * noise_REP], 1)
        scores_RE = returns(both.reshape(-1, SIZE), 1, 1000 * seed + step).reshape(NUM_RUNS, 2 * PAIRS)
        ahead_RE = scores_RE[:, :PAIRS] - scores_RE[:, PAIRS:]
        ahead_RE = ahead_RE / (scores_RE.std(1, keepdims=True) + 1e-8)
        theta_RP = theta_RP + RATE * (ahead_RE[..., None] * noise_REP).mean(1)
        if step in steps_K:
            kept.append(theta_RP.copy())
    theta_RKP = np.stack(kept, 1)
    gain_RK = returns(theta_RKP.reshape(-1, SIZE), EPISODES, 77).reshape(NUM_RUNS, -1)
    return WeightRuns(
        SHAPES,
        tuple(f"run-{r:05d}" for r in range(NUM_RUNS)),
        np.tile(steps_K, (NUM_RUNS, 1)),
        torch.from_numpy(theta_RKP).float(),
        {"return": torch.from_numpy(gain_RK).float()},
    )


def run(seed: int) -> dict:
    """All numbers of a seed; seconds are of this process's CPU."""
    began = time.process_time()
    runs = make_runs(seed)
    seconds_runs, began = time.process_time() - began, time.process_time()
    learned, held = runs.part(slice(0, -NUM_HELD_OUT)), runs.part(slice(-NUM_HELD_OUT, None))
    settings = {"num_steps": 800, "batch_size": 64, "learning_rate": 2e-3, "chunk": 4}
    trainer = ParameterDiTTrainer(runs="made here", metric="return", rising=True, **settings)
    seeds = SeedRange(seed, Purpose.TRAIN)
    net = new_generator(learned, {**trainer.sizes, "rising": True}, "return", False, seeds)
    net = fit_generator(net, learned, trainer.fit_settings, seeds, progress=False)
    seconds_fit = time.process_time() - began

    def measure(theta_NP: torch.Tensor, at: int = 5) -> torch.Tensor:
        return torch.from_numpy(returns(theta_NP.double().numpy(), EPISODES, 10_000 * (seed + 1) + at)).float()

    theta_RP, now_R = held.theta_RKP[:, 0], held.metric("return")[:, 0]
    share_G = torch.linspace(0, 1, NUM_PROMPTS)
    goals_RG = net.best + share_G * (now_R[:, None] - net.best)
    many_NP, now_N = theta_RP.repeat_interleave(NUM_PROMPTS, 0), now_R.repeat_interleave(NUM_PROMPTS)
    noise = seeds.normal(range(len(many_NP)), (SIZE,), 21)
    (asked_NP,) = updated(net, many_NP, now_N, [goals_RG.flatten()], noise[None])
    seen_RG = measure(asked_NP).reshape(goals_RG.shape)
    rng = np.random.default_rng(seed)
    mixed_RG = torch.stack([goal_G[torch.from_numpy(rng.permutation(NUM_PROMPTS))] for goal_G in goals_RG])
    best_N = [torch.full_like(now_R, net.best)] * 5
    noises = np.stack([seeds.normal(range(len(theta_RP)), (SIZE,), 30 + s) for s in range(5)])
    ways = updated(net, theta_RP, now_R, best_N, noises, measure=measure)
    flat_MP, gain_M = learned.theta_RKP.flatten(0, 1), learned.metric("return").flatten()
    top = torch.argsort(-gain_M)[:5]
    return {
        "seed": seed,
        "cpu_seconds": {"runs": seconds_runs, "generator": seconds_fit},
        "returns_of_the_runs": learned.metric("return").mean(0).tolist(),
        "steps": runs.steps_RK[0].tolist(),
        "r2": r2(seen_RG, goals_RG),
        "r2_shuffled": r2(seen_RG, mixed_RG),
        "prompts": goals_RG.mean(0).tolist(),
        "observed": seen_RG.mean(0).tolist(),
        "observed_std": seen_RG.std(0).tolist(),
        "start": float(now_R.mean()),
        "updates": [float(measure(theta_NP, 6).mean()) for theta_NP in ways],
        "nearest": float(measure(flat_MP[top[:1]], 6).mean()),
        "mean_of_5": float(measure(flat_MP[top].mean(0, keepdim=True), 6).mean()),
        "sample_to_nearest_training": float(torch.cdist(ways[0], flat_MP).min(1).values.mean()),
        "held_out_to_nearest_training": float(torch.cdist(held.theta_RKP[:, -1], flat_MP).min(1).values.mean()),
        "diversity": diversity(net, theta_RP[:8], now_R[:8], held.theta_RKP[:8, -1], 10, seeds),
    }


def main() -> None:
    """Run the seeds that are missing, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="keeps each seed, and goes on with what is there")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        file = args.folder / f"cartpole-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(run(seed), indent=1) + "\n")
        rows.append(json.loads(file.read_text()))
        print(json.dumps({key: rows[-1][key] for key in ("r2", "r2_shuffled", "start", "updates", "nearest")}))
    if args.to:
        table = {key: mean_se([row[key] for row in rows]) for key in ("r2", "r2_shuffled", "start", "nearest")}
        table["one_update"] = mean_se([row["updates"][0] for row in rows])
        args.to.write_text(json.dumps({**circumstances(), "table": table, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

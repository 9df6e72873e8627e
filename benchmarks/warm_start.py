"""Whether black-box searchers gain from hearing of the scored baselines first, on made-up banks and a cheap score.

    python benchmarks/warm_start.py --to benchmarks/results/warm_start.json

A bank is 10 or 40 checkpoints of 400 weights on their way to a goal, with noise that neighbours share. The score is a
quadratic form of the distance from the goal, with eigenvalues from 1 to 1/1000: no noise, so a search costs
milliseconds. Each search gets the operator's own baselines; its result is the best score as a share of the best of
these, and 1 where it finds nothing better. Six banks of each size, two seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances

from lcsc.core.registry import build
from lcsc.core.space import SearchSpace
from lcsc.operators.linear import Linear
from lcsc.operators.lora import View
from lcsc.searchers.base import Start, Task

SEARCHERS = ("cma", "diagonal_cma", "de", "two_points_de", "pso", "tbpsa", "one_plus_one")
SIZES, P, BANKS, SEEDS = (10, 40), 400, 6, 2

Score = Callable[[np.ndarray], float]


def problem(K: int, number: int) -> tuple[SearchSpace, tuple[Start, ...], Score]:
    """Space, scored baselines and score of a bank."""
    rng = np.random.default_rng(number)
    goal, noise_KP, row_P = rng.normal(size=P), np.zeros((K, P)), np.zeros(P)
    for k in range(K):
        row_P = 0.7 * row_P + 0.7 * rng.normal(size=P)
        noise_KP[k] = row_P
    way_K = 1 - np.exp(-2 * np.arange(1, K + 1) / K)
    W_KP = way_K[:, None] * goal + 0.6 * noise_KP
    bank = View(Path(f"bank {K} {number}"), tuple(range(100, 100 * K + 1, 100)), W_KP)
    linear, hardness_P = Linear(), rng.permutation(np.geomspace(1, 1e-3, P))
    space = linear.space(bank)

    def score(vector: np.ndarray) -> float:
        miss_P = linear.coefficients(bank, space.to_point(vector)) @ W_KP - goal
        return float((hardness_P * miss_P**2).sum())

    vectors = [(baseline, space.to_vector(baseline.point)) for baseline in linear.baselines(bank)]
    starts = [Start(vector, score(vector), baseline.label, baseline.family) for baseline, vector in vectors]
    return space, tuple(sorted(starts, key=lambda start: start.value)), score


def share(name: str, warm_start: bool, K: int, number: int, seed: int, num_trials: int) -> float:
    """The best score of a search over that of the best baseline."""
    space, starts, score = problem(K, number)
    session = build("searcher", name, warm_start=warm_start).start(Task(space, num_trials, seed, starts))
    best = starts[0].value
    for _ in range(num_trials):
        proposal = session.ask()
        value = score(proposal.vector)
        session.tell(proposal.uid, value)
        best = min(best, value)
    return best / starts[0].value


def main() -> None:
    """Measure and write the results file."""
    warnings.simplefilter("ignore")  # nevergrad's advice
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/warm_start.json"))
    args = parser.parse_args()
    table = []
    runs = list(itertools.product(range(BANKS), range(SEEDS)))
    for K, name in itertools.product(SIZES, SEARCHERS):
        cold, warm = (np.log([share(name, on, K, *run, args.trials) for run in runs]) for on in (False, True))
        gain = warm - cold
        table.append(
            {
                "searcher": name,
                "num_checkpoints": K,
                "cold": float(np.exp(cold.mean())),
                "warm": float(np.exp(warm.mean())),
                "warm_over_cold": float(np.exp(gain.mean())),
                "se_of_its_log": float(gain.std(ddof=1) / np.sqrt(gain.size)),
            }
        )
        print(table[-1], flush=True)
    result = {**circumstances(), "num_trials": args.trials, "runs": len(runs), "table": table}
    args.to.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

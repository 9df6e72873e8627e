"""What `objective.compile` gains: images a second of scores and of derivatives, plain and compiled, in turns.

    python benchmarks/compiled.py --work scratch/ [--experiment digits] [--images 500] [--repeats 5]
    python benchmarks/compiled.py --work scratch/ --experiment mnist16 --mnist mnist.npz

The bank is trained where it is not there yet. The first call of each way is timed by itself: it compiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from machine import circumstances, spread
from searches import bank, words_of

from lcsc.config.hydra_app import compose_config
from lcsc.core.seeds import Purpose
from lcsc.search.problem import Problem
from lcsc.search.setup import build_problem


def ways_of(problem: Problem, num_images: int) -> dict[str, Callable[[], float]]:
    """A score, and a derivative, of the bank's first baseline."""
    candidate = problem.operator.apply(problem.bank, problem.operator.baselines(problem.bank)[0].point)
    given = {"seed": 0, "purpose": Purpose.SEARCH, "images": range(num_images)}
    objective = problem.objective
    return {
        "score": lambda: float(objective(candidate, **given).value),
        "derivative": lambda: float(objective.slope(candidate, **given).value),
    }


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and the value."""
    begun = time.perf_counter()
    value = call()
    return time.perf_counter() - begun, value


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--experiment", default="digits", choices=["digits", "mnist16"])
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    words = words_of(args.experiment, 0, args.work, args.mnist)
    words.append(f"bank.path={bank(words, args.work / f'bank-{args.experiment}-0')}")
    backends = ("no", args.backend)
    problems = {b: build_problem(compose_config([*words, f"objective.compile={b}"])) for b in backends}
    ways = {b: ways_of(problem, args.images) for b, problem in problems.items()}
    table = {}
    for way in ways["no"]:
        first = {b: timed(ways[b][way]) for b in backends}
        seconds: dict[str, list[float]] = {b: [] for b in backends}
        for _ in range(args.repeats):
            for b in backends:
                seconds[b].append(timed(ways[b][way])[0])
        rates = {b: [args.images / s for s in seconds[b]] for b in backends}
        ratios = [fast / plain for plain, fast in zip(*(rates[b] for b in backends), strict=True)]
        table[way] = {
            "first_call_seconds": {b: first[b][0] for b in backends},
            "value": {b: first[b][1] for b in backends},
            "images_a_second": {b: spread(rates[b]) for b in backends},
            "times_as_fast": spread(ratios),
        }
        print(json.dumps({way: table[way]}), flush=True)
    to = args.to or Path(f"benchmarks/results/compiled_{args.experiment}.json")
    content = {"experiment": args.experiment, "num_images": args.images, "threads": torch.get_num_threads()}
    to.write_text(json.dumps({**circumstances(), **content, "ways": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()

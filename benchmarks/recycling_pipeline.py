"""A real pipeline of processes, some of them killed: the seconds of its parts, and what comes out.

    python benchmarks/recycling_pipeline.py --to benchmarks/results/recycling_pipeline.json

One schedule of kills, at random moments, under every way to live with failures. The weights that come out are compared,
bit by bit, with those of one process: of one that loses the same stages (recovery by neighbours), or of one without
failures (checkpoints, redundancy).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances, spread
from recycling_checkfree import STAGES, arch

#: name -> strategy, rule, swapped orders, whether stages are killed
RUNS = {
    "quiet": ("neighbours", "checkfree", False, False),
    "quiet_swapped": ("neighbours", "checkfree_plus", True, False),
    "checkfree": ("neighbours", "checkfree", False, True),
    "checkfree_plus": ("neighbours", "checkfree_plus", True, True),
    "checkpointing": ("checkpoint", "checkfree", False, True),
    "redundant": ("redundant", "checkfree", False, True),
}


def kills(args) -> list:
    """Equal for all runs: one stage after the other, at a random moment of the step that it is in, and before long."""
    import numpy as np

    from lcsc.training.pipeline import Kill

    rng = np.random.default_rng(args.seed)
    steps = np.linspace(0, args.steps, args.kills + 2)[1:-1].astype(int)
    return [Kill(int(t), int(rng.integers(STAGES)), float(rng.uniform(0, 0.2))) for t in steps]


def measure(args, name: str) -> dict:
    """One training."""
    import torch

    from lcsc.core.registry import build
    from lcsc.core.seeds import Purpose, SeedRange
    from lcsc.datasets.base import TextPart
    from lcsc.models.fit import Windows
    from lcsc.models.network import build_network
    from lcsc.recycling.failures import Failure
    from lcsc.training.causal_lm import CausalLM
    from lcsc.training.failing_stages import Recovery, train_failing
    from lcsc.training.pipeline import run_pipeline
    from lcsc.training.pipeline_worker import Plan

    strategy, rule, swapped, dies = RUNS[name]
    trainer = CausalLM(args.steps, args.batch_size, args.learning_rate, block_length=args.block_length)
    text = build("dataset", "text", path=args.text)
    windows = Windows(text.tokens(TextPart.TRAIN), trainer, SeedRange(args.seed, Purpose.TRAIN))
    recovery, net_arch = Recovery(STAGES, rule, swapped), arch(args)
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            net_arch,
            windows,
            trainer,
            recovery,
            strategy,
            Path(folder),
            period=args.period,
            seed=args.seed,
            patience_seconds=60,
        )
        story = run_pipeline(plan, kills(args) if dies else [])
    dead = [Failure(event["step"], s) for event in story.events for s in event["lost"]]
    torch.manual_seed(args.seed)
    net = build_network(net_arch)
    rebuilt = dead if strategy == "neighbours" else []
    train_failing(
        net, net_arch, windows, trainer, recovery, rebuilt, evaluate=lambda net: 0.0, evaluate_every=args.steps
    )
    same = all(torch.equal(story.tensors[key], p) for key, p in net.named_parameters())
    return {
        "same_bits_as_one_process": same,
        "step_seconds": story.step_seconds,
        "save_seconds": story.save_seconds,
        "seconds": story.seconds,
        "events": story.events,
        "back_seconds": spread([event["seconds"] for event in story.events]) if story.events else None,
        "last_loss": story.losses[args.steps - 1],
    }


def parts(runs: dict) -> dict:
    """What the cost model takes, in seconds; of runs whose steps are alike the fastest, as others were disturbed."""
    back = [event["seconds"] for name in ("checkfree", "checkfree_plus") for event in runs[name]["events"]]
    return {
        "step": min(runs[name]["step_seconds"] for name in ("quiet", "checkfree", "checkpointing")),
        "swapped_step": min(runs[name]["step_seconds"] for name in ("quiet_swapped", "checkfree_plus")),
        "redundant_step": runs["redundant"]["step_seconds"],
        "save": runs["checkpointing"]["save_seconds"],
        "restart": statistics.median(event["seconds"] for event in runs["checkpointing"]["events"]),
        "recover": statistics.median(back),
    }


def main() -> None:
    """Measure, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", help="a text file; without it the text of the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--period", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers-a-stage", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results/recycling_pipeline.json"))
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key not in ("to", "text")}
    runs = {}
    for name in RUNS:
        runs[name] = measure(args, name)
        print(name, json.dumps(runs[name]), flush=True)
    planned = [[kill.step, kill.stage, kill.delay_seconds] for kill in kills(args)]
    result = {**circumstances(), "settings": settings, "kills": planned, "parts_seconds": parts(runs), "runs": runs}
    args.to.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["parts_seconds"], indent=1))


if __name__ == "__main__":
    main()

"""CheckFree: trainings whose pipeline stages die, against a training without failures; loss by step and by wall-clock.

    python benchmarks/recycling_checkfree.py --folder DIR --to benchmarks/results/recycling_checkfree.json

Every training is a file in `--folder` when it is done; the same line goes on with what is missing. `--parts` names the
file of `benchmarks/recycling_pipeline.py`, whose measured seconds the cost model takes besides the paper's. One step
stands for one of the paper's (91.3 s) in the failures an hour, so that as many stages die in a step as in the paper.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances

STEP_SECONDS = 91.3
HOURLY = (5, 10, 16)
#: name -> rule, swapped orders, failures an hour in percent
ARMS = {
    "none": ("average", False, 0),
    "none_swapped": ("average", True, 0),
    **{f"checkfree_{p}": ("checkfree", False, p) for p in HOURLY},
    **{f"checkfree_plus_{p}": ("checkfree_plus", True, p) for p in HOURLY},
    "random_16": ("random", False, 16),
    "copy_16": ("copy_previous", False, 16),
    "average_16": ("average", False, 16),
}
STAGES = 6


def arch(args) -> dict:
    """A Llama of bytes whose layers are stages."""
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": args.width,
        "intermediate_size": args.width * 8 // 3 // 8 * 8,
        "num_hidden_layers": STAGES * args.layers_a_stage,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": args.block_length,
        "tie_word_embeddings": False,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    return {"class": "LlamaForCausalLM", "config": config}


def failures(args, arm: str, seed: int):
    """Those of an arm: equal for all arms of a seed with one rate."""
    from lcsc.recycling.failures import draw_failures, per_step

    return draw_failures(per_step(ARMS[arm][2] / 100, STEP_SECONDS), args.steps, STAGES, seed)


def train(args, arm: str, seed: int, to: Path) -> None:
    """One training: its losses by step, and its weights."""
    import torch

    from lcsc.core.registry import build
    from lcsc.core.seeds import Purpose, SeedRange
    from lcsc.datasets.base import TextPart
    from lcsc.models.fit import Windows
    from lcsc.models.network import build_network, save_network
    from lcsc.training.causal_lm import CausalLM
    from lcsc.training.failing_stages import Recovery, train_failing

    text = build("dataset", "text", path=args.text)
    rule, swapped, _ = ARMS[arm]
    torch.manual_seed(seed)
    net = build_network(arch(args))
    trainer = CausalLM(args.steps, args.batch_size, args.learning_rate, block_length=args.block_length)
    windows = Windows(text.tokens(TextPart.TRAIN), trainer, SeedRange(seed, Purpose.TRAIN))
    blocks_BT = held_out(text, TextPart.SEARCH, args)
    dead = failures(args, arm, seed)
    recovery = Recovery(STAGES, rule, swapped, seed=seed)
    curve = train_failing(
        net,
        arch(args),
        windows,
        trainer,
        recovery,
        dead,
        evaluate=lambda net: loss_of(net, blocks_BT),
        evaluate_every=args.evaluate_every,
    )
    if arm.startswith("none"):
        save_network(net, to.with_suffix(""))
    row = {"arm": arm, "seed": seed, "losses": curve.losses, "grad_norms": curve.norms}
    row |= {"failures": [[f.step, f.stage] for f in dead], "parameters": sum(p.numel() for p in net.parameters())}
    write(to, row)


def held_out(text, part, args):
    """Blocks from all over a held-out half, shape (B, T)."""
    stretches_SL = text.tokens(part)
    blocks_BT = stretches_SL[:, : stretches_SL.shape[1] // args.block_length * args.block_length]
    blocks_BT = blocks_BT.reshape(-1, args.block_length)
    return blocks_BT[:: max(1, len(blocks_BT) // args.num_blocks)].long()


def loss_of(net, blocks_BT) -> float:
    """Mean loss of a token in nats."""
    import torch

    from lcsc.models.causal_lm import token_losses

    with torch.no_grad():
        return float(token_losses(net, blocks_BT).mean())


def write(to: Path, value) -> None:
    """The file is there when it is whole."""
    part = to.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, to)


def repairs(args, seed: int, to: Path) -> None:
    """Each stage of the final models lost alone: loss on the report half right after every rule's repair."""
    from lcsc.bank import CheckpointBank
    from lcsc.core.errors import ConfigError
    from lcsc.core.registry import build
    from lcsc.datasets.base import TextPart
    from lcsc.models.network import load_network
    from lcsc.operators.neighbor_recovery import NeighborRecovery
    from lcsc.recycling.rebuild import RULES

    text = build("dataset", "text", path=args.text)
    blocks_BT, rows = held_out(text, TextPart.REPORT, args), {}
    for arm in ("none", "none_swapped"):
        folder = args.folder / f"{arm}-{seed}"
        norms = json.loads(folder.with_name(folder.name + ".json").read_text())["grad_norms"]
        net, bank = load_network(folder), CheckpointBank.open(folder)
        rows[arm] = {"whole": loss_of(net, blocks_BT)}
        for lost in range(STAGES):
            for rule in (*RULES, "checkfree_squared"):
                named = rule.removesuffix("_squared")
                told = {"grad_norms": norms} if named.startswith("checkfree") else {}
                power = 2.0 if named != rule else 1.0
                try:
                    made = NeighborRecovery(lost=lost, rule=named, norm_power=power, seed=seed, **told).apply(bank, {})
                except ConfigError:
                    continue  # no such neighbour
                net.load_state_dict(made.weights())
                rows[arm][f"{lost}/{rule}"] = loss_of(net, blocks_BT)
    write(to, rows)


def search(args, seed: int, lost: int, to: Path) -> None:
    """Weights and scale of one lost stage, searched on the search half and compared on the report half."""
    from lcsc.cli.main import main as lcsc

    model = args.folder / f"none-{seed}"
    norms = json.loads((args.folder / f"none-{seed}.json").read_text())["grad_norms"]
    run = to.with_suffix("")
    words = ["search", "operator=neighbor_recovery", "experiment=recovery_small", f"operator.lost={lost}"]
    words += [f"operator.grad_norms={norms}", f"operator.num_stages={STAGES}", f"bank.path={model}", f"run_dir={run}"]
    words += [f"seed={seed}", f"objective.block_length={args.block_length}", "quiet=true"]
    if args.text:
        words.append(f"dataset.path={args.text}")
    if code := lcsc([*words, f"search.num_trials={args.trials}"]):
        sys.exit(f"the search of stage {lost} ended with exit code {code}")
    told = json.loads((run / "summary.json").read_text())
    write(to, {"seed": seed, "lost": lost, "report": told["report"]})


def main() -> None:
    """Train what is missing, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="keeps every training")
    parser.add_argument("--text", help="a text file; without it the text of the package")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers-a-stage", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--search-stages", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--parts", type=Path, default=Path("benchmarks/results/recycling_pipeline.json"))
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        jobs = [(args.folder / f"{arm}-{seed}.json", train, (arm, seed)) for arm in ARMS]
        jobs += [(args.folder / f"repairs-{seed}.json", repairs, (seed,))]
        jobs += [(args.folder / f"search-{lost}-{seed}.json", search, (seed, lost)) for lost in args.search_stages]
        for to, job, words in jobs:
            if not to.exists():
                job(args, *words, to)
                print(to.name, flush=True)
    if args.to:
        settings = {key: value for key, value in vars(args).items() if key not in ("folder", "parts", "to", "text")}
        settings["text"] = Path(args.text).name if args.text else "the package's own"
        from recycling_checkfree_report import report

        write(args.to, {**circumstances(), "settings": settings, **report(args)})


if __name__ == "__main__":
    main()

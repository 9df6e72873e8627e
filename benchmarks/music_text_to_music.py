"""A pretrained decoder against a random one for text to music, and LCSC on the checkpoints of its fine-tuning.

    python benchmarks/music_text_to_music.py --tunes FOLDER --work WORK --to benchmarks/results/music_text_to_music.json

FOLDER holds tunes in ABC notation. Equal tunes count once, and tunes that are alike are in one part; the parts are cut
before anything is trained. For each seed a GPT-2 learns the tunes of the training part without their texts; operator
`warm_start` makes an encoder-decoder of it (`rnd2gpt`) and one of random numbers (`rnd2rnd`), and both are fine-tuned
on the pairs of the training part in equal steps. What is kept in WORK is not done again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from music_report import report

from lcsc.bank import CheckpointBank
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.export.transform import transform_model
from lcsc.metrics.tune_measures import measure_tunes, measured
from lcsc.models.flat import LiveModel
from lcsc.models.network import load_network
from lcsc.models.sampling import sample
from lcsc.models.tune_pairs import tune_losses
from lcsc.music.files import CHECKER, abc2midi_version, tune_problems
from lcsc.music.pairs import Pair
from lcsc.music.tokens import END, PAD, TUNE, decode, prompt_tokens
from lcsc.operators.linear import Linear
from lcsc.operators.warm_start import WarmStart

ARMS = {"pretrained": "rnd2gpt", "random": "rnd2rnd"}
SAMPLE = 3
#: Checkpoints whose mean writes the tunes: the last one alone, at a constant rate, is worse by 0.07 nats.
MEAN_OF = 8
GPT = {"vocab_size": 128, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT["initializer_range"] = 0.06
GPT |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
ARCH = {"class": "GPT2LMHeadModel", "config": {**GPT, "bos_token_id": TUNE, "eos_token_id": END, "pad_token_id": PAD}}


class Work:
    """The pieces of work and what they leave in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.work
        self.data = build("dataset", "tunes", path=str(args.tunes), longest=500, every=args.every)
        self.report = self.data.pairs(TextPart.REPORT)
        # neither part was trained on, and no setting of these models was chosen by either
        self.asked = (self.report + self.data.pairs(TextPart.SEARCH))[: args.samples]

    def pieces(self) -> list[tuple[Path, Callable[[], None]]]:
        """What is to be made and how, in order, all trainings first; a path that is there is finished."""
        trainings, rest = [], []
        for seed in self.args.seeds:
            at = self.folder / f"seed-{seed}"
            trainings.append((at / "decoder.json", functools.partial(self.pretrain, at, seed)))
            for arm in ARMS:
                trainings.append((at / f"{arm}-tuned.json", functools.partial(self.tune, at, seed, arm)))
                rest.append((at / f"{arm}-curve.json", functools.partial(self.curve, at, seed, arm)))
                rest.append((at / f"{arm}-lcsc.json", functools.partial(self.search, at, seed, arm)))
            for arm in (*ARMS, "lcsc"):
                rest.append((at / f"{arm}-tunes.json", functools.partial(self.write_tunes, at, seed, arm)))
        return trainings + rest

    def train(self, out: Path, seed: int, arch: dict, **settings: object) -> float:
        """Fill a bank; returns seconds of the processor."""
        began = time.process_time()
        trainer = build("trainer", "tunes", batch_size=self.args.batch_size, **settings)
        trainer.train(arch=arch, model=None, dataset=self.data, out=out, seed=seed, progress=False)
        return time.process_time() - began

    def pretrain(self, at: Path, seed: int) -> None:
        """The tunes of the training part, without their texts."""
        steps = self.args.pre_steps
        settings = {"num_steps": steps, "save_every": steps, "schedule": "linear", "warmup_steps": min(50, steps)}
        seconds = self.train(at / "decoder", seed, ARCH, texts=False, learning_rate=3e-3, **settings)
        write(at / "decoder.json", {"seconds": seconds})

    def tune(self, at: Path, seed: int, arm: str) -> None:
        """The plan as a folder, and its fine-tuning on pairs."""
        tokens = {"start_token": TUNE, "end_token": END, "pad_token": PAD}
        operator = WarmStart(combination=ARMS[arm], seed=seed, **tokens)
        start = at / f"{arm}-start"
        if not start.exists():
            transform_model(CheckpointBank.open(at / "decoder", storage="streamed"), operator, start)
        settings = {"num_steps": self.args.steps, "save_every": self.args.save_every, "warmup_steps": 20}
        settings |= {"schedule": "constant_with_warmup", "learning_rate": 2e-3, "start": str(start)}
        seconds = self.train(at / f"{arm}-tuned", seed, CheckpointBank.open(start).arch, **settings)
        write(at / f"{arm}-tuned.json", {"seconds": seconds})

    def curve(self, at: Path, seed: int, arm: str) -> None:
        """Loss of every checkpoint on half of the report part."""
        began, bank = time.process_time(), CheckpointBank.open(at / f"{arm}-tuned")
        nets = {0: at / f"{arm}-start"} | {row.step: row.files[0].parent for row in bank.rows}
        losses = {
            str(step): float(mean_losses(load_network(net), self.report[::2]).mean()) for step, net in nets.items()
        }
        write(at / f"{arm}-curve.json", {"losses": losses, "seconds": time.process_time() - began})

    def write_tunes(self, at: Path, seed: int, arm: str) -> None:
        """Tunes of the mean of the last checkpoints, or of the searched combination for texts of the report part."""
        began, asked = time.process_time(), self.report if arm == "lcsc" else self.asked
        if arm == "lcsc":
            net = load_network(at / "pretrained-run" / "best")
        else:
            bank = CheckpointBank.open(at / f"{arm}-tuned")
            num = min(MEAN_OF, bank.num_checkpoints)
            net = combined(bank, np.repeat([0.0, 1 / num], [bank.num_checkpoints - num, num]))
        parameters = sum(parameter.numel() for parameter in net.parameters())
        told = {"parameters": parameters, **self.judge(net, seed, asked)}
        write(at / f"{arm}-tunes.json", {**told, "seconds": time.process_time() - began})

    def judge(self, net: torch.nn.Module, seed: int, asked: tuple[Pair, ...]) -> dict:
        """Conditioning gap and measures of the tunes that a network writes."""
        own_N = mean_losses(net, self.report)
        swapped = zip(self.report, unrelated(self.report), strict=True)
        shuffled = [Pair(other.text, pair.tune, pair.group) for pair, other in swapped]
        other_N = mean_losses(net, shuffled)
        tunes = tunes_of(net, seed, asked, self.args.max_tokens)
        real, others = [pair.tune for pair in asked], [pair.tune for pair in unrelated(asked)]
        training = [pair.tune for pair in self.data.pairs(TextPart.TRAIN)]
        checkers = ["lcsc", *([CHECKER] if abc2midi_version() else [])]
        judges = {name: functools.cache(lambda tune, name=name: not tune_problems(tune, name)) for name in checkers}
        found = measure_tunes(tunes, real, others, training, judges[checkers[-1]])
        return {
            "loss": float(own_N.mean()),
            "gap": paired(other_N, own_N),
            "measures": {name: vars(row) for name, row in found.items()},
            "valid": {name: sum(map(valid, tunes)) / len(tunes) for name, valid in judges.items()},
            "real_valid": {name: sum(map(valid, real)) / len(real) for name, valid in judges.items()},
            "ended": sum(map(bool, tunes)) / len(tunes),
            "tunes": tunes,
        }

    def search(self, at: Path, seed: int, arm: str) -> None:
        """LCSC on the checkpoints of an arm, and its winner's losses pair by pair."""
        began, run, bank = time.process_time(), at / f"{arm}-run", CheckpointBank.open(at / f"{arm}-tuned")
        words = [
            "experiment=text_to_music_tuned",
            f"dataset.path={self.args.tunes}",
            f"dataset.every={self.data.every}",
        ]
        words += [f"bank.path={bank.path}", f"run_dir={run}", f"seed={seed}", "objective.samples=0", "quiet=true"]
        words += ["searcher=gradient", f"search.num_trials={self.args.trials}", f"search.num_images={self.args.images}"]
        words += [f"search.num_images_{use}={len(self.report)}" for use in ("select", "report")]
        subprocess.run([sys.executable, "-m", "lcsc", "search", *words], check=True, stdout=subprocess.DEVNULL)
        seconds = time.process_time() - began + sum(os.times()[2:4])
        summary = json.loads((run / "summary.json").read_text())
        told = summary["report"]
        rows = {row.label: Linear().coefficients(bank, row.point) for row in Linear().baselines(bank)}
        wanted = {family: told["baselines"][family]["label"] for family in ("last", "ema", "power_ema", "uniform")}
        losses = {"lcsc": mean_losses(load_network(run / "best"), self.report)}
        for family, label in wanted.items():
            losses[family] = mean_losses(combined(bank, rows[label]), self.report)
        best_ema = min(("ema", "power_ema"), key=lambda name: told["baselines"][name]["value"])
        write(
            at / f"{arm}-lcsc.json",
            {
                "losses": {name: float(some.mean()) for name, some in losses.items()},
                "labels": wanted,
                "best_ema": best_ema,
                "gains": {name: paired(some, losses["lcsc"]) for name, some in losses.items() if name != "lcsc"},
                "told": {"best": told["best"], "baselines": told["baselines"]},
                **{key: summary.get(key) for key in ("num_trials", "num_coefficients", "image_forwards")},
                "seconds": seconds,
            },
        )


def combined(bank: CheckpointBank, coef_K: np.ndarray) -> torch.nn.Module:
    """The network of a combination."""
    live = LiveModel(bank.arch, bank.layout, bank.constants, torch.device("cpu"))
    live.fill(Linear().apply(bank, Linear().point(bank, coef_K)).write)
    return live.net


def tunes_of(net: torch.nn.Module, seed: int, asked: tuple[Pair, ...], most: int) -> list[str]:
    """A tune for each text, empty where it has no end."""
    seeds, out = SeedRange(seed, Purpose.REPORT), []
    for start in range(0, len(asked), 64):
        some = range(start, min(start + 64, len(asked)))
        prompts = [prompt_tokens(asked[i].text) for i in some]
        rngs = [seeds.generator(i, SAMPLE) for i in some]
        found = sample(net, prompts, rngs, end=END, pad=PAD, max_tokens=most)
        out += [decode(tokens) if tokens[-1:] == [END] else "" for tokens in found]
    return out


@torch.no_grad()
def mean_losses(net: torch.nn.Module, pairs: tuple[Pair, ...] | list[Pair]) -> np.ndarray:
    """Loss of each pair, those of like length in one call."""
    out, order = np.empty(len(pairs)), np.argsort([len(pair.tune) for pair in pairs])
    for rows in np.array_split(order, -(-len(pairs) // 16)):
        out[rows] = tune_losses(net, [pairs[row] for row in rows]).double().numpy()
    return out


def paired(a_N: np.ndarray, b_N: np.ndarray) -> dict[str, float]:
    """Mean of a - b over pairs, its standard error, and its 95 % interval by the paired bootstrap."""
    found = measured(a_N, b_N, 0.0)
    se = (a_N - b_N).std(ddof=1) / len(a_N) ** 0.5
    return {"value": found.above, "se": float(se), "low": found.low, "high": found.high}


def unrelated(pairs: tuple[Pair, ...]) -> list[Pair]:
    """For each pair the next one with another melody and another text."""
    out = []
    for place, pair in enumerate(pairs):
        after = pairs[place + 1 :] + pairs[:place]
        out.append(next(other for other in after if other.group != pair.group and other.text != pair.text))
    return out


def write(path: Path, told: dict) -> None:
    """Appears whole or not at all."""
    spare = path.with_suffix(".tmp")
    spare.write_text(json.dumps(told, indent=1, default=float) + "\n")
    spare.rename(path)


def main() -> None:
    """Do what is missing, then write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps banks and runs, and goes on with what is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    numbers = {"every": 7, "pre_steps": 1800, "steps": 720, "save_every": 30, "batch_size": 4, "samples": 256}
    numbers |= {"max_tokens": 480, "trials": 40, "images": 36}
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--minutes", type=float, default=1e9, help="begins no further piece of work after so many")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    work = Work(args)
    left, began = [(path, make) for path, make in work.pieces() if not path.exists()], time.monotonic()
    while left and time.monotonic() - began < 60 * args.minutes:
        path, make = left.pop(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        make()
        print(f"{path.parent.name}/{path.stem}: {json.loads(path.read_text())['seconds']:.0f} s", flush=True)
    print(f"pieces left: {len(left)}")
    if args.to is not None and not left:
        sizes = {part.name.lower(): len(work.data.pairs(part)) for part in TextPart}
        told = report(args.work, args.seeds, {**{name: getattr(args, name) for name in numbers}, "pairs": sizes})
        args.to.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Checkpoints coded, beside other compressors in one run: docs/codec.md and results/codec_*.json.

    python benchmarks/codec.py lm --seed 0 --text FILE --to codec_lm.json       a language model with its optimizer
    python benchmarks/codec.py bank --seed 0 --bank banks/digits --to codec_digits.json    a bank of weights

`lm` trains a small Llama on bytes with AdamW, codes its checkpoints at several intervals, and resumes from what was
restored. `bank` codes a bank of weights, searches the lossy banks and scores what it found on the exact one. Each piece
is saved when it is done, and the same line goes on with the next. Speeds are counted in the process's own time.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from codec_peers import excp, measure, peers, shuffled, xz_symbols
from pieces import Pieces, add_options, run_pieces

import lcsc.kernels.entropy as entropy
from lcsc.bank import CheckpointBank
from lcsc.codec.arrays import PREFIX
from lcsc.codec.chain import Chain, ChainWriter
from lcsc.codec.settings import CodecSettings
from lcsc.models.network import build_network
from lcsc.training.coded import restore_training, training_tensors

CONFIG = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
LENGTH, BATCH, RATE = 64, 16, 2e-3
INTERVALS = (1, 5, 20, 100)
#: how the state is restored, against an uninterrupted run
RESUMES = {
    "4/4/4 bits": CodecSettings("lossy"),
    "lossless": CodecSettings(),
    "4/4/4 bits, tau 1, beta 1": CodecSettings("lossy", tau=1.0, beta=1.0),
    "8/8/8 bits": CodecSettings("lossy", bits_w=8, bits_m=8, bits_v=8),
    "3/3/3 bits": CodecSettings("lossy", bits_w=3, bits_m=3, bits_v=3),
}
NEW, EXCP = "weights alone, new AdamW", "ExCP's rule + xz"
#: interval of the chain that is resumed from
RESUMED = 20
LOSSY = {
    "4 bits": CodecSettings("lossy", anchor_every=100),
    "4 bits, tau 1, beta 1": CodecSettings("lossy", anchor_every=100, tau=1.0, beta=1.0),
    "4 bits, tau 2.5, beta 2": CodecSettings("lossy", anchor_every=100, tau=2.5, beta=2.0),
}


class Run:
    """A training whose batches follow from seed and step alone."""

    def __init__(self, text: Path | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed, self.step = seed, 0
        self.net = build_network({"class": "LlamaForCausalLM", "config": CONFIG})
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=RATE, weight_decay=0.0)
        data = text.read_bytes() if text else own_text()
        tokens = torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))
        self.train, self.held = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.net(input_ids=rows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def go(self, steps: int) -> list[float]:
        """Train on; the loss before each step."""
        losses = []
        for _ in range(steps):
            self.step += 1
            at = np.random.default_rng([self.seed, self.step]).integers(0, len(self.train) - LENGTH - 1, BATCH)
            loss = self.loss(torch.stack([self.train[i : i + LENGTH + 1] for i in at]))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def held_loss(self) -> float:
        """On 128 stretches that were not trained on, always the same."""
        at = np.random.default_rng(0).integers(0, len(self.held) - LENGTH - 1, 128)
        with torch.no_grad():
            return float(self.loss(torch.stack([self.held[i : i + LENGTH + 1] for i in at])))

    def tensors(self) -> dict:
        return training_tensors(self.net, self.optimizer)[0]


def own_text() -> bytes:
    """The package's own text, which ships with Python."""
    from lcsc.datasets.base import TextPart
    from lcsc.datasets.text import Text

    return Text().tokens(TextPart.TRAIN).numpy().astype(np.uint8).tobytes()


def plane_bytes(tensors: dict, plane: str) -> bytes:
    """All of a plane's numbers, in the order of their names."""
    others = tuple(prefix for prefix in (*PREFIX.values(), "state/") if prefix)
    names = sorted(n for n in tensors if (n.startswith(PREFIX[plane]) if plane != "w" else not n.startswith(others)))
    return b"".join(tensors[name].bits.tobytes() for name in names)


def lossless_rates(saved: list[dict], planes: str = "wmv") -> dict:
    """Ratio by plane and speed of everyone, for the last of some checkpoints; ours against the one before."""
    import zstandard

    last, before = saved[-1], saved[-2]
    parts = {plane: plane_bytes(last, plane) for plane in planes}
    found: dict = {}
    for name, peer in peers().items():
        own = {plane: measure(peer, data)["ratio"] for plane, data in parts.items()}
        found[name] = {**measure(peer, b"".join(parts.values())), **own}
    three, sizes = zstandard.ZstdCompressor(level=3), {}
    for plane, data in parts.items():
        moved = np.frombuffer(data, np.uint8) ^ np.frombuffer(plane_bytes(before, plane), np.uint8)
        sizes[plane] = len(three.compress(shuffled(moved.tobytes())))
    total = sum(map(len, parts.values()))
    found["XOR + shuffle + zstd-3"] = {"ratio": total / sum(sizes.values())}
    found["XOR + shuffle + zstd-3"] |= {plane: len(parts[plane]) / size for plane, size in sizes.items()}
    found["lcsc lossless"], found["lcsc lossless, anchor"] = ours_lossless(saved, parts)
    return found


def ours_lossless(saved: list[dict], parts: dict[str, bytes]) -> tuple[dict, dict]:
    """The file of the last checkpoint and of the first; every byte of it counts in `ratio`."""
    total = sum(map(len, parts.values()))
    with tempfile.TemporaryDirectory() as folder:
        writer = ChainWriter(Path(folder), CodecSettings(anchor_every=100))
        for step, tensors in enumerate(saved, 1):
            began = time.process_time()
            file = writer.append(step, tensors)
            encoded = time.process_time() - began
        chain = Chain(Path(folder))
        began, states = time.process_time(), dict(chain.walk())
        decoded = (time.process_time() - began) / len(saved)
        assert all(states[len(saved)].tensors[n].bits.tobytes() == a.bits.tobytes() for n, a in saved[-1].items())
        sizes: dict[str, int] = {}
        for part in chain.header(len(saved))["parts"]:
            sizes[part[1]] = sizes.get(part[1], 0) + sum(row[2] for row in part[5])
        own = {plane: len(parts[plane]) / sizes[plane] for plane in parts}
        speed = {"encode_mb_s": total / encoded / 1e6, "decode_mb_s": total / decoded / 1e6}
        anchor = {"ratio": total / chain.files[1].nbytes}
        return {"ratio": total / file.stat().st_size, **speed, **own}, anchor


class Watch:
    """Inside, each call of the coder of symbols is timed, and held against the entropy of its own counts."""

    def __enter__(self) -> Watch:
        self.calls: list[tuple[int, float, int]] = []
        self.real, entropy.encode_adaptive = entropy.encode_adaptive, self.encode
        return self

    def __exit__(self, *_: object) -> None:
        entropy.encode_adaptive = self.real

    def encode(self, sym_N, fine_N, coarse_N, counts):
        from codec_ideal import ideal_bits

        own = ideal_bits(sym_N, fine_N, coarse_N, counts[0].copy(), counts[1].copy())
        before = [part.copy() for part in counts]
        began = time.process_time()
        data = self.real(sym_N, fine_N, coarse_N, counts)
        took = time.process_time() - began
        if data is not None:
            began = time.process_time()
            entropy.decode_adaptive(data, fine_N, coarse_N, tuple(before))
            self.calls.append((len(sym_N), took, len(data), own / 8, time.process_time() - began))
        return data


def lossy_rates(saved: list[dict], settings: CodecSettings) -> dict:
    """Ours against xz on the same symbols of the last checkpoint, by plane, and the whole file's ratio."""
    total = sum(len(plane_bytes(saved[-1], plane)) for plane in "wmv")
    with tempfile.TemporaryDirectory() as folder:
        writer = ChainWriter(Path(folder), settings)
        for step, tensors in enumerate(saved, 1):
            with Watch() as watch:
                began = time.process_time()
                file = writer.append(step, tensors)
                took = time.process_time() - began
        chain = Chain(Path(folder))
        (state,) = [state for _, state in chain.walk([len(saved)])]
        rows: dict[str, dict] = {}
        for plane in "wmv":
            mine = [part for part in chain.header(len(saved))["parts"] if part[1] == plane and part[3] == "symbols"]
            names = sorted(name for name in state.symbols if name in {PREFIX[plane] + n for n in weights_of(state)})
            symbols = np.concatenate([state.symbols[name] for name in names])
            xz, own = xz_symbols(symbols), sum(row[2] for part in mine for row in part[5][:-1])
            rows[plane] = {"xz": xz, "ours": own, "saved": 1 - own / xz, "zeros": float((symbols == 0).mean())}
        xz, own = (sum(row[key] for row in rows.values()) for key in ("xz", "ours"))
        calls = watch.calls
        return {
            "ratio": total / file.stat().st_size,
            "saved": 1 - own / xz,
            "planes": rows,
            "excess_over_own_entropy": sum(c[2] for c in calls) / sum(c[3] for c in calls) - 1,
            "coder_msymbols_s": sum(c[0] for c in calls) / sum(c[1] for c in calls) / 1e6,
            "decoder_msymbols_s": sum(c[0] for c in calls) / sum(c[4] for c in calls) / 1e6,
            "seconds_with_checks": took,
        }


def weights_of(state) -> set[str]:
    """Names of the weights."""
    return {name for name in state.tensors if not name.startswith(("exp_avg", "state/"))}


class LanguageModel:
    """One seed, in pieces of less than a minute; states lie in a file of the work folder between them."""

    def __init__(self, row: dict, text: Path | None, seed: int, steps: int, after: tuple[int, ...], work: Path) -> None:
        self.row, self.text, self.seed, self.steps, self.after = row, text, seed, steps, after
        self.file = work / f"codec-lm-{seed}-{steps}.states"

    def pieces(self) -> dict[str, Callable[[], None]]:
        """By name, in order; each fills in its part of the row."""
        found: dict[str, Callable[[], None]] = {"train": self.train}
        for gap in (
            gap for gap in INTERVALS if gap < self.steps
        ):  # a short training has no two checkpoints so far apart
            found[f"lossless/{gap}"] = functools.partial(self.lossless, gap)
            for name in LOSSY:
                found[f"lossy/{name}/{gap}"] = functools.partial(self.lossy, name, gap)
        for name in (*RESUMES, NEW, EXCP):
            found[f"resume/{name}"] = functools.partial(self.resume, name)
        return found

    def chain(self, gap: int) -> list[dict]:
        """The last checkpoints at an interval, the newest last."""
        with open(self.file, "rb") as file:
            saved = pickle.load(file)
        return [saved[step] for k in (3, 2, 1, 0) if (step := self.steps - k * gap) in saved]

    def train(self) -> None:
        """To the checkpoint that is resumed from, keeping states, and on without interruption."""
        run = Run(self.text, self.seed)
        wanted = sorted({self.steps - k * gap for gap in INTERVALS for k in range(4) if self.steps - k * gap > 0})
        saved: dict[int, dict] = {}
        for step in wanted:
            run.go(step - run.step)
            saved[step] = run.tensors()
        with open(self.file, "wb") as file:
            pickle.dump(saved, file)
        held, curve = losses_after(run, self.after)
        own = {"losses": held, "curve": curve}
        self.row |= {"parameters": sum(p.numel() for p in run.net.parameters()), "steps": self.steps}
        self.row |= {"after": list(self.after), "resume": {"uninterrupted": own}, "lossless": {}, "lossy": {}}

    def lossless(self, gap: int) -> None:
        """Rates of everyone at an interval."""
        self.row["lossless"][str(gap)] = lossless_rates(self.chain(gap))

    def lossy(self, name: str, gap: int) -> None:
        """Ours against xz on the same symbols."""
        self.row["lossy"].setdefault(name, {})[str(gap)] = lossy_rates(self.chain(gap), LOSSY[name])

    def resume(self, name: str) -> None:
        """Losses after resuming from one way of keeping the state, four checkpoints into its chain."""
        saved = self.chain(RESUMED if self.steps > RESUMED else INTERVALS[0])
        raw = sum(len(plane_bytes(saved[-1], plane)) for plane in "wmv")
        tensors, ratio = saved[-1], 3.0
        if name == EXCP:
            tensors, ratio = by_excp(saved, raw)
        elif name in RESUMES:
            with tempfile.TemporaryDirectory() as folder:
                writer = ChainWriter(Path(folder), RESUMES[name])
                for place, own in enumerate(saved, 1):
                    file = writer.append(place, own)
                tensors, ratio = dict(Chain(Path(folder)).read(len(saved))), raw / file.stat().st_size
        run = Run(self.text, self.seed)
        restore_training(tensors, run.net, None if name == NEW else run.optimizer)
        run.step = self.steps
        held, curve = losses_after(run, self.after)
        unbroken = self.row["resume"]["uninterrupted"]
        change = [a - b for a, b in zip(held, unbroken["losses"], strict=True)]
        same = curve == unbroken["curve"]
        self.row["resume"][name] = {"ratio": ratio, "losses": held, "change": change, "same_curve": same}


def losses_after(run: Run, after: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Held-out loss after so many steps, and the losses of all steps."""
    start, held, curve = run.step, [], []
    for more in after:
        curve += run.go(start + more - run.step)
        held.append(run.held_loss())
    return held, curve


def by_excp(saved: list[dict], raw: int) -> tuple[dict, float]:
    """The last checkpoint as ExCP's rule keeps it, each against the reconstruction of the one before."""
    from lcsc.codec.arrays import Array

    names = [n for n in saved[0] if PREFIX["m"] + n in saved[0] and saved[0][n].bits.ndim > 1]
    before = [saved[0][n].bits.reshape(-1) for n in names]
    for tensors in saved[1:]:
        flat = {p: [tensors[PREFIX[p] + n].bits.reshape(-1) for n in names] for p in "wmv"}
        kept = excp(flat["w"], flat["m"], flat["v"], before)
        before = kept["w"]
    found = dict(saved[-1])
    for plane in "wmv":
        for name, numbers in zip(names, kept[plane], strict=True):
            found[PREFIX[plane] + name] = Array("float32", numbers.reshape(saved[-1][name].bits.shape))
    small = sum(a.bits.nbytes for n, a in saved[-1].items() if a.bits.ndim < 2)
    return found, raw / (kept["bytes"] + small)


class Weights:
    """One bank: rates without loss, and what a search on lossy ones finds, scored on the exact one."""

    def __init__(self, row: dict, args: argparse.Namespace) -> None:
        self.row, self.path, self.seed, self.work = row, args.bank, args.seed, args.work
        self.trials, self.images = args.trials, args.images

    def pieces(self) -> dict[str, Callable[[], None]]:
        """By name, in order."""
        from codec_search import BANKS, SEARCHED

        opens = {f"open/{name}": functools.partial(self.open, name) for name in BANKS}
        return {"lossless": self.lossless, **opens} | {
            f"search/{name}": functools.partial(self.search, name) for name in SEARCHED
        }

    def lossless(self) -> None:
        """The last of four checkpoints."""
        from lcsc.bank.coded import tensors_of

        bank = CheckpointBank.open(self.path, storage="streamed")
        names = [entry.name for entry in bank.layout.entries]
        self.row |= {"checkpoints": bank.num_checkpoints, "parameters": bank.layout.num_parameters}
        self.row["lossless"] = lossless_rates([tensors_of(row, names) for row in bank.rows[-4:]], "w")

    def open(self, name: str) -> None:
        """How long coding and opening take."""
        from codec_search import opened

        self.row.setdefault("open", {})[name] = opened(self.path, name, self.seed, self.work)

    def search(self, name: str) -> None:
        """On one bank of `codec_search.BANKS`."""
        from codec_search import searched

        self.row.setdefault("search", {})[name] = searched(
            self.path, name, self.seed, self.trials, self.images, self.work
        )


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lm", "bank"])
    parser.add_argument("--steps", type=int, default=400, help="of the training before it is interrupted")
    parser.add_argument("--after", default="0,10,50,200", help="steps after resuming at which the loss is taken")
    parser.add_argument("--text", type=Path, help="a text file; without it the package's own text")
    parser.add_argument("--bank", type=Path, default=Path("banks/digits"))
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--images", type=int, default=2048, help="that the winner of a bank is scored on")
    add_options(parser)
    args = parser.parse_args()
    after = tuple(map(int, args.after.split(",")))

    def pieces_of(row: dict) -> Pieces:
        if args.what == "lm":
            return LanguageModel(row, args.text, args.seed, args.steps, after, args.work).pieces()
        return Weights(row, args).pieces()

    run_pieces(args, pieces_of)


if __name__ == "__main__":
    main()

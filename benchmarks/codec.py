"""Checkpoints coded, beside other compressors in one run: docs/codec.md and results/codec_*.json.

    python benchmarks/codec.py lm --seed 0 --text FILE --to codec_lm.json       a language model with its optimizer
    python benchmarks/codec.py bank --seed 0 --bank banks/digits --to codec_digits.json    a bank of weights

`lm` trains a small Llama on bytes with AdamW, codes its checkpoints at several intervals, and resumes from what was
restored. `bank` codes a bank of weights, searches the lossy banks and scores what it found on the exact one. A seed
that is in the results file is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from codec_peers import excp, measure, peers, shuffled, xz_symbols
from machine import circumstances

import lcsc.kernels.entropy as entropy
from lcsc.bank import CheckpointBank
from lcsc.codec.arrays import PREFIX
from lcsc.codec.chain import Chain, ChainWriter
from lcsc.codec.settings import CodecSettings
from lcsc.core.files import write_json
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
    "lossless": CodecSettings(),
    "8/8/8 bits": CodecSettings("lossy", bits_w=8, bits_m=8, bits_v=8),
    "4/4/4 bits": CodecSettings("lossy"),
    "3/3/3 bits": CodecSettings("lossy", bits_w=3, bits_m=3, bits_v=3),
    "4/4/4 bits, tau 1, beta 1": CodecSettings("lossy", tau=1.0, beta=1.0),
}
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
            began = time.perf_counter()
            file = writer.append(step, tensors)
            encoded = time.perf_counter() - began
        chain = Chain(Path(folder))
        began, states = time.perf_counter(), dict(chain.walk())
        decoded = (time.perf_counter() - began) / len(saved)
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
        began = time.perf_counter()
        data = self.real(sym_N, fine_N, coarse_N, counts)
        took = time.perf_counter() - began
        if data is not None:
            began = time.perf_counter()
            entropy.decode_adaptive(data, fine_N, coarse_N, tuple(before))
            self.calls.append((len(sym_N), took, len(data), own / 8, time.perf_counter() - began))
        return data


def lossy_rates(saved: list[dict], settings: CodecSettings) -> dict:
    """Ours against xz on the same symbols of the last checkpoint, by plane, and the whole file's ratio."""
    total = sum(len(plane_bytes(saved[-1], plane)) for plane in "wmv")
    with tempfile.TemporaryDirectory() as folder:
        writer = ChainWriter(Path(folder), settings)
        for step, tensors in enumerate(saved, 1):
            with Watch() as watch:
                began = time.perf_counter()
                file = writer.append(step, tensors)
                took = time.perf_counter() - began
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


def language_model(text: Path | None, seed: int, steps: int, after: tuple[int, ...]) -> dict:
    """One seed: rates at each interval, and losses after resuming."""
    run = Run(text, seed)
    wanted = sorted({steps - k * gap for gap in INTERVALS for k in range(4) if steps - k * gap > 0})
    saved: dict[int, dict] = {}
    for step in wanted:
        run.go(step - run.step)
        saved[step] = run.tensors()
    chains = {gap: [saved[s] for k in (3, 2, 1, 0) if (s := steps - k * gap) > 0] for gap in INTERVALS}
    chains = {gap: chain for gap, chain in chains.items() if len(chain) > 1}
    found: dict = {"seed": seed, "parameters": sum(p.numel() for p in run.net.parameters()), "steps": steps}
    found["lossless"] = {str(gap): lossless_rates(chain) for gap, chain in chains.items()}
    found["lossy"] = {
        name: {str(gap): lossy_rates(chain, settings) for gap, chain in chains.items()}
        for name, settings in LOSSY.items()
    }
    found["resume"] = resumes(run, chains[20] if 20 in chains else chains[max(chains)], text, seed, after)
    return found


def losses_after(run: Run, after: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Held-out loss after so many steps, and the losses of all steps."""
    start, held, curve = run.step, [], []
    for more in after:
        curve += run.go(start + more - run.step)
        held.append(run.held_loss())
    return held, curve


def resumes(run: Run, saved: list[dict], text: Path | None, seed: int, after: tuple[int, ...]) -> dict:
    """Loss after resuming from each way of keeping the state, and how small that was."""
    step = run.step
    held, curve = losses_after(run, after)
    found: dict = {"after": list(after), "uninterrupted": {"losses": held}}
    raw = sum(len(plane_bytes(saved[-1], plane)) for plane in "wmv")

    def resumed(name: str, tensors: dict, ratio: float, optimizer: bool = True) -> None:
        other = Run(text, seed)
        restore_training(tensors, other.net, other.optimizer if optimizer else None)
        other.step = step
        own, steps = losses_after(other, after)
        found[name] = {"ratio": ratio, "losses": own, "change": [a - b for a, b in zip(own, held, strict=True)]}
        found[name]["same_curve"] = steps == curve

    for name, settings in RESUMES.items():
        with tempfile.TemporaryDirectory() as folder:
            writer = ChainWriter(Path(folder), settings)
            for place, tensors in enumerate(saved, 1):
                file = writer.append(place, tensors)
            resumed(name, dict(Chain(Path(folder)).read(len(saved))), raw / file.stat().st_size)
    resumed("weights alone, new AdamW", saved[-1], 3.0, optimizer=False)
    tensors, ratio = by_excp(saved, raw)
    resumed("ExCP's rule + xz", tensors, ratio)
    return found


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


def bank_of_weights(path: Path, seed: int, trials: int) -> dict:
    """One bank: rates without loss, and what a search on lossy ones finds, scored on the exact one."""
    from codec_search import searched

    from lcsc.bank.coded import tensors_of

    bank = CheckpointBank.open(path, storage="streamed")
    names = [entry.name for entry in bank.layout.entries]
    saved = [tensors_of(row, names) for row in bank.rows[-4:]]
    found = {"seed": seed, "checkpoints": bank.num_checkpoints, "parameters": bank.layout.num_parameters}
    return {**found, "lossless": lossless_rates(saved, "w"), "search": searched(path, seed, trials)}


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lm", "bank"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="of the training before it is interrupted")
    parser.add_argument("--after", default="0,10,50,200", help="steps after resuming at which the loss is taken")
    parser.add_argument("--text", type=Path, help="a text file; without it the package's own text")
    parser.add_argument("--bank", type=Path, default=Path("banks/digits"))
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.to.read_text()) if args.to.exists() else {**circumstances(), "seeds": []}
    if any(row["seed"] == args.seed for row in results["seeds"]):
        return
    began = time.perf_counter()
    if args.what == "lm":
        row = language_model(args.text, args.seed, args.steps, tuple(map(int, args.after.split(","))))
    else:
        row = bank_of_weights(args.bank, args.seed, args.trials)
    row["seconds"] = time.perf_counter() - began
    results["seeds"] = sorted([*results["seeds"], row], key=lambda row: row["seed"])
    write_json(args.to, results)


if __name__ == "__main__":
    main()

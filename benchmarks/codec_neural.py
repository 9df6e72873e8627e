"""The network against counts and xz on the same symbols: docs/codec.md and results/codec_neural.json.

    python benchmarks/codec_neural.py --seed 0 --text FILE --to codec_neural.json

Takes the checkpoints of `codec.py lm` (trained where they are not in the work folder), codes each chain with counts and
with the network, and reads back. Of the last checkpoint: bytes by plane, of symbols alone and of the whole file. Speeds
are of the coders of symbols over all checkpoints of a chain, in the process's own time. Each piece is saved when it is
done, and the same line goes on with the next.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from codec import INTERVALS, LOSSY, LanguageModel, plane_bytes, weights_of
from codec_peers import xz_symbols
from pieces import Pieces, add_options, run_pieces

import lcsc.kernels.entropy as entropy
import lcsc.kernels.neural as network
from lcsc.codec import neural
from lcsc.codec.arrays import PREFIX
from lcsc.codec.chain import Chain, ChainWriter

#: what of a lossy chain is measured, by name; the first at every interval
SETTINGS = {"4 bits": INTERVALS, "4 bits, tau 1, beta 1": (20,)}
#: coder, its module, and the functions that write and read
CODERS = {
    "counts": (entropy, "encode_adaptive", "decode_adaptive"),
    "neural": (network, "encode", "decode"),
}


class Clock:
    """Inside, the time in a coder's two functions is added up."""

    def __init__(self, coder: str) -> None:
        self.module, *self.names = CODERS[coder]
        self.seconds = dict.fromkeys(self.names, 0.0)
        self.symbols = dict.fromkeys(self.names, 0)

    def __enter__(self) -> Clock:
        self.real = {name: getattr(self.module, name) for name in self.names}
        for name in self.names:
            setattr(self.module, name, partial(self.call, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self.real.items():
            setattr(self.module, name, real)

    def call(self, name: str, first, second, *more):
        began = time.process_time()
        found = self.real[name](first, second, *more)
        self.seconds[name] += time.process_time() - began
        coded = first if isinstance(first, np.ndarray) else second  # reading, the contexts: as long, or planes of it
        self.symbols[name] += coded.shape[-1]
        return found

    def speeds(self) -> dict[str, float]:
        """Million symbols a second: written, and read."""
        rates = [self.symbols[name] / self.seconds[name] / 1e6 for name in self.names]
        return dict(zip(("encode_msymbols_s", "decode_msymbols_s"), rates, strict=True))


def coded(saved: list[dict], settings, coder: str) -> tuple[dict, dict, bytes]:
    """A chain by a coder: sizes and speeds, symbols of the last checkpoint by plane, and its contents."""
    total = sum(len(plane_bytes(saved[-1], plane)) for plane in "wmv")
    with tempfile.TemporaryDirectory() as folder:
        with Clock(coder) as clock:
            began = time.process_time()
            writer = ChainWriter(Path(folder), replace(settings, coder=coder))
            for step, tensors in enumerate(saved, 1):
                file = writer.append(step, tensors)
            middle = time.process_time()
            chain = Chain(Path(folder))
            (state,) = [state for _, state in chain.walk([len(saved)])]
            ended = time.process_time()
        parts = chain.header(len(saved))["parts"]
        names, planes, symbols = weights_of(state), {}, {}
        for plane in "wmv":
            mine = [part for part in parts if part[1] == plane and part[3] in ("symbols", "neural")]
            planes[plane] = sum(row[2] for part in mine for row in part[5][:-1])
            own = sorted(name for name in state.symbols if name in {PREFIX[plane] + n for n in names})
            symbols[plane] = np.concatenate([state.symbols[name] for name in own])
        row = {"bytes": planes, "file": file.stat().st_size, "ratio": total / file.stat().st_size}
        row |= clock.speeds() | {"write_seconds": middle - began, "read_seconds": ended - middle}
        contents = b"".join(state.tensors[name].bits.tobytes() for name in sorted(state.tensors))
    return row, symbols, contents


def measured(saved: list[dict], settings) -> dict:
    """Both coders and xz."""
    found, all_symbols, all_contents = {}, [], []
    for coder in CODERS:
        found[coder], symbols, contents = coded(saved, settings, coder)
        all_symbols.append(symbols)
        all_contents.append(contents)
    one, two = all_symbols
    assert all(np.array_equal(one[plane], two[plane]) for plane in one)
    assert all_contents[0] == all_contents[1]
    found["xz"] = {"bytes": {plane: xz_symbols(own) for plane, own in one.items()}}
    sizes = {name: row["bytes"] for name, row in found.items()}
    for other in ("counts", "xz"):
        own = {plane: 1 - sizes["neural"][plane] / sizes[other][plane] for plane in "wmv"}
        own["all"] = 1 - sum(sizes["neural"].values()) / sum(sizes[other].values())
        found[f"saved against {other}"] = own
    return found


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of the training")
    parser.add_argument("--text", type=Path, help="a text file; without it the package's own text")
    add_options(parser)
    args = parser.parse_args()

    def pieces_of(row: dict) -> Pieces:
        model = LanguageModel({}, args.text, args.seed, args.steps, (0,), args.work)

        def measure(name: str, gap: int) -> None:
            if not model.file.exists():
                model.train()
            row["lossy"].setdefault(name, {})[str(gap)] = measured(model.chain(gap), LOSSY[name])

        wanted = [(name, gap) for name, gaps in SETTINGS.items() for gap in gaps if gap < args.steps]
        return {f"{name}/{gap}": partial(measure, name, gap) for name, gap in wanted}

    # both coders compile or are loaded before anything is timed; the network is to find the environment
    nothing = np.zeros(64, np.int32)
    data = entropy.encode_adaptive(nothing.astype(np.uint8), nothing, nothing, entropy.fresh_counts(1, 1, 2))
    entropy.decode_adaptive(data, nothing, nothing, entropy.fresh_counts(1, 1, 2))
    run_pieces(args, pieces_of, steps=args.steps, environment=neural.environment(), lossy={})


if __name__ == "__main__":
    main()

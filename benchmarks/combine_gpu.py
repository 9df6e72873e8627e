"""How fast a GPU combines checkpoints, next to how fast it copies.

    python benchmarks/combine_gpu.py [--rounds 30] [--to benchmarks/results/combine_gpu.json]

40 checkpoints of 56 M numbers in float32, bfloat16 and float16; 1, 8 and 16 candidates per pass. Contenders take turns,
round by round, timed by CUDA events. The bandwidth of a combination counts the bank once and the results once; that of
a copy counts what it reads and what it writes. `odd rows` is a bank without padding between rows, so that most rows
begin off 16-byte boundaries. Needs a CUDA device with 24 GB of free memory (12 GB with --parameters 20000000).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from machine import circumstances, spread

from lcsc.kernels import _reference, combine, project

HERE = Path(__file__).parent
ROWS, PARAMETERS = 40, 55_834_243
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PADDING = 64  # row strides are multiples of this many numbers


def seconds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender per round; three rounds before that compile and warm up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 3):
        for name, call in work.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            call()
            ended.record()
            ended.synchronize()
            if number >= 3:
                found[name].append(began.elapsed_time(ended) / 1e3)
    return found


def bank(memory: torch.Tensor, dtype: torch.dtype, P: int, stride: int) -> torch.Tensor:
    """Normal numbers, shape (ROWS, P), at the beginning of `memory`."""
    W_KP = memory.view(dtype)[: ROWS * stride].view(ROWS, stride)[:, :P]
    for row_P in W_KP:
        row_P.normal_()
    return W_KP


def contenders(W_KP: torch.Tensor, out_BP: torch.Tensor, coef_BK: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Combinations of 1, 8 and 16 candidates with and without the library's checks, torch's own, and the transpose."""
    same = coef_BK.to(W_KP.device, W_KP.dtype)
    return {
        "B=1": lambda: combine(coef_BK[0], W_KP, out_BP=out_BP[0]),
        "B=8": lambda: combine(coef_BK[:8], W_KP, out_BP=out_BP[:8]),
        "B=16": lambda: combine(coef_BK, W_KP, out_BP=out_BP),
        "project": lambda: project(out_BP[0], W_KP),
        "torch, B=1": lambda: same[0] @ W_KP,
        "torch, B=8": lambda: same[:8] @ W_KP,
    }


def error(W_KP: torch.Tensor, coef_BK: torch.Tensor) -> dict[str, float]:
    """On a slice of the columns: results whose bits are not the reference's, and the largest error by sum |c w|."""
    part = W_KP[:, -100_003:]
    found = combine(coef_BK, part).cpu().numpy()
    wide, numbers = part.float().cpu().numpy(), coef_BK.numpy()
    wanted = np.stack([_reference.combine(coef_K, wide) for coef_K in numbers])
    shares = np.abs(found.astype(np.float64) - wanted) / (np.abs(numbers) @ np.abs(wide.astype(np.float64)))
    return {"share_of_other_bits": float(np.mean(found != wanted)), "largest_error": float(shares.max())}


def measure(P: int, rounds: int) -> dict:
    """All dtypes; the copy runs in turn with each."""
    padded = -(-P // PADDING) * PADDING
    memory = torch.empty(4 * ROWS * padded, dtype=torch.uint8, device="cuda")
    out_BP = torch.empty(16, padded, device="cuda")[:, :P]
    big = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda")
    rng = np.random.default_rng(0)
    coef_BK = torch.from_numpy(rng.normal(0, 1, (16, ROWS)))
    result = {}
    for name, dtype in DTYPES.items():
        for rows, stride in (("", padded), (", odd rows", P)):
            W_KP = bank(memory, dtype, P, stride)
            work = {"copy": lambda: big[1].copy_(big[0])} | contenders(W_KP, out_BP, coef_BK)
            if rows:
                work = {key: work[key] for key in ("copy", "B=1", "B=16")}
            times = seconds(work, rounds)
            moved = {"copy": 2 * big[0].nbytes}
            for key in times.keys() - {"copy"}:
                results = int(key.split("B=")[1]) if "B=" in key else 1
                moved[key] = W_KP.element_size() * ROWS * P + 4 * P * results
            result[name + rows] = {"error": error(W_KP, coef_BK)} | {
                key: {
                    "seconds": spread(values),
                    "bytes_per_second": moved[key] / spread(values)["median"],
                    "of_copy": spread(
                        [
                            moved[key] / value / (moved["copy"] / copy)
                            for value, copy in zip(values, times["copy"], strict=True)
                        ]
                    ),
                }
                for key, values in times.items()
            }
            print(
                name + rows,
                {key: round(row["of_copy"]["median"], 3) for key, row in result[name + rows].items() if key != "error"},
            )
    return result


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--to", type=Path, default=HERE / "results" / "combine_gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "combine_gpu.py needs a CUDA device, and torch finds none; the results file was left as it is."
        )
    import triton

    card = torch.cuda.get_device_properties(0)
    about = {
        "gpu": f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB",
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "checkpoints": ROWS,
        "parameters": options.parameters,
        "rounds": options.rounds,
    }
    result = circumstances() | about | {"measured": measure(options.parameters, options.rounds)}
    options.to.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

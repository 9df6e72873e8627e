"""Does a bank take the memory that the scan predicts? 10,000 small checkpoints and 40 large ones, in each storage.

    python benchmarks/memory.py --work scratch/ [--to benchmarks/results/memory.json]

Each case is a process of its own that opens the bank, reads it as its storage does and combines one candidate; its peak
resident memory (VmHWM) stands beside the number that `lcsc bank scan` prints. Needs 4 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances

HERE = Path(__file__).parent
#: name -> checkpoints, parameters of one
CASES = {"10000_small": (10_000, 25_000), "40_large": (40, 16_000_000)}
CHILD = """
import sys, torch
from pathlib import Path
from lcsc.bank import CheckpointBank
bank = CheckpointBank.open(sys.argv[1], storage=sys.argv[2])
bank.load()
coef = torch.full((bank.num_checkpoints,), 1 / bank.num_checkpoints, dtype=torch.float64)
bank.combine(coef, out=torch.empty(bank.layout.num_parameters))
status = Path("/proc/self/status").read_text()
print(1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))))
"""
SCAN = """
import sys, json
from lcsc.bank.find import choose, find_groups
from lcsc.bank.memory import predicted_peak
from lcsc.bank.shape import shape_of
group = choose(find_groups(sys.argv[1]))
print(json.dumps(predicted_peak(len(group.steps), shape_of(group, group.checkpoints).layout.num_parameters)))
"""


def make(folder: Path, checkpoints: int, parameters: int) -> None:
    """Checkpoints of ten tensors each, written by safetensors; kept from an earlier call."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng, size = np.random.default_rng(0), parameters // 10
    values = rng.standard_normal(parameters, np.float32)
    for k in range(checkpoints):
        path = folder / f"model-{k + 1:06d}.safetensors"
        if not path.exists():
            save_file({f"layer{i}": values[i * size : (i + 1) * size] + np.float32(k) for i in range(10)}, path)


def child(code: str, *words: str) -> str:
    """Standard output of a Python process."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=HERE / "results" / "memory.json")
    options = parser.parse_args()
    rows = []
    for name, (checkpoints, parameters) in CASES.items():
        make(options.work / name, checkpoints, parameters)
        predicted = json.loads(child(SCAN, str(options.work / name)))
        for storage, expected in predicted.items():
            measured = int(child(CHILD, str(options.work / name), storage))
            rows.append(
                {
                    "case": name,
                    "checkpoints": checkpoints,
                    "parameters": parameters,
                    "storage": storage,
                    "predicted_bytes": expected,
                    "measured_bytes": measured,
                    "measured_over_predicted": measured / expected,
                }
            )
            print(rows[-1], flush=True)
    options.to.write_text(json.dumps({**circumstances(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
